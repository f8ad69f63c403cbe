"""Numbers and names that settings may have, and what to say of those they may not."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard, TypeVar

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


T = TypeVar("T")
# Gets a field's name, its value and the whole object; returns what is wrong with it.
Check = Callable[[str, Any, Any], str | None]
_CHECK = "check"


def checked(default: T, check: Check) -> T:
    """Return a field of a dataclass with its default and its check, which `check_fields` does.

    Args:
        default: its value if none is given.
        check: made by `must_be`, `at_least`, `one_of`, `named` or `each`.
    """
    return dataclasses.field(default=default, metadata={_CHECK: check})


def check_fields(settings: Any) -> None:
    """Raise unless every field of a dataclass passes its check.

    Raises:
        ValueError: with the name of the field, what it may be and what it is.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Stay:
    ...     nights: int = checked(1, at_least(1))
    ...     room: str = checked("single", one_of(("single", "double")))
    >>> check_fields(Stay(nights=2))
    >>> check_fields(Stay(nights=0))
    Traceback (most recent call last):
    ...
    ValueError: nights must be 1 or more, but is 0
    """
    for field in dataclasses.fields(settings):
        check = field.metadata.get(_CHECK)
        problem = check and check(field.name, getattr(settings, field.name), settings)
        if problem:
            raise ValueError(problem)


def must_be(need: str, good: Callable[[Any, Any], bool]) -> Check:
    """Return a check whose message says what is needed.

    Args:
        need: what follows "must be".
        good: gets the value and the whole object.
    """

    def check(name: str, value: Any, whole: Any) -> str | None:
        return None if good(value, whole) else f"{name} must be {need}, but is {value!r}"

    return check


def at_least(least: int) -> Check:
    """Return a check for numbers of at least so much."""
    return must_be(f"{least} or more", lambda value, _: value >= least)


def one_of(names: Iterable[str]) -> Check:
    """Return a check for one of a few names."""
    known = tuple(names)
    return must_be(f"one of {', '.join(known)}", lambda value, _: value in known)


def named(names: Iterable[str]) -> Check:
    """Return a check for one of many names, whose message names the nearest."""
    known = tuple(names)
    return lambda name, value, _: None if value in known else unknown_field(name, value, known)


def each(check: Check) -> Check:
    """Return a check for every entry of a field; the message is about the first that fails."""
    return lambda name, values, whole: next(
        filter(None, (check(name, value, whole) for value in values)), None
    )


@contextmanager
def below(prefix: str) -> Iterator[None]:
    """Put the name of a group before the message of a ValueError that something in it raises."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None
