"""Digests: of arrays, of plain data, and a manifest of the files of a directory.

They tell damage before anything reads it.
"""

import hashlib
import json
import pathlib
from typing import Any

import numpy as np

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
    text = (directory / MANIFEST).read_bytes()
    try:
        content = json.loads(text)
        files = content["files"]
        whole = content["sha256"] == data_digest(files)
    except (ValueError, TypeError, KeyError):
        files, whole = {}, False
    if not whole:
        raise ValueError(f"{directory} is damaged: {MANIFEST} is not what was saved.")
    for name, digest in files.items():
        path = directory / name
        if not path.is_file():
            raise ValueError(f"{directory} is damaged: {name} is missing.")
        if _file_digest(path) != digest:
            raise ValueError(f"{directory} is damaged: {name} is not what was saved.")


def _file_digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
