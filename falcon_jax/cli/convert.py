"""The sub-commands `convert` and `compress`: weights of others, and stored models, made smaller."""

import argparse
from typing import Any

from falcon_jax.cli.data import add_data_options, load_data, training_inputs
from falcon_jax.compression.batchnorm import reestimate_batchnorm
from falcon_jax.convert.checkpoint import IMAGENET, compressed, convert_file, require_absent
from falcon_jax.data.decoding import INTERPOLATIONS
from falcon_jax.methods.base import Method
from falcon_jax.methods.registry import method_from
from falcon_jax.paths import user_path
from falcon_jax.storage.models import (
    ImagePreprocessing,
    Stored,
    load_stored,
    save_stored,
)
from falcon_jax.terminal import show


def add_convert(commands: Any) -> None:
    """Add `convert`: weights of torchvision or timm to a stored model, compressed or not.

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
    parser.add_argument(
        "--key",
        help="of a checkpoint with several state dicts, the one to take: a path in it "
        "(ema/state_dict) or the beginning of names (teacher)",
    )
    _add_preprocessing(parser)
    _add_method(parser, required=False)
    parser.set_defaults(run=_convert)


def add_compress(commands: Any) -> None:
    """Add `compress`: a stored model to a smaller one.

    Args:
        commands: as in `add_convert`.
    """
    text = "compress a checkpoint"
    parser = commands.add_parser("compress", help=text, description=text.capitalize() + ".")
    parser.add_argument("checkpoint", help="made by convert or by train.py")
    parser.add_argument("--out", required=True, help="directory to make")
    _add_method(parser, required=True)
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="REGEX",
        help="paths of layers that stay, may be repeated (default: the first convolution)",
    )
    add_data_options(parser, required=False)
    parser.add_argument(
        "--batches",
        type=int,
        default=8,
        help="with --data: training batches for new BatchNorm statistics (default: 8)",
    )
    parser.set_defaults(run=_compress)


def _add_preprocessing(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "preprocessing", "of the images that the weights were trained on"
    )
    group.add_argument(
        "--image-size", type=int, default=IMAGENET.image_size, help="pixels (default: 224)"
    )
    size = group.add_mutually_exclusive_group()
    size.add_argument(
        "--shorter-side",
        type=int,
        default=IMAGENET.shorter_side,
        help="pixels, before the middle is cut out (default: 256; 232 for V2 weights)",
    )
    size.add_argument(
        "--crop-ratio", type=float, help="timm's crop_pct: image size over shorter side"
    )
    for name in ("mean", "std"):
        default = getattr(IMAGENET, name)
        group.add_argument(
            f"--{name}",
            type=float,
            nargs="+",
            default=default,
            help=f"of each channel, in [0, 1] (default: {' '.join(map(str, default))})",
        )
    group.add_argument(
        "--interpolation",
        default=IMAGENET.interpolation,
        choices=list(INTERPOLATIONS),
        help="when resizing (default: bilinear)",
    )


def _preprocessing(parsed: argparse.Namespace) -> ImagePreprocessing:
    shorter_side = parsed.shorter_side
    if parsed.crop_ratio is not None:
        if not 0 < parsed.crop_ratio <= 1:
            raise ValueError(f"--crop-ratio must be in (0, 1], but is {parsed.crop_ratio}")
        # As timm does, downwards.
        shorter_side = int(parsed.image_size / parsed.crop_ratio)
    return ImagePreprocessing(
        image_size=parsed.image_size,
        shorter_side=shorter_side,
        mean=tuple(parsed.mean),
        std=tuple(parsed.std),
        interpolation=parsed.interpolation,
    )


def _add_method(parser: argparse.ArgumentParser, *, required: bool) -> None:
    what = "replaces all convolutions but the first: falcon, ..."
    parser.add_argument("--method", required=required, help=what)
    parser.add_argument("--rank", help="of the method: a number, or full")


def _convert(parsed: argparse.Namespace) -> None:
    stored = convert_file(
        parsed.weights,
        parsed.out,
        arch=parsed.arch,
        classes=parsed.classes,
        method=_method(parsed.method, parsed.rank),
        head=parsed.head,
        key=parsed.key,
        preprocessing=_preprocessing(parsed),
    )
    _tell(stored, parsed.out)


def _compress(parsed: argparse.Namespace) -> None:
    method = _method(parsed.method, parsed.rank)
    require_absent(user_path(parsed.out))
    if parsed.batches < 1:
        raise ValueError(f"--batches must be 1 or more, but is {parsed.batches}")
    stored = load_stored(parsed.checkpoint)
    dataset = load_data(parsed, stored.description) if parsed.data else None
    small = compressed(stored, method, keep=parsed.keep)
    if dataset is not None:
        inputs = training_inputs(parsed, dataset, small.description, parsed.batches)
        small = Stored(
            model=reestimate_batchnorm(small.model, inputs),
            plan=small.plan,
            description=small.description,
        )
    save_stored(parsed.out, small)
    _tell(small, parsed.out)


def _tell(stored: Stored, out: str) -> None:
    if stored.plan.replaced:
        show(stored.plan)
    print(out)


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
