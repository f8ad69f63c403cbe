"""Elements of the tensors of a state dict."""

import numpy as np

from falcon_jax.convert.torch_pickle import Tensor


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
