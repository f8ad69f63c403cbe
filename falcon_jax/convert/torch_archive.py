"""The zip files of torch.save: a pickle, and an entry for every storage of tensors."""

import pathlib
import struct
import zipfile
from collections.abc import Mapping

import numpy as np

from falcon_jax.convert.torch_pickle import Storage, read_pickle
from falcon_jax.convert.torch_tensors import elements_of, state_dict_of, view_of

_LARGEST_PICKLE = 2**24
# What zipfile raises for damaged files; NotImplementedError for versions that it does not know.
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
    tensors = state_dict_of(read_pickle(archive.read(entries["data.pkl"])))
    storages: dict[Storage, np.ndarray] = {}
    for tensor in tensors.values():
        storage = tensor.storage
        if storage not in storages:
            entry = _entry_of(storage, entries)
            storages[storage] = elements_of(archive.read(entry), storage.dtype, order)
    return {name: view_of(tensor, storages[tensor.storage]) for name, tensor in tensors.items()}


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
