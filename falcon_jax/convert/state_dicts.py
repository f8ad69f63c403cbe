"""Which dictionary in a file is the state dict that is meant; safetensors files."""

import pathlib
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from falcon_jax.convert.torch_pickle import Inert, Tensor
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


def state_dict_of(content: Any, key: str | None = None) -> dict[str, Tensor]:
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
    return unwrapped(chosen)


def unwrapped(named: Mapping[str, Any]) -> dict[str, Any]:
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


def below(named: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the entries whose names begin with a key, without it; empty if there are none."""
    prefix = key.replace("/", ".") + "."
    for names in (named, unwrapped(named)):
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
        part = below({n: v for n, v in names.items() if isinstance(n, str)}, inside)
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


def starts_like_safetensors(head: bytes, file_size: int) -> bool:
    """Say whether a file can be in the safetensors format.

    Args:
        head: its first nine bytes or more.
        file_size: its number of bytes.
    """
    header_size = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and header_size <= file_size - 8


def read_safetensors(path: pathlib.Path, key: str | None) -> dict[str, np.ndarray]:
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
        found = below(entries, key)
        if not found:
            beginnings = dict.fromkeys(name.partition(".")[0] for name in entries)
            raise ValueError(f"it holds no {shown(key)}; its names begin with {listed(beginnings)}")
        entries = found
    return {name: _array(name, entry) for name, entry in unwrapped(entries).items()}


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
