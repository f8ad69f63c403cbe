"""Paths as people write them, files that stand whole or not at all, and JSON from disk."""

import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

from falcon_jax.wording import reason, shown

_LARGEST = 2**26  # bytes of a JSON file


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


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file beside its place and move it there, so that no reader sees half of it.

    Args:
        path: where the file goes; its directory is made if missing.
        content: what goes into it.

    Raises:
        OSError: if the directory cannot be made or written to.
    """
    path = user_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            os.fchmod(stream.fileno(), 0o644)  # mkstemp lets no one else read
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_json(path: str | os.PathLike[str]) -> Any:
    """Return the plain data of a JSON file.

    Raises:
        ValueError: if it is none, naming it.
        OSError: if it cannot be read.
    """
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):
        raise ValueError(f"{shown(path, 1000)} should be a file of JSON, but is no file.")
    if about.st_size > _LARGEST:
        raise ValueError(f"{shown(path, 1000)} is too large for what it should hold.")
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{shown(path, 1000)} is damaged: it is no JSON ({reason(error)})."
        ) from None
