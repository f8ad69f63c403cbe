"""Stored models in the formats of other programs, by name: for configs and the command line."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from falcon_jax.export.files import optional
from falcon_jax.export.hub import save_pretrained
from falcon_jax.export.inference import AUTO
from falcon_jax.export.onnx_file import OPSET, onnx, onnx_int8
from falcon_jax.export.safetensors_file import safetensors
from falcon_jax.export.stablehlo_file import stablehlo
from falcon_jax.export.tflite_file import tflite
from falcon_jax.settings import no_such
from falcon_jax.storage.models import Stored

# What a file of each format is called beside a stored model; of the Hub, a folder.
FORMATS: Mapping[str, str] = MappingProxyType(
    {
        "onnx": "model.onnx",
        "int8": "model.int8.onnx",
        "stablehlo": "model.stablehlo",
        "tflite": "model.tflite",
        "safetensors": "model.safetensors",
        "hub": "hub",
    }
)
_PACKAGES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "onnx": (("onnx", "export"),),
    "int8": (("onnx", "export"), ("onnxruntime.quantization", "export")),
    "stablehlo": (("flatbuffers", "export"),),
    "tflite": (("litert_converter.converter_api_ext", "tflite"),),
    "hub": (("huggingface_hub", "hub"),),
}


def require_packages(formats: Iterable[str]) -> None:
    """Raise unless the packages that some formats need are installed.

    Raises:
        ImportError: saying what to install.
    """
    for name in formats:
        for module, extra in _PACKAGES.get(name, ()):
            optional(module, f"the format {name!r}", extra)


def export_stored(
    stored: Stored,
    name: str,
    path: str | os.PathLike[str],
    *,
    batches: Iterable[Any] = (),
    open_sizes: str | Sequence[str] = AUTO,
    opset: int = OPSET,
) -> str:
    """Write a stored model in a format.

    The description of the model, which says how images are prepared, goes into files of ONNX as
    metadata ``falcon_jax``.

    Args:
        stored: the model.
        name: of the format, out of `FORMATS`.
        path: of the file, or folder.
        batches: for ``int8``: images to calibrate on, as the model sees them.
        open_sizes: as in `falcon_jax.export.onnx`.
        opset: as there.

    Returns:
        What was written, as a text.

    Raises:
        ValueError: if there is no such format, or the model cannot be written in it.
        ImportError: if a package is not installed.
        OSError: if the file cannot be written.
    """
    if name not in FORMATS:
        raise ValueError(no_such("format", name, FORMATS))
    require_packages([name])
    model, sample = stored.model, stored.description.sample
    if name == "hub":
        save_pretrained(stored, path)
        return os.fspath(path)
    if name == "safetensors":
        return os.fspath(safetensors(model, path))
    if name == "tflite":
        return str(tflite(model, sample, path))
    if name == "stablehlo":
        return str(stablehlo(model, sample, path, open_sizes=open_sizes))
    metadata = {"falcon_jax": json.dumps(stored.description.to_json())}
    if name == "onnx":
        made = onnx(model, sample, path, open_sizes=open_sizes, opset=opset, metadata=metadata)
    else:
        made = onnx_int8(
            model,
            sample,
            path,
            batches,
            open_sizes=open_sizes,
            opset=opset,
            metadata=metadata,
        )
    return str(made)
