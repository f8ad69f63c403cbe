"""Paths as people write them."""

from __future__ import annotations

import os
from pathlib import Path


def user_path(path: str | os.PathLike[str]) -> Path:
    """Return a path with the home directory in place of a ``~`` or ``~user`` at its beginning.

    Shells do that for a word of its own, but not for ``--out=~/x``. Variables are left alone.

    >>> user_path("results/~").as_posix()
    'results/~'

    Args:
        path: the path.

    Raises:
        ValueError: if there is no such home directory.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{os.fspath(path)!r} begins with {Path(path).parts[0]}, but no such home directory is "
            "known; write the whole path, from / on"
        ) from None
