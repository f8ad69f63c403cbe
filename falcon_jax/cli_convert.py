"""The sub-command `convert`: weights of torchvision to a checkpoint."""

from __future__ import annotations

import argparse
from typing import Any

from falcon_jax.convert import convert_file
from falcon_jax.methods import Method
from falcon_jax.methods.registry import method_from


def add_convert(commands: Any) -> None:
    """Adds `convert`: weights of torchvision or timm to a checkpoint, compressed or not.

    Args:
        commands: the sub-commands of the parser, as `add_subparsers` gives them.
    """
    text = "convert weights of torchvision or timm to a checkpoint, compressed or not"
    parser = commands.add_parser("convert", help=text, description=text.capitalize() + ".")
    parser.add_argument("--arch", required=True, help="for example resnet18 or vgg16_bn")
    parser.add_argument("--weights", required=True, help="a .pth, .pt or .safetensors file")
    parser.add_argument("--out", required=True, help="directory to make")
    parser.add_argument("--classes", type=int, default=1000, help="outputs (default: 1000)")
    parser.add_argument(
        "--head",
        choices=("keep", "new"),
        default="keep",
        help="the last layer: that of the weights, or a new one for another number of classes",
    )
    parser.add_argument("--method", help="replaces all convolutions but the first: falcon, ...")
    parser.add_argument("--rank", help="of the method: a number, or full")
    parser.set_defaults(run=_convert)


def _convert(parsed: argparse.Namespace) -> None:
    plan = convert_file(
        parsed.weights,
        parsed.out,
        arch=parsed.arch,
        classes=parsed.classes,
        method=_method(parsed.method, parsed.rank),
        head=parsed.head,
    )
    if plan.replaced:
        print(plan)
    print(parsed.out)


def _method(name: str | None, rank: str | None) -> Method | None:
    if name is None:
        if rank is not None:
            raise ValueError("--rank is that of a method; give --method, too, such as falcon.")
        return None
    if rank is None:
        return method_from({"method": name})
    if rank != "full" and not rank.isdecimal():
        raise ValueError(f"--rank is a number or full; got {rank!r}.")
    return method_from({"method": name, "rank": rank if rank == "full" else int(rank)})
