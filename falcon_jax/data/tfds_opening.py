"""Opening what TFDS has prepared: metadata and record files are checked before they are trusted."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from falcon_jax.wording import reason


def import_tfds() -> ModuleType:
    """Imports tensorflow_datasets.

    Returns:
        the package.

    Raises:
        ImportError: if it, or something it needs, is not installed.
    """
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise ImportError(
            f'the source "tfds" needs tensorflow-datasets ({error}): '
            'pip install "falcon-jax[train]"'
        ) from error
    return tensorflow_datasets


def open_builder(directory: Path) -> Any:
    """Opens a prepared data set.

    Args:
        directory: the directory of the prepared data set.

    Returns:
        the builder of TFDS.

    Raises:
        ImportError: if tensorflow-datasets is not installed.
        ValueError: if the metadata cannot be read.
    """
    tfds = import_tfds()
    try:
        # From the directory and not by name: looked up by name, an unprepared data set goes to
        # the net.
        return tfds.builder_from_directory(directory)
    except Exception as error:  # protobuf's ParseError, JSONDecodeError, KeyError and others
        raise ValueError(
            f"{directory}: dataset_info.json or features.json is damaged: {reason(error)}"
        ) from error


def check_records(builder: Any, split: str, directory: Path) -> None:
    """Raise unless the files of a split hold as many records as the metadata says, and any.

    Args:
        builder: of the data set.
        split: name of the split.
        directory: the directory of the prepared data set.

    Raises:
        ValueError: if a file cannot be read, or holds more or fewer records.
    """
    from array_record.python import (
        array_record_module,  # pyright: ignore[reportAttributeAccessIssue] - it is in C++
    )

    info = builder.info.splits[split]
    if not info.num_examples:
        raise ValueError(f"{directory}: split {split} is empty")
    for path, expected in zip(info.filepaths, info.shard_lengths, strict=True):
        try:
            reader = array_record_module.ArrayRecordReader(str(path))
            found = reader.num_records()
            reader.close()
        except Exception as error:  # RuntimeError and others, from C++
            raise ValueError(f"{path} is missing or damaged: {reason(error)}") from error
        if found != expected:
            raise ValueError(
                f"{path} holds {found} records, but dataset_info.json says {expected}; one of the "
                "two is damaged"
            )
