"""Parts of the sentences that say what is wrong with data."""

from __future__ import annotations

from collections.abc import Iterable

_LISTED = 3


def one_line(error: BaseException) -> str:
    r"""Returns what an error says, on one line, or the name of its kind if it says nothing.

    >>> one_line(ValueError("bad\n  news")), one_line(EOFError())
    ('bad news', 'EOFError')

    Args:
        error: the error.

    Returns:
        the text.
    """
    return " ".join(str(error).split()) or type(error).__name__


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
