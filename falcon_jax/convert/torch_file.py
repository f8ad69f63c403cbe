"""State dicts from PyTorch's files, without PyTorch."""

import mmap
import os
import pathlib
import struct
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from falcon_jax.convert.state_dicts import read_safetensors, starts_like_safetensors, state_dict_of
from falcon_jax.convert.torch_pickle import Storage, Tensor, read_pickle
from falcon_jax.paths import user_path
from falcon_jax.wording import shown


def elements_of(data: bytes, dtype: np.dtype, order: str) -> np.ndarray:
    """Return the elements of a storage.

    Args:
        data: its bytes.
        dtype: of an element.
        order: of the bytes of an element, ``little`` or ``big``.
    """
    given = np.dtype(f"{'<' if order == 'little' else '>'}u{dtype.itemsize}")
    words = np.ndarray(len(data) // given.itemsize, given, buffer=data)
    if dtype == np.bool_:
        return words != 0
    return words.astype(given.newbyteorder("="), copy=False).view(dtype)


def view_of(tensor: Tensor, elements: np.ndarray) -> np.ndarray:
    """Return a tensor as a read-only view of the elements of its storage."""
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
