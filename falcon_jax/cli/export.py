"""The sub-command `export`: a stored model as a file that other programs run."""

import argparse
from typing import Any

from falcon_jax.cli.data import add_data_options, load_data, training_inputs
from falcon_jax.export.files import FORMATS, require_packages, writable
from falcon_jax.export.inference import AUTO, AXES
from falcon_jax.export.onnx_file import OPSET
from falcon_jax.export.stored import export_stored
from falcon_jax.paths import user_path
from falcon_jax.storage.models import load_stored


def add_export(commands: Any) -> None:
    """Add `export`: a stored model to ONNX, StableHLO, safetensors or a folder for the Hub.

    Args:
        commands: the sub-commands of the parser, as `add_subparsers` gives them.
    """
    text = "write a checkpoint as ONNX, StableHLO, safetensors or a folder for the Hub"
    parser = commands.add_parser("export", help=text, description=text + ".")
    parser.add_argument("checkpoint", help="made by convert, compress or train.py")
    parser.add_argument("--out", required=True, help="file to write; for the Hub, a folder")
    parser.add_argument(
        "--format",
        choices=list(FORMATS),
        help="int8 is ONNX with 8 bits, and needs --data (default: what --out ends with)",
    )
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--open",
        nargs="+",
        choices=AXES,
        help="sizes that stay open (default: batch, height and width if the model lets them be)",
    )
    sizes.add_argument("--fixed", action="store_true", help="no size stays open: one image")
    parser.add_argument(
        "--opset", type=int, default=OPSET, help=f"of ONNX, {OPSET} or later (default: {OPSET})"
    )
    add_data_options(parser, required=False)
    parser.add_argument(
        "--batches",
        type=int,
        default=8,
        help="for int8: training batches to calibrate on (default: 8)",
    )
    parser.set_defaults(run=_export)


def _export(parsed: argparse.Namespace) -> None:
    name = parsed.format or _format_of(parsed.out)
    require_packages([name])
    if name != "hub":
        writable(parsed.out)
    if (name == "int8") != bool(parsed.data):
        raise ValueError(
            "int8 is calibrated on images: give --data, too."
            if name == "int8"
            else f"--data is for int8; {name} needs no images."
        )
    if parsed.batches < 1:
        raise ValueError(f"--batches must be 1 or more, but is {parsed.batches}.")
    stored = load_stored(parsed.checkpoint)
    batches: Any = ()
    if name == "int8":
        dataset = load_data(parsed, stored.description)
        batches = training_inputs(parsed, dataset, stored.description, parsed.batches)
    open_sizes = () if parsed.fixed else parsed.open or AUTO
    print(
        export_stored(
            stored, name, parsed.out, batches=batches, open_sizes=open_sizes, opset=parsed.opset
        )
    )


def _format_of(out: str) -> str:
    """Return the format that a file's name ends with; a name without an ending is a folder."""
    name = user_path(out).name
    endings = {file.removeprefix("model"): known for known, file in FORMATS.items()}
    for ending in sorted(endings, key=len, reverse=True):
        if ending.startswith(".") and name.endswith(ending):
            return endings[ending]
    if "." not in name:
        return "hub"
    raise ValueError(
        f"--out {out!r} does not end with one of "
        f"{', '.join(e for e in endings if e.startswith('.'))}; give --format, too."
    )
