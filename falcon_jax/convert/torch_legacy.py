"""The files that torch.save wrote before version 1.6: pickles, then storages, one after another.

Most of torchvision's VGG weights are still given away in this format.
"""

import mmap
import pathlib
from typing import Any

import numpy as np

from falcon_jax.convert.torch_pickle import Storage, Tensor, read_pickle
from falcon_jax.convert.torch_tensors import elements_of, state_dict_of, view_of

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


def read_torch_legacy(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Return the state dict of a file that torch.save wrote before version 1.6.

    The file has five pickles (a magic number, the version of the protocol, facts about the machine,
    the content, the keys of the storages), then every storage: its number of elements, its bytes.

    Args:
        path: the file.

    Returns:
        Arrays by name, read-only; those that share a storage in the file share it here, too.

    Raises:
        ValueError: if it is another pickle, is damaged, or holds anything that is no tensor.
    """
    # A map reads no more than there is, whatever length the file claims.
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as file:
        if read_pickle(file) != _MAGIC:
            raise ValueError("it is a pickle, but not one of torch.save")
        version, machine = read_pickle(file), read_pickle(file)
        if version != _PROTOCOL or not isinstance(machine, dict):
            raise ValueError(f"it is of protocol {version!r} of torch.save; {_PROTOCOL} is read")
        order = "little" if machine.get("little_endian", True) is True else "big"
        tensors = state_dict_of(read_pickle(file))
        keys = read_pickle(file)
        storages = _storages(tensors, keys)
        arrays = {s: _read_storage(file, s, order) for s in storages}
    return {name: view_of(tensor, arrays[tensor.storage]) for name, tensor in tensors.items()}


def _storages(tensors: dict[str, Tensor], keys: Any) -> list[Storage]:
    """Return the storages in the order of the file."""
    named = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    if len(named) < len({tensor.storage for tensor in tensors.values()}):
        raise ValueError("it is damaged: two storages have one key")
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(named):
        raise ValueError("it is damaged: its storages are not those that its tensors need")
    return [named[key] for key in keys]


def _read_storage(file: mmap.mmap, storage: Storage, order: str) -> np.ndarray:
    count = int.from_bytes(file.read(8), "little", signed=True)
    expected = storage.size * storage.dtype.itemsize
    left = len(file) - file.tell()
    if count != storage.size or expected > left:
        raise ValueError(
            f"it is truncated or damaged: storage {storage.key} must have {storage.size} elements; "
            f"it has {count}, with {left} bytes to come"
        )
    return elements_of(file.read(expected), storage.dtype, order)
