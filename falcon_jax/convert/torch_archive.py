"""The zip files of torch.save: a pickle, and an entry for every storage of tensors."""

import pathlib
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from falcon_jax.convert.torch_pickle import Storage, Tensor, read_pickle

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
_LARGEST_PICKLE = 2**24
_DAMAGES = (
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    EOFError,
    KeyError,
    OverflowError,
    struct.error,
)


def read_torch_archive(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Return the state dict of a zip file that torch.save wrote.

    Args:
        path: the file.

    Returns:
        Arrays by name. They are read-only views: those that share a storage in the file share it
        here, too.

    Raises:
        ValueError: if the file is damaged, holds anything that is no tensor, or is compressed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive, path.stat().st_size)
    except _DAMAGES as error:
        raise ValueError(f"its zip archive is truncated or damaged ({error})") from None


def _read(archive: zipfile.ZipFile, file_size: int) -> dict[str, np.ndarray]:
    entries = _entries(archive, file_size)
    if entries["data.pkl"].file_size > _LARGEST_PICKLE:
        raise ValueError(f"its pickle is larger than {_LARGEST_PICKLE} bytes")
    order = "little"
    if "byteorder" in entries:
        order = archive.read(entries["byteorder"]).decode("ascii", "replace")
        if order not in ("little", "big"):
            raise ValueError(f"its byte order is {order!r}, neither 'little' nor 'big'")
    tensors = _tensors(read_pickle(archive.read(entries["data.pkl"])))
    storages: dict[Storage, np.ndarray] = {}
    for tensor in tensors.values():
        storage = tensor.storage
        if storage not in storages:
            entry = _entry_of(storage, entries)
            storages[storage] = _elements(archive.read(entry), storage.dtype, order)
    return {name: _view(tensor, storages[tensor.storage]) for name, tensor in tensors.items()}


def _entries(archive: zipfile.ZipFile, file_size: int) -> dict[str, zipfile.ZipInfo]:
    """Return the entries by name, without the folder that all of them are in."""
    infos = archive.infolist()
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise ValueError(
                f"its entry {info.filename} is compressed, which torch.save never does. "
                "Load it with torch and save it again with torch.save"
            )
    # Entries that share bytes of the file would let a small file fill the memory.
    if sum(info.file_size for info in infos) > file_size:
        raise ValueError("its zip archive is damaged: the entries are larger than the file")
    folders = [i.filename.removesuffix("data.pkl") for i in infos if _is_pickle(i.filename)]
    if len(folders) != 1:
        raise ValueError("it is a zip file, but not one of torch.save: there is no data.pkl in it")
    entries = {info.filename.removeprefix(folders[0]): info for info in infos}
    if any(name.startswith("code/") for name in entries):
        raise ValueError("it is a TorchScript program. Save its state_dict() with torch.save")
    return entries


def _is_pickle(name: str) -> bool:
    return name.count("/") == 1 and name.endswith("/data.pkl")


def _tensors(content: Any) -> dict[str, Tensor]:
    """Return the tensors of a state dict, out of the dictionary around it if there is one."""
    if not isinstance(content, dict):
        raise ValueError(f"it holds {type(content).__name__}, not a state dict")
    if not any(isinstance(value, Tensor) for value in content.values()):
        content = _unwrapped(content)
    numbers = [str(name) for name in content if not isinstance(name, str)]
    if numbers:
        raise ValueError(f"its state dict has names that are no text: {', '.join(numbers[:5])}")
    strange = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if strange:
        raise ValueError(
            f"its state dict has entries that are no tensors: {', '.join(strange[:5])}. "
            "Save model.state_dict() alone"
        )
    if all(name.startswith("module.") for name in content):
        return {name.removeprefix("module."): value for name, value in content.items()}
    return content


def _unwrapped(content: Mapping[Any, Any]) -> dict[Any, Any]:
    for name in _WRAPPERS:
        inner = content.get(name)
        if isinstance(inner, dict) and any(isinstance(v, Tensor) for v in inner.values()):
            return inner
    held = ", ".join(map(str, list(content)[:5])) or "nothing"
    raise ValueError(
        f"it holds {held}, but no tensors, neither by themselves nor under "
        f"{', '.join(_WRAPPERS)}. Save model.state_dict() alone"
    )


def _entry_of(storage: Storage, entries: Mapping[str, zipfile.ZipInfo]) -> zipfile.ZipInfo:
    name = f"data/{storage.key}"
    if name not in entries:
        raise ValueError(f"it is damaged: {name} is missing")
    expected = storage.size * storage.dtype.itemsize
    if entries[name].file_size != expected:
        raise ValueError(
            f"it is damaged: {name} has {entries[name].file_size} bytes instead of {expected}"
        )
    return entries[name]


def _elements(data: bytes, dtype: np.dtype, order: str) -> np.ndarray:
    given = np.dtype(f"{'<' if order == 'little' else '>'}u{dtype.itemsize}")
    words = np.ndarray(len(data) // given.itemsize, given, buffer=data)
    if dtype == np.bool_:
        return words != 0
    return words.astype(given.newbyteorder("="), copy=False).view(dtype)


def _view(tensor: Tensor, elements: np.ndarray) -> np.ndarray:
    if 0 in tensor.shape:
        return np.empty(tensor.shape, elements.dtype)
    view = np.ndarray(
        tensor.shape,
        elements.dtype,
        buffer=elements,
        offset=tensor.offset * elements.itemsize,
        strides=tuple(step * elements.itemsize for step in tensor.strides),
    )
    view.flags.writeable = False
    return view
