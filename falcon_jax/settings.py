"""Numbers and names that settings may have, and what to say of those they may not."""

import difflib
import math
from collections.abc import Iterable
from typing import Any, TypeGuard

import numpy as np


def no_such(kind: str, name: str, known: Iterable[str]) -> str:
    """Return a sentence that lists the known names, and the nearest.

    >>> no_such("method", "falcn", ["cp", "falcon"])
    "no method is called 'falcn'; there are cp, falcon. Did you mean 'falcon'?"
    """
    near = _nearest(name, known)
    hint = f" Did you mean {near!r}?" if near else ""
    return f"no {kind} is called {name!r}; there are {', '.join(known)}.{hint}"


def unknown_field(dotted: str, value: str, known: Iterable[str]) -> str:
    """Return a sentence on a field of a config whose value, or part of whose name, is not known.

    >>> unknown_field("config.data.source", "digit", ["digits", "idx"])
    "config.data.source: there is no 'digit'; there are digits, idx; did you mean 'digits'?"
    """
    near = _nearest(value, known)
    hint = f"; did you mean {near!r}?" if near else ""
    listed = ", ".join(known) or "no fields below it"
    return f"{dotted}: there is no {value!r}; there are {listed}{hint}"


def _nearest(name: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(str(name), list(known), n=1)), None)


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
