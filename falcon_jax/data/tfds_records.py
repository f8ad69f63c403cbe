"""TFDS data sets whose images vary in size, streamed: encoded images from array_record files."""

from __future__ import annotations

import io
import json
import os
import tempfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from falcon_jax.data.decoding import header_problem
from falcon_jax.data.streamed import StreamedSplit, StreamSettings, leave_out_broken
from falcon_jax.data.tfds_opening import import_tfds, open_builder
from falcon_jax.wording import reason

_THREADS = 16
_AT_ONCE = 64  # records a thread asks for


class TfdsRecords:
    """The images of one split of a prepared data set, opened when the first is read.

    Args:
        directory: the directory of the prepared data set.
        split: name of the split.
    """

    def __init__(self, directory: Path, split: str):
        self.directory, self.split = directory, split
        self._source: Any = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self.directory, "split": self.split}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["directory"], state["split"])

    @property
    def source(self) -> Any:
        """The data source of TFDS, with images left encoded."""
        with self._lock:
            if self._source is None:
                tfds = import_tfds()
                self._source = open_builder(self.directory).as_data_source(
                    split=self.split, decoders={"image": tfds.decode.SkipDecoding()}
                )
        return self._source

    def read(self, position: int) -> bytes:
        """Returns the content of an image file."""
        return self.source[position]["image"]

    def name(self, position: int) -> str:
        """Returns what to call an image in messages."""
        return f"{self.directory}: image {position} of split {self.split}"


def stream_split(
    directory: Path, split: str, num_classes: int, settings: StreamSettings
) -> StreamedSplit:
    """Reads every record of a split once: its label, and whether it begins as an image does.

    The labels are kept beside the data, if its directory can be written, and read from there as
    long as the data is the same.

    Args:
        directory: the directory of the prepared data set.
        split: name of the split.
        num_classes: number of classes.
        settings: how images are read.

    Returns:
        the split.

    Raises:
        ValueError: if a record cannot be read or has a label out of range, or images are broken
            and are not to be left out.
    """
    records = TfdsRecords(directory, split)
    state = _state(directory, split)
    kept = directory / f"labels-{split}.npz"
    labels, problems = _kept_labels(kept, state), {}
    if labels is None:
        labels, problems = _scan(records)
        if not problems:
            _keep_labels(kept, state, labels)
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise ValueError(
            f"{records.name(int(wrong[0]))} has label {labels[wrong[0]]}, but with {num_classes} "
            f"classes labels run from 0 to {num_classes - 1}"
        )
    whole = StreamedSplit(
        records=records, positions=np.arange(len(labels)), labels=labels, settings=settings
    )
    return leave_out_broken(whole, problems, f"{directory}, split {split},")


def _scan(records: TfdsRecords) -> tuple[Int32[np.ndarray, "n"], dict[int, str]]:
    count = len(records.source)
    labels = np.zeros(count, np.int32)

    def scan(start: int) -> dict[int, str]:
        positions = range(start, min(start + _AT_ONCE, count))
        problems = {}
        for position, (image, label) in zip(positions, _read(records, positions), strict=True):
            labels[position] = label
            problem = header_problem(image)
            if problem is not None:
                problems[position] = problem
        return problems

    with ThreadPoolExecutor(_THREADS) as threads:
        found = list(threads.map(scan, range(0, count, _AT_ONCE)))
    return labels, {i: problem for problems in found for i, problem in problems.items()}


def _read(records: TfdsRecords, positions: range) -> list[tuple[bytes, int]]:
    try:
        found = records.source.__getitems__(list(positions))
        return [(bytes(record["image"]), int(record["label"])) for record in found]
    except Exception as error:  # RuntimeError, protobuf's DecodeError, and others
        raise ValueError(
            f"{records.name(positions.start)}, or one soon after, cannot be read: {reason(error)}"
        ) from error


def _state(directory: Path, split: str) -> str:
    """What the data looks like from outside: it changes when the files do."""
    files = sorted(directory.glob(f"*-{split}.array_record*"))
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return json.dumps(stats)


def _kept_labels(path: Path, state: str) -> Int32[np.ndarray, "n"] | None:
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as kept:
            labels = kept["labels"]
            if str(kept["state"]) == state and labels.ndim == 1 and labels.dtype == np.int32:
                return labels
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # not there, or damaged: the records tell
    return None


def _keep_labels(path: Path, state: str, labels: Int32[np.ndarray, "n"]) -> None:
    content = io.BytesIO()
    np.savez(content, labels=labels, state=np.array(state))
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".labels-", delete=False) as file:
            file.write(content.getvalue())
        os.replace(file.name, path)
    except OSError:
        pass  # a directory that cannot be written: read the records again next time
