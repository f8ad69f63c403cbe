"""Directories that stand whole, and are replaced whole, whenever the process is killed.

A new directory is written inside a folder of its own beside its place. It is moved there when it is
complete; one that it replaces is moved into that folder first. Between the two moves neither stands
in its place: `standing` then finds the old one.
"""

import contextlib
import fcntl
import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from falcon_jax.manifest import read_json

_SUFFIX = ".falcon-jax-saving"
_LOCK, _NEW, _OLD = "lock", "new", "old"


@contextlib.contextmanager
def whole_directory(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Write a directory beside its place; what stands there is replaced when it is complete.

    Leftovers of processes that were killed while they wrote the same directory are removed then.

    Args:
        path: where it is to stand, absolute, no link; its parents are made if missing.

    Yields:
        Where to make it: a path at which nothing is yet.

    Raises:
        OSError: if it cannot be written or moved; what stood there stands there again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    work = pathlib.Path(tempfile.mkdtemp(suffix=_SUFFIX, prefix=".", dir=path.parent))
    try:
        with (work / _LOCK).open("x") as lock:
            json.dump({"of": path.name}, lock)
            lock.flush()
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield work / _NEW
            _put(path, work)
            _remove(work)
    except BaseException:
        # Should even the way back have failed, the old one stays where `standing` finds it.
        if not (work / _OLD).exists():
            _remove(work)
        raise
    for left in _left_behind(path):
        _remove_if_abandoned(left)


def standing(path: pathlib.Path) -> pathlib.Path:
    """Return where a directory stands: at its place, or where a killed process had moved it."""
    if not path.exists():
        for left in _left_behind(path):
            if (left / _OLD).is_dir():
                return left / _OLD
    return path


def _put(path: pathlib.Path, work: pathlib.Path) -> None:
    replaces = path.exists()
    if replaces:
        path.rename(work / _OLD)
    try:
        (work / _NEW).rename(path)
    except BaseException:
        if replaces:
            (work / _OLD).rename(path)
        raise


def _left_behind(path: pathlib.Path) -> list[pathlib.Path]:
    """Return the folders in which the directory was or is being written, the latest first."""
    found = []
    for work in path.parent.glob(f".*{_SUFFIX}"):
        try:
            ours = read_json(work / _LOCK) == {"of": path.name}
            ours = ours and {entry.name for entry in work.iterdir()} <= {_LOCK, _NEW, _OLD}
            if ours and not work.is_symlink():
                found.append((work.stat().st_mtime, work))
        except (OSError, ValueError):
            continue  # being written, or not ours
    return [work for _, work in sorted(found, reverse=True)]


def _remove_if_abandoned(work: pathlib.Path) -> None:
    with contextlib.suppress(OSError), (work / _LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while its process lives
        _remove(work)


def _remove(work: pathlib.Path) -> None:
    """Remove a folder of ours, what tells that it is ours last."""
    for name in (_NEW, _OLD):
        shutil.rmtree(work / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        (work / _LOCK).unlink(missing_ok=True)
        work.rmdir()
