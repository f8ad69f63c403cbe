"""MNIST-style directories: four idx files, plain or gzipped (MNIST, Fashion-MNIST, EMNIST).

EMNIST's images are transposed in its files, and stay so, as torchvision and TFDS leave them.

Format: two zero bytes, a type code (8: unsigned byte), the number of dimensions, the dimensions as
big-endian 32-bit integers, then the values.
"""

import gzip
import logging
import math
import re
import struct
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from falcon_jax.data.dataset import SourceOptions, SourceSplits, Split
from falcon_jax.paths import user_path
from falcon_jax.wording import some_of

FASHION_MNIST_DIRECTORY = "/usr/share/datasets/fashion-mnist"

_UNSIGNED_BYTE = 8
_GZIP_MAGIC = b"\x1f\x8b"
_DEFLATE_LIMIT = 1032  # deflate expands no further, so a larger claim is false
_NAME = re.compile(
    r"(?P<set>.*?)[-_.]?(?P<split>train|t10k|test)[-_.](?P<what>images|labels)[-_.]?"
    r"(idx\d)?[-_.]?(ubyte)?(\.(gz|gzip|idx|bin))?",
    re.IGNORECASE,
)

_log = logging.getLogger(__name__)


def load_idx(options: SourceOptions, *, seed: int = 0) -> SourceSplits:
    """Load the training and test images and labels of a directory.

    The files are [SET-]{train,t10k,test}-{images-idx3,labels-idx1}-ubyte, with dots or underscores
    for hyphens if need be, gzipped or not, with .gz or without; SET is that of EMNIST's files, such
    as emnist-letters. The number of classes is that of the training labels, which must use every
    class, from 0 on, or from 1 on as EMNIST's letters do: then they are counted from 0, and it is
    logged.

    Args:
        options: data_dir is the directory, by default that of Debian's Fashion-MNIST; name is
            what to call the data set, by default SET or the directory's name. Where files have a
            SET, name is one of these.
        seed: without effect.

    Returns:
        the splits, images (n, h, w, 1).

    Raises:
        FileNotFoundError: if the directory or one of the files is missing.
        ValueError: if a file is damaged or does not fit the others, or several could be meant.
    """
    del seed
    directory = user_path(options.data_dir or FASHION_MNIST_DIRECTORY)
    if not directory.is_dir():
        raise FileNotFoundError(
            f"there is no directory {directory}: for Fashion-MNIST on Debian or Ubuntu run "
            "`apt-get install dataset-fashion-mnist`, or give the directory of your idx files as "
            "data_dir"
        )
    chosen, files = _choose(directory, options.name)
    train_images, train_labels = _read_split(directory, files, "train")
    test_images, test_labels = _read_split(directory, files, "test")
    first, last = int(train_labels.min()), int(train_labels.max())
    missing = sorted(set(range(min(first, 1), last + 1)) - set(np.unique(train_labels).tolist()))
    if missing:
        raise ValueError(
            f"{directory}: training labels go up to {last} but none is {missing[0]}; labels must "
            "use every class, from 0 or 1 on"
        )
    if not first <= test_labels.min() <= test_labels.max() <= last:
        wrong = test_labels.max() if test_labels.max() > last else test_labels.min()
        raise ValueError(
            f"{directory}: a test label is {wrong} but training labels go from {first} up to {last}"
        )
    if first:
        _log.warning("%s: labels 1 to %d are counted from 0", directory, last)
    train, test = (
        Split(images=images[..., None], labels=labels.astype(np.int32) - first)
        for images, labels in ((train_images, train_labels), (test_images, test_labels))
    )
    if test.image_shape != train.image_shape:
        raise ValueError(
            f"{directory}: the images of {files['test', 'images'][0].name} are {test.image_shape} "
            f"(h, w, c), but those of {files['train', 'images'][0].name} {train.image_shape}"
        )
    name = options.name or chosen or directory.resolve().name
    return SourceSplits(name=name, num_classes=last + 1 - first, train=train, test=test)


def read_idx(path: Path, dimensions: int) -> UInt8[np.ndarray, "..."]:
    """Read one idx file of unsigned bytes, gzipped if it begins so, whatever its name.

    Args:
        path: the file.
        dimensions: number of dimensions it must have.

    Returns:
        its values, with the dimensions of its header.

    Raises:
        ValueError: if it is not such a file, or is shorter or longer than its header says.
        OSError: if it cannot be read.
    """
    with path.open("rb") as stream:
        gzipped = stream.read(2) == _GZIP_MAGIC
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


_Files = dict[tuple[str, str], list[Path]]


def _choose(directory: Path, name: str) -> tuple[str, _Files]:
    """The set that is meant, "" where files name none, and its files by split and content."""
    sets: dict[str, _Files] = {}
    for path in sorted(directory.iterdir()):
        match = _NAME.fullmatch(path.name)
        if match and path.is_file():
            split = "train" if match["split"].lower() == "train" else "test"
            files = sets.setdefault(match["set"], {}).setdefault((split, match["what"].lower()), [])
            if path.with_name(path.name.removesuffix(".gz")) not in files:  # unpacked beside it
                files.append(path)
    if not sets:
        raise FileNotFoundError(
            f"{directory} has no file with a name such as train-images-idx3-ubyte or "
            "train-images-idx3-ubyte.gz"
        )
    if name in sets:
        return name, sets[name]
    if len(sets) > 1 or (name and "" not in sets):
        found = some_of(chosen or "one without a name" for chosen in sets)
        raise ValueError(
            f"{directory} holds the files of {found}; give one of these as the name of the data "
            f"set{f', not {name!r}' if name else ''}"
        )
    return sets.popitem()


def _read_split(
    directory: Path, files: _Files, split: str
) -> tuple[UInt8[np.ndarray, "n h w"], UInt8[np.ndarray, "n"]]:
    images_path, labels_path = (_only(directory, files, split, w) for w in ("images", "labels"))
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if images.size == 0:
        raise ValueError(f"{images_path} holds no images: its shape is {images.shape}")
    if len(images) != len(labels):
        raise ValueError(
            f"{images_path} holds {len(images)} images but {labels_path.name} {len(labels)} labels"
        )
    return images, labels


def _only(directory: Path, files: _Files, split: str, what: str) -> Path:
    found = files.get((split, what), [])
    if not found:
        stem = f"{'train' if split == 'train' else 't10k'}-{what}-idx{3 if what == 'images' else 1}"
        there = some_of(path.name for paths in files.values() for path in paths)
        raise FileNotFoundError(
            f"{directory} has neither {stem}-ubyte nor {stem}-ubyte.gz; there are {there}"
        )
    if len(found) > 1:
        raise ValueError(
            f"{directory} has several files of the {split} {what}: "
            f"{some_of(path.name for path in found)}; move all but one away"
        )
    return found[0]
