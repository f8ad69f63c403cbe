"""What counts as a number in settings."""

import math
from typing import Any, TypeGuard

import numpy as np


def is_number(value: Any) -> TypeGuard[int | float]:
    """Say whether a value is a finite number; True and False are none.

    >>> [is_number(value) for value in (1, 0.5, True, "1", float("nan"))]
    [True, True, False, False, False]
    """
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def is_whole(value: Any) -> TypeGuard[int]:
    """Say whether a value is a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def as_whole(value: Any) -> int | None:
    """Return a whole number, NumPy's too, as a Python int; None for anything else.

    >>> [as_whole(value) for value in (3, np.int64(3), 3.0, True, "3")]
    [3, 3, None, None, None]
    """
    return int(value) if is_whole(value) or isinstance(value, np.integer) else None


def as_wholes(values: Any) -> tuple[int | None, ...] | None:
    """Return the entries of a sequence or an array, each by `as_whole`; None if it is neither."""
    if isinstance(values, (tuple, list)) or (isinstance(values, np.ndarray) and values.ndim):
        return tuple(map(as_whole, values))
    return None
