"""State dicts from PyTorch's files, without PyTorch."""

import os

import numpy as np

from falcon_jax.convert.safetensors_file import read_safetensors, starts_like_safetensors
from falcon_jax.convert.torch_archive import read_torch_archive
from falcon_jax.convert.torch_legacy import read_torch_legacy
from falcon_jax.paths import user_path

_ZIP = b"PK\x03\x04"
# Of protocols 2 and newer, and the magic number of torch.save in protocols 0 and 1.
_PICKLES = (b"\x80", b"L1195470371")


def load_torch(path: str | os.PathLike[str], *, key: str | None = None) -> dict[str, np.ndarray]:
    """Return the state dict in a file of torch.save or in a safetensors file.

    Nothing in the file is run, whatever it holds: only tensors in dictionaries are read. Of a
    checkpoint the state dict is taken, under whatever name it is, and what is beside it does not
    matter. Prefixes that wrappers leave on every name (``module.``, ``_orig_mod.``, ``model.``,
    ``net.``, ``backbone.`` and the like, in any order) are taken off.

    Args:
        path: a ``.pth`` or ``.pt`` file of ``torch.save``, in the format of today or that from
            before version 1.6, or a ``.safetensors`` file. Its content says which, not its name.
        key: which state dict, if several could be meant: its path in the checkpoint, such as
            ``ema/state_dict``, the beginning of names, such as ``teacher``, or both; ``.`` is the
            outermost dictionary.

    Returns:
        Arrays by name, in PyTorch's layout, of float16, bfloat16 (of ml_dtypes), float32, float64,
        integers or bool.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it is no such file, is truncated or damaged, holds no or several state dicts,
            or the one chosen has entries that are no tensors.
    """
    path = user_path(path)
    with path.open("rb") as file:
        head = file.read(16)
    size = path.stat().st_size
    try:
        if head.startswith(_ZIP):
            return read_torch_archive(path, key)
        if starts_like_safetensors(head, size) or path.suffix == ".safetensors":
            return read_safetensors(path, key)
        if head.startswith(_PICKLES):
            return read_torch_legacy(path, key)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from None
    if head.startswith(b"version https://"):
        raise ValueError(
            f"{path} is a pointer of Git LFS. Fetch the file itself with git lfs pull."
        )
    what = "is empty" if size == 0 else "is neither a zip archive of torch.save nor safetensors"
    raise ValueError(f"{path} {what}. Give the .pth, .pt or .safetensors file of a state dict.")
