"""A manifest of a directory's files, so that damage is told before anything reads them."""

import hashlib
import json
import pathlib

MANIFEST = "manifest.json"


def write_manifest(directory: pathlib.Path) -> None:
    """Write the digest of every file below a directory into its manifest.

    Args:
        directory: nothing may change in it afterwards.
    """
    files = {
        path.relative_to(directory).as_posix(): _file_digest(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    content = {"files": files, "sha256": _listing_digest(files)}
    (directory / MANIFEST).write_text(json.dumps(content, indent=1))


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
        whole = content["sha256"] == _listing_digest(files)
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


def _listing_digest(files: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
