"""The sub-command make-folder: a folder of made-up images for smoke runs and benchmarks."""

from __future__ import annotations

from typing import Any

from falcon_jax.data.fake_folder import make_image_folder


def add_make_folder(commands: Any) -> None:
    """Adds `make-folder`: write a folder of made-up JPEG images, one subfolder a class.

    Args:
        commands: the sub-commands of the parser, as `add_subparsers` gives them.
    """
    text = "write a folder of made-up JPEG images, one subfolder a class"
    parser = commands.add_parser("make-folder", help=text, description=text.capitalize() + ".")
    parser.add_argument("--out", required=True, help="the folder; it must not hold anything yet")
    parser.add_argument("--classes", type=int, default=10, help="number of classes")
    parser.add_argument("--train", type=int, default=500, help="number of training images")
    parser.add_argument("--val", type=int, default=100, help="number of validation images")
    parser.add_argument("--side", type=int, default=400, help="mean height and width, pixels")
    parser.add_argument("--seed", type=int, default=0, help="the same seed makes the same images")
    parser.set_defaults(run=_run)


def _run(parsed: Any) -> None:
    directory = make_image_folder(
        parsed.out,
        num_classes=parsed.classes,
        num_train=parsed.train,
        num_val=parsed.val,
        side=parsed.side,
        seed=parsed.seed,
    )
    print(directory)
