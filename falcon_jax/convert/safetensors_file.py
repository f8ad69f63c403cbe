"""Files in the safetensors format."""

import pathlib
from collections.abc import Mapping
from types import MappingProxyType

import ml_dtypes
import numpy as np
import safetensors

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


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Return the arrays of a safetensors file by name.

    Args:
        path: the file.

    Raises:
        ValueError: if the file is damaged, or has elements of a type that is not read.
    """
    try:
        entries = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"it is no intact safetensors file ({error})") from None
    named = {}
    for name, entry in entries:
        if entry["dtype"] not in _DTYPES:
            raise ValueError(
                f"its entry {name} is of type {entry['dtype']}; possible are {', '.join(_DTYPES)}"
            )
        elements = np.frombuffer(entry["data"], np.uint8)
        named[name] = _typed(elements, _DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return named


def _typed(elements: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype == np.bool_:
        return elements != 0
    words = elements.view(f"<u{dtype.itemsize}")
    return words.astype(f"=u{dtype.itemsize}", copy=False).view(dtype)
