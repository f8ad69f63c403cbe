"""The zip files of torch.save: a pickle, and an entry for every storage of tensors."""

import pathlib
import struct
import zipfile
from collections.abc import Mapping

import numpy as np

from falcon_jax.convert.shown import shown
from falcon_jax.convert.state_dicts import state_dict_of
from falcon_jax.convert.torch_pickle import Storage, read_pickle
from falcon_jax.convert.torch_tensors import elements_of, view_of

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


def read_torch_archive(path: pathlib.Path, key: str | None) -> dict[str, np.ndarray]:
    """Return the state dict of a zip file that torch.save wrote.

    Args:
        path: the file.
        key: which state dict, if several could be meant.

    Returns:
        Arrays by name. They are read-only views: those that share a storage in the file share it
        here, too.

    Raises:
        ValueError: if the file is damaged, is compressed, or holds no such state dict.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive, path.stat().st_size, key)
    except _DAMAGES as error:
        raise ValueError(f"its zip archive is truncated or damaged ({shown(error)})") from None


def _read(archive: zipfile.ZipFile, file_size: int, key: str | None) -> dict[str, np.ndarray]:
    entries = _entries(archive, file_size)
    order = "little"
    if "byteorder" in entries:
        order = archive.read(entries["byteorder"]).decode("ascii", "replace")
        if order not in ("little", "big"):
            raise ValueError(f"its byte order is {shown(order)}, neither 'little' nor 'big'")
    tensors = state_dict_of(read_pickle(archive.read(entries["data.pkl"])).content, key)
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
    _require_torch_save([info.filename for info in infos])
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise ValueError(
                f"its entry {shown(info.filename)} is compressed, which torch.save never does. "
                "Load it with torch and save it again with torch.save"
            )
    # Entries that share bytes of the file would let a small file fill the memory.
    if sum(info.file_size for info in infos) > file_size:
        raise ValueError("its zip archive is damaged: the entries are larger than the file")
    folders = [i.filename.removesuffix("data.pkl") for i in infos if _is_pickle(i.filename)]
    if len(folders) != 1:
        raise ValueError("it is a zip file, but not one of torch.save: there is no data.pkl in it")
    return {info.filename.removeprefix(folders[0]): info for info in infos}


def _require_torch_save(names: list[str]) -> None:
    """Raise for zip files of other programs, and of other parts of PyTorch."""
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        raise ValueError(
            "it is a TorchScript program of torch.jit.save, not a state dict. Save its weights: "
            "torch.save(torch.jit.load(path).state_dict(), 'weights.pth')"
        )
    if "archive_format" in inner or "serialized_exported_program.json" in names:
        raise ValueError(
            "it is a program of torch.export, not a state dict. Save its weights: "
            "torch.save(dict(torch.export.load(path).state_dict), 'weights.pth')"
        )


def _is_pickle(name: str) -> bool:
    return name.count("/") == 1 and name.endswith("/data.pkl")


def _entry_of(storage: Storage, entries: Mapping[str, zipfile.ZipInfo]) -> zipfile.ZipInfo:
    name = f"data/{storage.key}"
    label = shown(name)
    if name not in entries:
        raise ValueError(f"it is damaged: {label} is missing")
    expected = storage.size * storage.dtype.itemsize
    if entries[name].file_size != expected:
        raise ValueError(
            f"it is damaged: {label} has {entries[name].file_size} bytes instead of {expected}"
        )
    return entries[name]
