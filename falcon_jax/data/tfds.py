"""TensorFlow Datasets as array_record files: prepared, checked, and read without TensorFlow."""

import difflib
import http.client
import importlib.util
import io
import json
import os
import re
import tempfile
import threading
import urllib.error
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from jaxtyping import Int32

from falcon_jax.data.dataset import AnySplit, SourceOptions, SourceSplits, Split
from falcon_jax.data.decoding import eight_bits, header_problem
from falcon_jax.data.streamed import StreamedSplit, StreamSettings, leave_out_broken
from falcon_jax.paths import user_path
from falcon_jax.wording import reason, some_of


def import_tfds() -> ModuleType:
    """Import tensorflow_datasets.

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
    """Open a prepared data set.

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
        """Return the content of an image file."""
        return self.source[position]["image"]

    def name(self, position: int) -> str:
        """Return what to call an image in messages."""
        return f"{self.directory}: image {position} of split {self.split}"


def stream_split(
    directory: Path, split: str, num_classes: int, settings: StreamSettings
) -> StreamedSplit:
    """Read every record of a split once: its label, and whether it begins as an image does.

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


_NAME = re.compile(r"(?P<path>\w+(/[\w.-]+)?)(:(?P<version>\d+\.\d+\.\d+))?")
_WITHOUT_TEST_LABELS = "imagenet2012"
_VERSION = re.compile(r"\d+\.\d+\.\d+")


def load_tfds(options: SourceOptions, *, seed: int = 0) -> SourceSplits:
    """Load a prepared data set that has the features "image" and "label" (a class label).

    Reads the splits "train" and "test", and "validation" where there is one. A data set that
    gives its images one size is held in memory; one whose images vary in size is streamed. The
    test images of imagenet2012 have no labels: its validation split is the test split.

    Args:
        options: name as TFDS has it ("cifar10", "name/config", "name:1.0.0"); data_dir as TFDS
            has it, by default TFDS_DATA_DIR or ~/tensorflow_datasets; and how to stream.
        seed: without effect.

    Returns:
        the splits.

    Raises:
        FileNotFoundError: if the data set has not been prepared; says how to.
        ImportError: if tensorflow-datasets is not installed.
        ValueError: if the name or the data set is not as it should be.
    """
    del seed
    directory = prepared_directory(options.name, options.data_dir)
    builder = open_builder(directory)
    features = dict(builder.info.features)
    num_classes = getattr(features.get("label"), "num_classes", None)
    if "image" not in features or num_classes is None:
        raise ValueError(
            f'{directory} has the features {some_of(sorted(features))}; needed are "image" and '
            '"label" (a class label)'
        )
    has_test = not builder.info.name.startswith(_WITHOUT_TEST_LABELS)
    test = "test" if has_test else "validation"
    absent = [split for split in ("train", test) if split not in builder.info.splits]
    if absent:
        raise ValueError(
            f"{directory} has no split {absent[0]!r}, only {some_of(sorted(builder.info.splits))}"
        )
    has_validation = has_test and "validation" in builder.info.splits
    image = features["image"]
    varied = None in (image.shape or ())
    # TFDS writes the bits of floats as if they were the colours of a PNG file.
    if varied and (type(image).__name__ != "Image" or image.np_dtype not in (np.uint8, np.uint16)):
        raise ValueError(
            f'{directory}: the feature "image" holds {image.np_dtype} values whose shape varies; '
            "they must be images of uint8 or uint16"
        )

    def read(split: str) -> AnySplit:
        check_records(builder, split, directory)
        if varied:
            return stream_split(directory, split, num_classes, options)
        return _read_split(builder, split, directory)

    return SourceSplits(
        name=options.name,
        num_classes=num_classes,
        train=read("train"),
        test=read(test),
        validation=read("validation") if has_validation else None,
    )


def tfds_directory(data_dir: str) -> Path:
    """The directory that holds all prepared data sets.

    Args:
        data_dir: the directory, or "" for TFDS's default: TFDS_DATA_DIR or ~/tensorflow_datasets.

    Returns:
        the directory.
    """
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return user_path(data_dir or default)


def prepared_directory(name: str, data_dir: str) -> Path:
    """Find the directory of a prepared data set, looking at the disk only.

    Args:
        name: name as TFDS has it: "name", "name/config", either with ":1.0.0" for a version.
        data_dir: as for tfds_directory.

    Returns:
        the directory of the version asked for, else of the newest.

    Raises:
        ValueError: if the name is malformed, or the files are of another format.
        FileNotFoundError: if there is no such directory; says how to prepare it.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"{name!r} cannot be the name of a TFDS data set; give for example cifar10, or "
            "name/config:1.0.0"
        )
    root = tfds_directory(data_dir) / match["path"]
    prepared = {
        info.parent.name: info.parent
        for info in root.glob("*/dataset_info.json")
        if _VERSION.fullmatch(info.parent.name)
    }
    version = match["version"] or max(
        prepared, key=lambda v: tuple(map(int, v.split("."))), default=""
    )
    if version not in prepared:
        configs = sorted({info.parts[-3] for info in root.glob("*/*/dataset_info.json")})
        found = f" (prepared there: {some_of(f'{name}/{c}' for c in configs)})" if configs else ""
        raise FileNotFoundError(
            f"the TFDS data set {name} is not prepared in {tfds_directory(data_dir)}{found}; run "
            f"`{prepare_command(name, data_dir)}`"
        )
    _require_array_record(prepared[version], name, data_dir)
    return prepared[version]


def prepare_command(name: str, data_dir: str) -> str:
    """The command line that prepares a data set.

    Args:
        name: name as TFDS has it.
        data_dir: as for tfds_directory.

    Returns:
        the command line.
    """
    return f"python -m falcon_jax prepare --name {name} --data-dir {tfds_directory(data_dir)}"


def _require_array_record(directory: Path, name: str, data_dir: str) -> None:
    info_path = directory / "dataset_info.json"
    try:
        file_format = json.loads(info_path.read_text()).get("fileFormat", "tfrecord")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{info_path} is damaged: {error}") from error
    if file_format != "array_record":
        raise ValueError(
            f"{directory} is prepared as {file_format}, which cannot be read in any order without "
            f"TensorFlow; move it away and run `{prepare_command(name, data_dir)}`"
        )


def _read_split(builder: Any, split: str, directory: Path) -> Split:
    index = 0
    try:
        records = builder.as_data_source(split=split)
        shape = np.shape(records[0]["image"])
        images = np.empty((len(records), *shape), np.uint8)
        labels = np.empty(len(records), np.int32)
        for index in range(len(records)):
            record = records[index]
            image = np.asarray(record["image"])
            if image.shape != shape:
                raise ValueError(
                    f"it is of shape {image.shape}, but the first image is of shape {shape}, and "
                    "all must be of one shape"
                )
            images[index] = eight_bits(image)
            labels[index] = record["label"]
    except Exception as error:  # a damaged file or image raises anything, from several libraries
        raise ValueError(
            f"{directory}: image {index} of split {split} cannot be read: {reason(error)}"
        ) from error
    return Split(images=images, labels=labels)


_PROBE_SECONDS = 10


def prepare(name: str, data_dir: str = "") -> Path:
    """Download a TFDS data set and write it as array_record files, unless that has been done.

    What is missing is said before anything long is tried: TFDS itself retries an unreachable
    server for minutes.

    Args:
        name: name as TFDS has it, for example "cifar10".
        data_dir: directory of all prepared data sets, or "" for TFDS's default. Archives that
            were fetched by other means are looked for in its folder downloads/manual.

    Returns:
        the directory of the prepared data set.

    Raises:
        ValueError: if TFDS does not know the name, or has prepared it in another format.
        ImportError: if tensorflow-datasets, or TensorFlow for unpacking downloads, is missing.
        OSError: if the servers cannot be reached, or preparing fails.
    """
    try:
        return prepared_directory(name, data_dir)
    except FileNotFoundError:
        pass
    tfds = import_tfds()
    root = tfds_directory(data_dir)
    builder = _find_builder(tfds, name, root)
    if builder.url_infos and importlib.util.find_spec("tensorflow") is None:
        raise ImportError(
            f"preparing {name} needs TensorFlow, which TFDS unpacks downloads with (training does "
            "not need it): pip install tensorflow-cpu"
        )
    _require_archives(builder, name, root / "downloads")
    try:
        builder.download_and_prepare()
    except Exception as error:  # TFDS raises anything: requests', its own, AssertionError
        raise OSError(f"preparing {name} in {root} failed: {reason(error)}") from error
    return Path(builder.data_path)


def _find_builder(tfds: ModuleType, name: str, root: Path) -> Any:
    try:
        return tfds.builder(name, data_dir=root, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        near = difflib.get_close_matches(
            name, tfds.list_builders(with_community_datasets=False), n=3
        )
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"TFDS has no data set {name!r}{hint}") from error


def _require_archives(builder: Any, name: str, downloads: Path) -> None:
    from tensorflow_datasets.core.download import resource

    archives = {
        url: info.filename
        for url, info in (builder.url_infos or {}).items()
        if url.startswith(("http://", "https://"))
        and not (downloads / "manual" / str(info.filename)).is_file()
        and not (downloads / resource.get_dl_fname(url, info.checksum)).is_file()
    }
    by_host = {urlsplit(url).netloc: url for url in archives}
    reasons = [_unreachable(url) for url in by_host.values()]
    # Some data sets list servers that the chosen variant does not need: one answer will do.
    if reasons and all(reasons):
        raise OSError(
            f"preparing {name} needs {some_of(sorted(archives.values()))} from "
            f"{some_of(by_host)}, which cannot be reached ({reasons[0]}); put the files into "
            f"{downloads / 'manual'}, or prepare where the internet can be reached and copy the "
            "prepared directory"
        )


def _unreachable(url: str) -> str | None:
    request = urllib.request.Request(url, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_PROBE_SECONDS):
            return None
    except (urllib.error.HTTPError, http.client.HTTPException):
        return None  # an answer, if only to say that HEAD is not liked
    except OSError as error:
        return str(getattr(error, "reason", error))
