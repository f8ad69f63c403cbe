"""The files that torch.save wrote before version 1.6: pickles, then storages, one after another.

Most of torchvision's VGG weights are still given away in this format.
"""

import mmap
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from falcon_jax.convert.shown import shown
from falcon_jax.convert.state_dicts import state_dict_of
from falcon_jax.convert.torch_pickle import Storage, Tensor, read_pickle
from falcon_jax.convert.torch_tensors import elements_of, view_of

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


def read_torch_legacy(path: pathlib.Path, key: str | None) -> dict[str, np.ndarray]:
    """Return the state dict of a file that torch.save wrote before version 1.6.

    The file has five pickles (a magic number, the version of the protocol, facts about the machine,
    the content, the keys of the storages), then every storage: its number of elements, its bytes.

    Args:
        path: the file.
        key: which state dict, if several could be meant.

    Returns:
        Arrays by name, read-only; those that share a storage in the file share it here, too.

    Raises:
        ValueError: if it is another pickle, is damaged, or holds no such state dict.
    """
    # A map reads no more than there is, whatever length the file claims.
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as file:
        magic = read_pickle(file)
        if magic.content != _MAGIC:
            raise ValueError("it is a pickle, but not one of torch.save")
        version = read_pickle(file, magic.end)
        machine = read_pickle(file, version.end)
        if version.content != _PROTOCOL or not isinstance(machine.content, dict):
            raise ValueError(
                f"it is of protocol {shown(version.content)} of torch.save; {_PROTOCOL} is read"
            )
        order = "little" if machine.content.get("little_endian", True) is True else "big"
        content = read_pickle(file, machine.end)
        keys = read_pickle(file, content.end)
        storages = _in_order(content.storages, keys.content)
        tensors = state_dict_of(content.content, key)
        arrays = _arrays(file, keys.end, storages, tensors, order)
    return {name: view_of(tensor, arrays[tensor.storage]) for name, tensor in tensors.items()}


def _in_order(storages: Mapping[str, Storage], keys: Any) -> list[Storage]:
    """Return the storages in the order of the file."""
    known = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not known or sorted(keys) != sorted(storages):
        raise ValueError("it is damaged: its storages are not those that its tensors need")
    return [storages[key] for key in keys]


def _arrays(
    file: mmap.mmap,
    start: int,
    storages: Sequence[Storage],
    tensors: Mapping[str, Tensor],
    order: str,
) -> dict[Storage, np.ndarray]:
    """Return the elements of the storages that are needed; the others are skipped."""
    needed = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    arrays = {}
    for storage in storages:
        count = int.from_bytes(file[start : start + 8], "little", signed=True)
        start += 8
        size = storage.size * storage.dtype.itemsize
        left = max(0, len(file) - start)
        if count != storage.size or size > left:
            raise ValueError(
                f"it is truncated or damaged: storage {shown(storage.key)} must have "
                f"{storage.size} elements; it has {count}, with {left} bytes to come"
            )
        if storage.key in needed:
            typed = needed[storage.key]
            arrays[typed] = elements_of(file[start : start + size], typed.dtype, order)
        start += size
    return arrays
