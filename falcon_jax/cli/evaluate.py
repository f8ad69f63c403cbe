"""The sub-commands `evaluate` and `profile`: how good a stored model is, and what it costs."""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from falcon_jax.cli.data import add_data_options, load_data
from falcon_jax.compression.profile import profile
from falcon_jax.storage.models import load_stored
from falcon_jax.terminal import show
from falcon_jax.training.devices import data_mesh, replicate
from falcon_jax.training.evaluation import evaluate, make_eval_step
from falcon_jax.training.monitoring import Progress
from falcon_jax.training.network import Network
from falcon_jax.training.step import Preprocessing


def add_evaluate(commands: Any) -> None:
    """Add `evaluate`: top-1 and top-5 of a stored model.

    Args:
        commands: the sub-commands of the parser, as `add_subparsers` gives them.
    """
    text = "count how many images a checkpoint classifies correctly"
    parser = commands.add_parser("evaluate", help=text, description=text.capitalize() + ".")
    parser.add_argument("checkpoint", help="made by convert, compress or train.py")
    add_data_options(parser, required=True)
    parser.add_argument(
        "--split", choices=("train", "validation", "test"), default="test", help="default: test"
    )
    parser.set_defaults(run=_evaluate)


def add_profile(commands: Any) -> None:
    """Add `profile`: parameters, mult-adds and latency of a stored model, layer by layer.

    Args:
        commands: as in `add_evaluate`.
    """
    text = "print parameters and mult-adds of a checkpoint, layer by layer"
    parser = commands.add_parser("profile", help=text, description=text.capitalize() + ".")
    parser.add_argument("checkpoint", help="made by convert, compress or train.py")
    parser.add_argument(
        "--latency", action="store_true", help="measure the time of a forward pass, too"
    )
    parser.add_argument(
        "--batch-size", type=int, default=1, help="images of that pass (default: 1)"
    )
    parser.set_defaults(run=_profile)


def _evaluate(parsed: argparse.Namespace) -> None:
    if parsed.batch_size < 1:
        raise ValueError(f"--batch-size must be 1 or more, but is {parsed.batch_size}")
    stored = load_stored(parsed.checkpoint)
    dataset = load_data(parsed, stored.description)
    split = getattr(dataset, parsed.split)
    if split is None:
        raise ValueError(f"{dataset.name} has no {parsed.split} split")
    preprocessing = stored.description.preprocessing
    network, *arrays = Network.split(stored.model)
    mesh = data_mesh()
    params, statistics = replicate(tuple(arrays), mesh)
    step = make_eval_step(network, Preprocessing(mean=preprocessing.mean, std=preprocessing.std))
    progress = Progress(f"{dataset.name}, {parsed.split}", total=len(split))
    start = time.perf_counter()
    try:
        result = evaluate(
            step,
            params,
            statistics,
            split,
            batch_size=parsed.batch_size,
            mesh=mesh,
            advance=progress.advance,
        )
    finally:
        progress.close()
    seconds = time.perf_counter() - start
    for name, share in (("top-1", result.top1), ("top-5", result.top5)):
        print(f"{name}  {share:.2%}  {round(share * result.count)} of {result.count}")
    print(f"loss   {result.loss:.4f}")
    print(f"{result.count / seconds:.1f} images/s on {mesh.size} {jax.default_backend()} devices")


def _profile(parsed: argparse.Namespace) -> None:
    if parsed.batch_size < 1:
        raise ValueError(f"--batch-size must be 1 or more, but is {parsed.batch_size}")
    stored = load_stored(parsed.checkpoint)
    shape = (parsed.batch_size, *stored.description.sample.shape[1:])
    sample = jnp.zeros(shape, np.float32) if parsed.latency else jax.ShapeDtypeStruct(shape, "f4")
    show(profile(stored.model, sample, latency=parsed.latency))
