"""Tensors of a state dict: which they are, and their elements."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from falcon_jax.convert.torch_pickle import Tensor

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")


def state_dict_of(content: Any) -> dict[str, Tensor]:
    """Return the tensors of a state dict, out of the dictionary around it if there is one.

    Args:
        content: what a pickle holds.

    Returns:
        Tensors by name, without the prefix ``module.`` that ``DataParallel`` leaves.

    Raises:
        ValueError: if there is no state dict, or anything in it that is no tensor.
    """
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
