"""Files in the safetensors format."""

import pathlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from falcon_jax.convert.shown import listed, shown
from falcon_jax.convert.state_dicts import below, unwrapped

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
