"""Directories that stand whole, with digests that tell damage before anything is read."""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from falcon_jax.paths import read_json
from falcon_jax.wording import shown

MANIFEST = "manifest.json"


def array_digest(array: np.ndarray) -> str:
    """Return the digest of an array: of its type, its shape and its elements."""
    content = hashlib.sha256(f"{array.dtype} {array.shape} ".encode())
    content.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return content.hexdigest()


def data_digest(data: Any) -> str:
    """Return the digest of plain data, whatever the order of its names."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def write_manifest(directory: pathlib.Path) -> None:
    """Write the digest of every file below a directory into its manifest.

    Args:
        directory: nothing may change in it afterwards.
    """
    files = {
        path.relative_to(directory).as_posix(): _file_digest(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, f".{MANIFEST}")
    }
    content = {"files": files, "sha256": data_digest(files)}
    # Whole or not at all: half a manifest would make its directory look damaged.
    unfinished = directory / f".{MANIFEST}"
    unfinished.write_text(json.dumps(content, indent=1))
    unfinished.replace(directory / MANIFEST)


def check_manifest(directory: pathlib.Path) -> None:
    """Compare every file below a directory with its manifest.

    Orbax reads in threads of its own, which outlive the error that a damaged file raises in one of
    them; so it is not given one.

    Args:
        directory: files beside those of the manifest do not matter.

    Raises:
        FileNotFoundError: if there is no manifest.
        ValueError: if it or a file is missing or damaged, naming it.
    """
    for name, digest in _listed(directory).items():
        path = directory / name
        if not path.is_file():
            raise ValueError(f"{directory} is damaged: {shown(name, 200)} is missing.")
        if _file_digest(path) != digest:
            raise ValueError(f"{directory} is damaged: {shown(name, 200)} is not what was saved.")


def unlisted_file(directory: pathlib.Path) -> str | None:
    """Return a file below a directory that its manifest does not name, or None if it names all.

    Raises:
        FileNotFoundError: if there is no manifest.
        ValueError: if it is damaged.
    """
    listed = {*_listed(directory), MANIFEST}
    for folder, folders, files in os.walk(directory):
        links = (name for name in folders if (pathlib.Path(folder) / name).is_symlink())
        for name in (*files, *links):
            path = (pathlib.Path(folder) / name).relative_to(directory).as_posix()
            if path not in listed:
                return path
    return None


def _listed(directory: pathlib.Path) -> dict[str, str]:
    """Return the digests that a manifest has, by the files' names, all inside the directory."""
    try:
        content = read_json(directory / MANIFEST)
        files = content["files"]
        whole = content["sha256"] == data_digest(files) and isinstance(files, dict)
        whole = whole and all(isinstance(digest, str) for digest in files.values())
    except (ValueError, TypeError, KeyError):
        files, whole = {}, False
    if not whole:
        raise ValueError(f"{directory} is damaged: {MANIFEST} is not what was saved.")
    place = os.path.realpath(directory)
    for name in files:
        # Links are none that `write_manifest` met: they would lead elsewhere.
        inside = "\0" not in name and os.path.normpath(name) == name and not os.path.isabs(name)
        if not inside or os.path.realpath(directory / name) != os.path.join(place, name):
            raise ValueError(
                f"{directory} is damaged: {MANIFEST} names {shown(name, 200)}, which is not a file "
                "inside."
            )
    return files


def _file_digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
