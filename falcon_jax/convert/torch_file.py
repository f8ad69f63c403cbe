"""State dicts from PyTorch's files, without PyTorch."""

import os
import pathlib

import numpy as np

from falcon_jax.convert.safetensors_file import read_safetensors, starts_like_safetensors
from falcon_jax.convert.torch_archive import read_torch_archive
from falcon_jax.convert.torch_legacy import read_torch_legacy

_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"


def load_torch(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return the state dict in a file of torch.save or in a safetensors file.

    Nothing in the file is run, whatever it holds: only dictionaries of tensors are read. A
    dictionary around the state dict (``{"state_dict": ...}``, ``{"model": ...}``) is taken off, and
    so is the prefix ``module.`` that ``DataParallel`` leaves on every name.

    Args:
        path: a ``.pth`` or ``.pt`` file of ``torch.save``, in the format of today or that from
            before version 1.6, or a ``.safetensors`` file. Its content says which, not its name.

    Returns:
        Arrays by name, in PyTorch's layout, of float16, bfloat16 (of ml_dtypes), float32, float64,
        integers or bool.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it is no such file, is truncated or damaged, or holds anything but tensors,
            naming it.
    """
    path = pathlib.Path(path)
    with path.open("rb") as file:
        head = file.read(16)
    size = path.stat().st_size
    try:
        if head.startswith(_ZIP):
            return read_torch_archive(path)
        if starts_like_safetensors(head, size) or path.suffix == ".safetensors":
            return read_safetensors(path)
        if head.startswith(_PICKLE):
            return read_torch_legacy(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from None
    what = "is empty" if size == 0 else "is neither a zip archive of torch.save nor safetensors"
    raise ValueError(f"{path} {what}. Give the .pth, .pt or .safetensors file of a state dict.")
