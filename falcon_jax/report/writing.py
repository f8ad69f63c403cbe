"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from falcon_jax.paths import user_path


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file beside its place and moves it there, so that no reader sees half of it.

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
