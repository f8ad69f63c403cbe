"""Parts of the sentences that say what is wrong with data."""

from __future__ import annotations

from collections.abc import Iterable

_LISTED = 3


def some_of(names: Iterable[str]) -> str:
    """Returns the first three of some names and the number of the others.

    >>> some_of("abcde"), some_of("abc")
    ('a, b, c and 2 more', 'a, b, c')

    Args:
        names: the names.

    Returns:
        the text.
    """
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
