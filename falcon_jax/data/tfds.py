"""TensorFlow Datasets prepared as array_record, read without TensorFlow and without the net."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from falcon_jax.data.dataset import AnySplit, Split
from falcon_jax.data.decoding import eight_bits
from falcon_jax.data.messages import some_of
from falcon_jax.data.source import SourceOptions, SourceSplits
from falcon_jax.data.tfds_opening import check_records, open_builder
from falcon_jax.data.tfds_records import stream_split
from falcon_jax.paths import user_path
from falcon_jax.wording import reason

_NAME = re.compile(r"(?P<path>\w+(/[\w.-]+)?)(:(?P<version>\d+\.\d+\.\d+))?")
_WITHOUT_TEST_LABELS = "imagenet2012"
_VERSION = re.compile(r"\d+\.\d+\.\d+")


def load_tfds(options: SourceOptions) -> SourceSplits:
    """Loads a prepared data set that has the features "image" and "label" (a class label).

    Reads the splits "train" and "test", and "validation" where there is one. A data set that
    gives its images one size is held in memory; one whose images vary in size is streamed. The
    test images of imagenet2012 have no labels: its validation split is the test split.

    Args:
        options: name as TFDS has it ("cifar10", "name/config", "name:1.0.0"); data_dir as TFDS
            has it, by default TFDS_DATA_DIR or ~/tensorflow_datasets; and how to stream.

    Returns:
        the splits.

    Raises:
        FileNotFoundError: if the data set has not been prepared; says how to.
        ImportError: if tensorflow-datasets is not installed.
        ValueError: if the name or the data set is not as it should be.
    """
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
            return stream_split(directory, split, num_classes, options.stream)
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
    """Finds the directory of a prepared data set, looking at the disk only.

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
