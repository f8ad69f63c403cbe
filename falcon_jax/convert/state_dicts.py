"""State dicts from files: PyTorch's, without PyTorch, and safetensors."""

import mmap
import os
import pathlib
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from falcon_jax.convert.torch_pickle import Inert, Storage, Tensor, read_pickle
from falcon_jax.paths import user_path
from falcon_jax.wording import listed, shown

_HOW = (
    "Save the weights alone, with torch.save(model.state_dict(), ...) or as .safetensors, from a "
    "program that can load this file"
)
# What wraps a model under an attribute of its own: DataParallel, torch.compile, Lightning, ...
_WRAPPERS = (
    *("module", "_orig_mod", "model", "net", "network", "backbone", "encoder", "student"),
    *("teacher", "ema", "ema_model", "model_ema", "base_model", "wrapped_model", "_forward_module"),
    "_fsdp_wrapped_module",
)
_WRAPPED_INSIDE = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PARAMETER = re.compile(
    r".*(\.|^)(weight|bias|running_mean|running_var)|[^.]+(\.[^.]+)+", re.DOTALL
)
_OF_TRAINING = re.compile(r".*(optim|sched|scaler|grad)", re.IGNORECASE | re.DOTALL)
_COUNTER = "n_averaged"


def _state_dict_of(content: Any, key: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of the state dict in a checkpoint.

    Args:
        content: what a pickle holds.
        key: which state dict, if several could be meant.

    Returns:
        Tensors by name, without the prefixes of wrappers.

    Raises:
        ValueError: if there is none, there are several, or anything in it that is no tensor.
    """
    found = dict(_dictionaries(content))
    chosen = _only_one(content, found) if key is None else _at(found, key)
    numbers = [name for name in chosen if not isinstance(name, str)]
    if numbers:
        raise ValueError(f"its state dict has names that are no text: {listed(numbers)}")
    strange = [
        f"{shown(name)} ({shown(value)})"
        for name, value in chosen.items()
        if not isinstance(value, Tensor)
    ]
    if strange:
        raise ValueError(
            f"its state dict has entries that are no tensors: {listed(strange)}. {_HOW}"
        )
    return _unwrapped(chosen)


def _unwrapped(named: Mapping[str, Any]) -> dict[str, Any]:
    """Return entries without the prefixes that wrappers leave on every name.

    Raises:
        ValueError: if two names become one.
    """
    named = dict(named.items())
    if any(name.startswith("module.") for name in named):
        # AveragedModel counts beside the module that it averages.
        named.pop(_COUNTER, None)
    short = {name: _WRAPPED_INSIDE.sub(r"\1", name) for name in named}
    while len(firsts := {name.partition(".")[0] for name in short.values()}) == 1:
        (first,) = firsts
        if first not in _WRAPPERS or not all("." in name for name in short.values()):
            break
        short = {name: rest.partition(".")[2] for name, rest in short.items()}
    if len(set(short.values())) < len(named):
        raise ValueError("two of its names differ in the prefixes of wrappers only")
    return {short[name]: value for name, value in named.items()}


def _below(named: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the entries whose names begin with a key, without it; empty if there are none."""
    prefix = key.replace("/", ".") + "."
    for names in (named, _unwrapped(named)):
        part = {n.removeprefix(prefix): v for n, v in names.items() if n.startswith(prefix)}
        if part:
            return part
    return {}


def _dictionaries(content: Any) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Yield every dictionary with its path, each once, however it is nested."""
    waiting: list[tuple[str, Any]] = [("", content)]
    seen: set[int] = set()
    while waiting:
        path, value = waiting.pop()
        if not isinstance(value, dict | list | tuple) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            yield path, value
        # A path longer than this is no place for a state dict.
        if len(path) > 200:
            continue
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        for name, item in reversed(items):
            if isinstance(item, dict | list | tuple):
                name = str(name)[:200]
                waiting.append((f"{path}/{name}" if path else name, item))


def _only_one(content: Any, found: Mapping[str, dict[Any, Any]]) -> dict[Any, Any]:
    plain = {path: names for path, names in found.items() if not _OF_TRAINING.match(path)}
    likely = {path: names for path, names in plain.items() if _has_parameters(names)}
    if not likely:
        likely = {path: names for path, names in plain.items() if _has_tensors(names)}
        # Without names that tell, the outermost one.
        likely = dict([min(likely.items(), key=lambda item: item[0].count("/"))]) if likely else {}
    if not likely:
        raise ValueError(_nothing_in(content))
    if len(likely) > 1:
        paths = [path or "." for path in likely]
        raise ValueError(
            f"it holds several state dicts: {listed(paths)}. Choose one: key={shown(paths[0])!r} "
            "(on the command line --key)"
        )
    return next(iter(likely.values()))


def _at(found: Mapping[str, dict[Any, Any]], key: str) -> dict[Any, Any]:
    path = key.strip("/").removeprefix("./")
    path = "" if path == "." else path
    if path in found:
        return found[path]
    # The rest of the key is the beginning of names.
    for outer, names in sorted(found.items(), key=lambda item: -len(item[0])):
        inside = path.removeprefix(f"{outer}/") if outer else path
        if outer and inside == path:
            continue
        part = _below({n: v for n, v in names.items() if isinstance(n, str)}, inside)
        if part:
            return part
    paths = [path or "." for path, names in found.items() if _has_tensors(names)]
    raise ValueError(f"it holds no {shown(key)}; tensors are in {listed(paths) or 'none'}")


def _has_tensors(names: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in names.values())


def _has_parameters(names: Mapping[Any, Any]) -> bool:
    return any(
        isinstance(value, Tensor) and isinstance(name, str) and _PARAMETER.fullmatch(name[:1000])
        for name, value in names.items()
    )


def _nothing_in(content: Any) -> str:
    items = content.items() if isinstance(content, dict) else [("", content)]
    models = [item for item in items if isinstance(item[1], Inert) and item[1].is_model]
    if models:
        name, model = models[0]
        where = f" under {shown(name)}" if name else ""
        load = f"torch.load(path, weights_only=False){f'[{shown(name)!r}]' if name else ''}"
        return (
            f"it holds a whole model{where}, an object of {model}, which only its own code can "
            f"read. Where that code is installed, save its weights: "
            f"torch.save({load}.state_dict(), 'weights.pth')"
        )
    if not isinstance(content, dict):
        what = type(content).__name__ if not isinstance(content, Inert) else shown(content)
        return f"it holds {what}, not a state dict. {_HOW}"
    held = [
        f"{shown(name)} ({shown(value)})"
        if not isinstance(value, int | float | str)
        else shown(name)
        for name, value in list(content.items())[:11]
    ]
    return f"it holds {listed(held) or 'nothing'}, but no tensors of a model. {_HOW}"


_DTYPES: Mapping[str, np.dtype] = MappingProxyType(
    {
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F32": np.dtype(np.float32),
        "F64": np.dtype(np.float64),
        "I8": np.dtype(np.int8),
        "I16": np.dtype(np.int16),
        "I32": np.dtype(np.int32),
        "I64": np.dtype(np.int64),
        "U8": np.dtype(np.uint8),
        "U16": np.dtype(np.uint16),
        "U32": np.dtype(np.uint32),
        "U64": np.dtype(np.uint64),
        "BOOL": np.dtype(np.bool_),
    }
)


def _starts_like_safetensors(head: bytes, file_size: int) -> bool:
    """Say whether a file can be in the safetensors format.

    Args:
        head: its first nine bytes or more.
        file_size: its number of bytes.
    """
    header_size = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and header_size <= file_size - 8


def _read_safetensors(path: pathlib.Path, key: str | None) -> dict[str, np.ndarray]:
    """Return the arrays of a safetensors file by name, without the prefixes of wrappers.

    Args:
        path: the file.
        key: the beginning of the names to take, without its dot; None for all.

    Raises:
        ValueError: if the file is damaged, has no such names, or elements of a type that is not
            read.
    """
    try:
        entries = dict(safetensors.deserialize(path.read_bytes()))
    except (safetensors.SafetensorError, ValueError, OverflowError) as error:
        raise ValueError(f"it is no intact safetensors file ({shown(error)})") from None
    if key is not None:
        found = _below(entries, key)
        if not found:
            beginnings = dict.fromkeys(name.partition(".")[0] for name in entries)
            raise ValueError(f"it holds no {shown(key)}; its names begin with {listed(beginnings)}")
        entries = found
    return {name: _array(name, entry) for name, entry in _unwrapped(entries).items()}


def _array(name: str, entry: Mapping[str, Any]) -> np.ndarray:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(
            f"its entry {shown(name)} is of type {entry['dtype']}; possible are "
            f"{', '.join(_DTYPES)}"
        )
    elements = np.frombuffer(entry["data"], np.uint8)
    try:
        return _typed(elements, _DTYPES[entry["dtype"]]).reshape(entry["shape"])
    except (ValueError, OverflowError):
        raise ValueError(f"its entry {shown(name)} has a shape that is too large") from None


def _typed(elements: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype == np.bool_:
        return elements != 0
    words = elements.view(f"<u{dtype.itemsize}")
    return words.astype(f"=u{dtype.itemsize}", copy=False).view(dtype)


def _elements_of(data: bytes, dtype: np.dtype, order: str) -> np.ndarray:
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


def _view_of(tensor: Tensor, elements: np.ndarray) -> np.ndarray:
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


def _read_torch_archive(path: pathlib.Path, key: str | None) -> dict[str, np.ndarray]:
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
    tensors = _state_dict_of(read_pickle(archive.read(entries["data.pkl"])).content, key)
    storages: dict[Storage, np.ndarray] = {}
    for tensor in tensors.values():
        storage = tensor.storage
        if storage not in storages:
            entry = _entry_of(storage, entries)
            storages[storage] = _elements_of(archive.read(entry), storage.dtype, order)
    return {name: _view_of(tensor, storages[tensor.storage]) for name, tensor in tensors.items()}


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


def _read_torch_legacy(path: pathlib.Path, key: str | None) -> dict[str, np.ndarray]:
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
        tensors = _state_dict_of(content.content, key)
        arrays = _arrays(file, keys.end, storages, tensors, order)
    return {name: _view_of(tensor, arrays[tensor.storage]) for name, tensor in tensors.items()}


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
            arrays[typed] = _elements_of(file[start : start + size], typed.dtype, order)
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

    >>> import tempfile
    >>> from safetensors.numpy import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"module.fc.weight": np.ones((2, 3), "f4")}, f"{folder}/a.safetensors")
    ...     load_torch(f"{folder}/a.safetensors")["fc.weight"].shape
    (2, 3)
    """
    path = user_path(path)
    with path.open("rb") as file:
        head = file.read(16)
    size = path.stat().st_size
    try:
        if head.startswith(_ZIP):
            return _read_torch_archive(path, key)
        if _starts_like_safetensors(head, size) or path.suffix == ".safetensors":
            return _read_safetensors(path, key)
        if head.startswith(_PICKLES):
            return _read_torch_legacy(path, key)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from None
    if head.startswith(b"version https://"):
        raise ValueError(
            f"{path} is a pointer of Git LFS. Fetch the file itself with git lfs pull."
        )
    what = "is empty" if size == 0 else "is neither a zip archive of torch.save nor safetensors"
    raise ValueError(f"{path} {what}. Give the .pth, .pt or .safetensors file of a state dict.")
