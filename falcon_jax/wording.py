"""Words of messages: fit to be shown in a line, lists cut short, lines of cells aligned."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_MOST_AXES = 64  # of a shape that is shown whole


def shown(value: Any, longest: int = 120) -> str:
    r"""Return a value in one line, what cannot be printed escaped, its middle left out if long.

    Of a container only its kind and size are told, whatever it holds: the text of a small file's
    nested tuples can be exponentially long. A shape is shown whole.

    >>> shown("two\nlines, a bell \x07 and bytes \udcff")
    'two lines, a bell \\x07 and bytes \\udcff'
    >>> shown("abcdefghijklmnopqrstuvwxyz", longest=11), shown([[1], [2]]), shown((2, 3))
    ('abcd ... yz', 'a list of 2', '(2, 3)')

    Args:
        value: a string, or anything that `str` makes one of.
        longest: characters of the result.
    """
    line = _one_line(_text(value), longest)
    if len(line) <= longest:
        return line
    head = (longest - 5) * 2 // 3
    return f"{line[:head]} ... {line[len(line) - (longest - 5 - head) :]}"


def listed(values: Iterable[Any], count: int = 10) -> str:
    """Return the first few values, as `shown` has them, and how many there are beside them.

    >>> listed("abcde", 3), listed("abc", 3)
    ('a, b, c and 2 more', 'a, b, c')
    """
    values = list(values)
    more = f" and {len(values) - count} more" if len(values) > count else ""
    return ", ".join(map(shown, values[:count])) + more


def reason(error: BaseException, longest: int = 300) -> str:
    """Return what an exception says, as `shown` has it; its kind if it says nothing."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return shown(f"{error.strerror}: {os.fsdecode(error.filename)}", longest)
    return shown(error, longest) or type(error).__name__


def _text(value: Any) -> str:
    if isinstance(value, tuple) and len(value) <= _MOST_AXES and all(type(v) is int for v in value):
        return str(value)
    if isinstance(value, dict | list | tuple | set | frozenset):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, bytes | bytearray):
        return "bytes"
    try:
        return str(value)
    except Exception as error:  # a library's own error that cannot be told, a number of millions
        return type(error).__name__


def _one_line(text: str, longest: int) -> str:
    if len(text) > 16 * longest:  # of megabytes not all is looked at
        text = f"{text[: 8 * longest]} {text[-8 * longest :]}"
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in " ".join(text.split())
    )


_LISTED = 3


def some_of(names: Iterable[str]) -> str:
    """Return the first three of some names and the number of the others.

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


def aligned(lines: Sequence[Sequence[str]], *, right: Sequence[int], rule: bool = False) -> str:
    """Return one line of text for each line of cells, two spaces between columns.

    Args:
        lines: equally many cells in each.
        right: the columns whose cells stand to the right; all others to the left.
        rule: whether a rule follows the first line; columns have at least three characters then.

    >>> print(aligned([("layer", "params"), ("conv", "9")], right=[1]))
    layer  params
    conv        9
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if rule:
        widths = [max(3, width) for width in widths]
        lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


_MOST_LINES = 20


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Return what is missing, unexpected, misshapen or of another type, a line each.

    Args:
        expected: arrays, or shapes and types, by name.
        found: likewise.

    Returns:
        The lines, indented; empty if there is no difference.

    >>> import jax.numpy as jnp
    >>> print(differences({"a": jnp.ones(2), "b": jnp.ones(3)}, {"a": jnp.ones(4)}))
      b is missing
      a has shape (4,) instead of (2,)
    """
    lines = [f"{name} is missing" for name in expected if name not in found]
    lines += [f"{name} is not expected" for name in found if name not in expected]
    for name in expected:
        if name not in found:
            continue
        if tuple(found[name].shape) != tuple(expected[name].shape):
            shapes = tuple(found[name].shape), tuple(expected[name].shape)
            lines.append(f"{name} has shape {shapes[0]} instead of {shapes[1]}")
        elif found[name].dtype != expected[name].dtype:
            lines.append(f"{name} is {found[name].dtype} instead of {expected[name].dtype}")
    if len(lines) > _MOST_LINES:
        lines = [*lines[:_MOST_LINES], f"and {len(lines) - _MOST_LINES} more"]
    return "\n".join(f"  {line}" for line in lines)
