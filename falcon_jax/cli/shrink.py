"""The sub-command `shrink`: a stored model made smaller for a target."""

import argparse
import dataclasses
import sys
from typing import Any

import jax.numpy as jnp

from falcon_jax.cli.data import add_data_options, load_data, training_inputs
from falcon_jax.compression.distillation import distill
from falcon_jax.compression.plan import Rule
from falcon_jax.compression.search import Shrunk, shrink
from falcon_jax.compression.target import Target
from falcon_jax.convert.checkpoint import require_absent
from falcon_jax.methods.registry import method_from
from falcon_jax.paths import user_path
from falcon_jax.report.search import write_shrunk
from falcon_jax.storage.models import Stored, load_stored, save_stored
from falcon_jax.terminal import show

_BATCHES = 4


def add_shrink(commands: Any) -> None:
    """Add `shrink`: a stored model made smaller for a target, on unlabelled images.

    Args:
        commands: the sub-commands of the parser, as `add_subparsers` gives them.
    """
    text = "make a checkpoint smaller for a target: search, compress, calibrate"
    parser = commands.add_parser("shrink", help=text, description=text.capitalize() + ".")
    parser.add_argument("checkpoint", help="made by convert or train.py, not compressed")
    parser.add_argument("--out", required=True, help="directory to make")
    parser.add_argument(
        "--target",
        required=True,
        metavar="NAME=NUMBER",
        help="params=, mult_adds= or latency=, shares of the original's (above 1: numbers); "
        "latency_ms=, for a batch of one; or loss=, of the output",
    )
    parser.add_argument(
        "--method",
        action="append",
        default=[],
        metavar="NAME[:RANK]",
        help="a candidate, may be repeated, such as falcon:2 "
        "(default: FALCON, channel and spatial decomposition of several ranks)",
    )
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="REGEX",
        help="paths of layers that stay, may be repeated",
    )
    add_data_options(parser, required=True)
    parser.add_argument(
        "--batches", type=int, default=_BATCHES, help=f"of images (default: {_BATCHES})"
    )
    parser.add_argument(
        "--distill",
        type=int,
        default=0,
        metavar="STEPS",
        help="then train without labels, so many steps (default: 0)",
    )
    parser.add_argument("--report", help="directory for text, JSON, plots and a page")
    parser.set_defaults(run=_shrink)


def _shrink(parsed: argparse.Namespace) -> None:
    target = _target(parsed.target)
    candidates = [_candidate(text) for text in parsed.method] or None
    rules = [Rule(path=path, method=None) for path in parsed.keep]
    require_absent(user_path(parsed.out))
    for name, least in (("batches", 1), ("distill", 0)):
        if getattr(parsed, name) < least:
            raise ValueError(f"--{name} must be {least} or more, but is {getattr(parsed, name)}.")
    stored = load_stored(parsed.checkpoint)
    if stored.plan.replaced:
        raise ValueError(
            f"{parsed.checkpoint} is compressed already; give the model that it was made from."
        )
    dataset = load_data(parsed, stored.description)
    batches = list(training_inputs(parsed, dataset, stored.description, parsed.batches))
    shape = stored.description.sample
    reports: list[Shrunk] = []
    small = shrink(
        stored.model,
        batches,
        target=target,
        candidates=candidates,
        rules=rules,
        sample=jnp.zeros(shape.shape, shape.dtype),
        progress=sys.stderr.isatty(),
        report=reports.append,
    )
    (shrunk,) = reports
    if parsed.distill:
        small = distill(
            stored.model,
            small,
            batches,
            steps=parsed.distill,
            temperature=1.0,
            progress=sys.stderr.isatty(),
        )
    if parsed.report:
        write_shrunk(shrunk, parsed.report)
    show(shrunk)
    save_stored(parsed.out, Stored(model=small, plan=shrunk.plan, description=stored.description))
    print(parsed.out)


def _target(text: str) -> Target:
    names = [field.name for field in dataclasses.fields(Target)]
    name, equals, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = None
    if name not in names or not equals or value is None:
        raise ValueError(
            f"--target is a name and a number, such as mult_adds=0.15, of {', '.join(names)}; "
            f"got {text!r}."
        )
    return Target(**{name: value})


def _candidate(text: str) -> Any:
    name, colon, rank = text.partition(":")
    if not colon:
        return method_from({"method": name})
    if not rank.isdecimal():
        raise ValueError(
            f"--method is a name, or a name and a number such as falcon:2; got {text!r}."
        )
    return method_from({"method": name, "rank": int(rank)})
