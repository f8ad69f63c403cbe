"""Names and values from a file, as a message may show them."""

from collections.abc import Iterable
from typing import Any

_LENGTH = 120
_COUNT = 10


def shown(value: Any) -> str:
    r"""Return a short, printable text for anything that a file can hold.

    Control characters are escaped, and of a container only its kind is told, whatever it holds.

    >>> shown("layer\x1b[2J")
    'layer\\x1b[2J'
    """
    if isinstance(value, tuple) and len(value) <= 64 and all(type(v) is int for v in value):
        text = str(value)
    elif isinstance(value, dict | list | tuple | set):
        return f"a {type(value).__name__} of {len(value)}"
    elif isinstance(value, bytes):
        return "bytes"
    else:
        text = value[: 2 * _LENGTH] if isinstance(value, str) else str(value)
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= _LENGTH else f"{text[: _LENGTH - 3]}..."


def listed(values: Iterable[Any], count: int = _COUNT) -> str:
    """Return the first few values and how many there are beside them."""
    values = list(values)
    more = f" and {len(values) - count} more" if len(values) > count else ""
    return ", ".join(map(shown, values[:count])) + more
