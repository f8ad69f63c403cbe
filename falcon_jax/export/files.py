"""The formats, the packages that some of them need, and files that stand whole or not at all."""

import contextlib
import importlib
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from falcon_jax.paths import user_path

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


def optional(module: str, what: str, extra: str) -> Any:
    """Import a package of an optional extra.

    Args:
        module: its name.
        what: needs it; the beginning of a sentence.
        extra: of falcon-jax that brings it.

    Raises:
        ImportError: saying what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f'{what} needs {package} ({error}): pip install "falcon-jax[{extra}]"'
        ) from None


def require_packages(formats: Iterable[str]) -> None:
    """Raise unless the packages that some formats need are installed.

    Raises:
        ImportError: saying what to install.
    """
    for name in formats:
        for module, extra in _PACKAGES.get(name, ()):
            optional(module, f"the format {name!r}", extra)


def writable(path: str | os.PathLike[str]) -> pathlib.Path:
    """Return the absolute path of a file that is to be written.

    Raises:
        OSError: if there is no such directory, or nothing can be written there.
    """
    file = pathlib.Path(os.path.abspath(user_path(path)))
    if not file.parent.is_dir():
        raise FileNotFoundError(f"there is no directory {file.parent} to write {file.name} into.")
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a directory; give the path of a file.")
    if not os.access(file.parent, os.W_OK):
        raise PermissionError(f"{file.name} cannot be written into {file.parent}: no permission.")
    return file


@contextlib.contextmanager
def writing(file: pathlib.Path) -> Iterator[pathlib.Path]:
    """Write a file beside its place; what is written beside it goes with it.

    Args:
        file: where it is to stand.

    Yields:
        Where to write it.
    """
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder:
        unfinished = pathlib.Path(folder) / file.name
        yield unfinished
        # What the file refers to comes first.
        for made in sorted(unfinished.parent.iterdir(), key=lambda made: made == unfinished):
            made.replace(file.parent / made.name)
