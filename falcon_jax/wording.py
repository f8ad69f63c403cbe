"""Words that come from elsewhere, fit to be shown: one line, not long, no terminal escapes."""

import os
from typing import Any

_LONGEST = 1000  # characters of a message


def shown(text: Any, longest: int = _LONGEST) -> str:
    r"""Return a text in one line, what cannot be printed escaped, its middle left out if long.

    >>> shown("two\nlines, a bell \x07 and bytes \udcff")
    'two lines, a bell \\x07 and bytes \\udcff'
    >>> shown("abcdefghijklmnopqrstuvwxyz", longest=11)
    'abcd ... yz'

    Args:
        text: a string, or anything that `str` makes one of.
        longest: characters of the result.
    """
    try:
        words = str(text)
    except Exception as error:  # a library's own error that cannot be told
        words = type(error).__name__
    if len(words) > 16 * longest:  # of megabytes not all is looked at
        words = f"{words[: 8 * longest]} {words[-8 * longest :]}"
    line = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in " ".join(words.split())
    )
    if len(line) <= longest:
        return line
    head = (longest - 5) * 2 // 3
    return f"{line[:head]} ... {line[len(line) - (longest - 5 - head) :]}"


def reason(error: BaseException, longest: int = 300) -> str:
    """Return what an exception says, as `shown` has it; its kind if it says nothing."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return shown(f"{error.strerror}: {os.fsdecode(error.filename)}", longest)
    return shown(error, longest) or type(error).__name__
