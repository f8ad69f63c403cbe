"""MNIST-style directories: four idx files, plain or gzipped (MNIST, Fashion-MNIST, EMNIST).

Format: two zero bytes, a type code (8: unsigned byte), the number of dimensions, the dimensions as
big-endian 32-bit integers, then the values.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from falcon_jax.data.dataset import Split
from falcon_jax.data.source import SourceOptions, SourceSplits

FASHION_MNIST_DIRECTORY = "/usr/share/datasets/fashion-mnist"

_UNSIGNED_BYTE = 8
_DEFLATE_LIMIT = 1032  # deflate expands no further, so a larger claim is false


def load_idx(options: SourceOptions) -> SourceSplits:
    """Loads {train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz] from a directory.

    The number of classes is that of the training labels, which must use every class from 0 on.

    Args:
        options: data_dir is the directory, by default that of Debian's Fashion-MNIST; name is
            what to call the data set, by default the directory's name.

    Returns:
        the splits, images (n, h, w, 1).

    Raises:
        FileNotFoundError: if the directory or one of the files is missing.
        ValueError: if a file is damaged or does not fit the others.
    """
    directory = Path(options.data_dir or FASHION_MNIST_DIRECTORY)
    if not directory.is_dir():
        raise FileNotFoundError(
            f"there is no directory {directory}: for Fashion-MNIST on Debian or Ubuntu run "
            "`apt-get install dataset-fashion-mnist`, or give the directory of your idx files as "
            "data_dir"
        )
    train = _read_split(directory, "train")
    test = _read_split(directory, "t10k")
    num_classes = int(train.labels.max()) + 1
    missing = sorted(set(range(num_classes)) - set(np.unique(train.labels).tolist()))
    if missing:
        raise ValueError(
            f"{directory}: training labels go up to {num_classes - 1} but none is {missing[0]}; "
            "labels must use every class from 0 on"
        )
    if test.labels.max() >= num_classes:
        raise ValueError(
            f"{directory}: a test label is {test.labels.max()} but training labels go up to "
            f"{num_classes - 1}"
        )
    if test.image_shape != train.image_shape:
        raise ValueError(
            f"{directory}: the images of t10k-images-idx3-ubyte are {test.image_shape} (h, w, c), "
            f"but those of train-images-idx3-ubyte {train.image_shape}"
        )
    name = options.name or directory.resolve().name
    return SourceSplits(name=name, num_classes=num_classes, train=train, test=test)


def read_idx(path: Path, dimensions: int) -> UInt8[np.ndarray, "..."]:
    """Reads one idx file of unsigned bytes, gzipped if its name ends in .gz.

    Args:
        path: the file.
        dimensions: number of dimensions it must have.

    Returns:
        its values, with the dimensions of its header.

    Raises:
        ValueError: if it is not such a file, or is shorter or longer than its header says.
        OSError: if it cannot be read.
    """
    gzipped = path.suffix == ".gz"
    limit = path.stat().st_size * (_DEFLATE_LIMIT if gzipped else 1)
    try:
        with gzip.open(path) if gzipped else path.open("rb") as stream:
            header = stream.read(4 + 4 * dimensions)
            if header[:4] != bytes((0, 0, _UNSIGNED_BYTE, dimensions)):
                raise ValueError(
                    f"{path} is not an idx file of {dimensions}-dimensional unsigned bytes: it "
                    f"begins with {header[:4].hex() or 'nothing'}, not 000008{dimensions:02x}"
                )
            if len(header) < 4 + 4 * dimensions:
                raise ValueError(f"{path} ends within its header")
            shape = struct.unpack(f">{dimensions}I", header[4:])
            size = math.prod(shape)
            if size > limit:
                raise ValueError(f"{path} is too short for the shape {shape} in its header")
            values = stream.read(size + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from error
    if len(values) != size:
        relation = "fewer" if len(values) < size else "more"
        raise ValueError(f"{path} holds {relation} values than the shape {shape} in its header")
    return np.frombuffer(values, np.uint8).reshape(shape)


def _read_split(directory: Path, prefix: str) -> Split:
    images_path = _find(directory, f"{prefix}-images-idx3-ubyte")
    labels_path = _find(directory, f"{prefix}-labels-idx1-ubyte")
    images = read_idx(images_path, 3)
    labels = read_idx(labels_path, 1)
    if images.size == 0:
        raise ValueError(f"{images_path} holds no images: its shape is {images.shape}")
    if len(images) != len(labels):
        raise ValueError(
            f"{images_path} holds {len(images)} images but {labels_path.name} {len(labels)} labels"
        )
    return Split(images=images[..., None], labels=labels.astype(np.int32))


def _find(directory: Path, stem: str) -> Path:
    for path in (directory / stem, directory / f"{stem}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{directory} has neither {stem} nor {stem}.gz")
