"""Image data sets: what sources take and give, splits in memory or streamed, held-out splits."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float64, Int, Int32, Int64, UInt8

from falcon_jax.data.streamed import Rows, StreamedSplit, StreamSettings


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """One split of a data set, held in memory.

    Args:
        images: images, 0 to 255, (n, h, w, c).
        labels: class of each image, from 0, (n,).

    Raises:
        ValueError: if the arrays have the wrong type or shape, differ in length, or are empty.
    """

    images: UInt8[np.ndarray, "n h w c"]
    labels: Int32[np.ndarray, "n"]

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.ndim != 4 or images.dtype != np.uint8:
            raise ValueError(
                f"images must be uint8 of shape (n, h, w, c), but are {images.dtype} of shape "
                f"{images.shape}"
            )
        if labels.ndim != 1 or labels.dtype != np.int32:
            raise ValueError(
                f"labels must be int32 of shape (n,), but are {labels.dtype} of shape "
                f"{labels.shape}"
            )
        if len(images) != len(labels):
            raise ValueError(f"a split has {len(images)} images but {len(labels)} labels")
        if images.size == 0:
            raise ValueError(f"a split must hold images, but its shape is {images.shape}")
        if labels.min() < 0:
            raise ValueError(f"labels must be 0 or more, but the smallest is {labels.min()}")

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        height, width, channels = self.image_shape
        return f"Split({len(self)} images, {height}x{width}x{channels})"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of an image, (h, w, c)."""
        height, width, channels = self.images.shape[1:]
        return (height, width, channels)

    def take(self, index: Int[np.ndarray, "m"]) -> "Split":
        """Return a split of some of the images.

        Args:
            index: their positions in this split, (m,).

        Returns:
            the split, in the order of index.
        """
        return Split(images=self.images[index], labels=self.labels[index])

    def training_rows(
        self, order: Int32[np.ndarray, "n"], rows: range, *, seed: int, epoch: int
    ) -> Rows:
        """Return images of an epoch as they are stored.

        Args:
            order: positions of the epoch's images in the split, (n,).
            rows: which places of the order to return.
            seed: without effect: these images are varied on the device.
            epoch: likewise.

        Returns:
            the images.
        """
        del seed, epoch
        index = order[rows.start : rows.stop]
        return Rows(images=self.images[index], index=index, readable=np.ones(len(index), bool))

    def evaluation_rows(self, rows: range) -> Rows:
        """Return images as they are stored, in order.

        Args:
            rows: positions in the split.

        Returns:
            the images.
        """
        return Rows(
            images=self.images[rows.start : rows.stop],
            index=np.asarray(rows, np.int32),
            readable=np.ones(len(rows), bool),
        )


AnySplit = Split | StreamedSplit


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """A data set ready for training.

    Args:
        name: what to call it in logs and reports.
        num_classes: number of classes; labels lie in [0, num_classes).
        train: training split.
        validation: split for choosing the best epoch, or None.
        test: test split.
        mean: mean of each channel over the training split, in units of [0, 1].
        std: standard deviation of each channel, likewise.

    Raises:
        ValueError: if image shapes differ between splits, a label is out of range, or the
            statistics do not fit the channels.
    """

    name: str
    num_classes: int
    train: AnySplit
    validation: AnySplit | None
    test: AnySplit
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        check_splits(self.name, self.num_classes, splits)
        channels = self.train.image_shape[-1]
        if not len(self.mean) == len(self.std) == channels:
            raise ValueError(
                f"{self.name}: mean and std need one value for each of {channels} channels, "
                f"but have {len(self.mean)} and {len(self.std)}"
            )
        if not min(self.std) > 0:
            raise ValueError(
                f"{self.name}: std is {self.std}, so a channel of the training images is "
                "constant and cannot be normalised"
            )


def check_splits(name: str, num_classes: int, splits: Mapping[str, AnySplit | None]) -> None:
    """Raise unless all splits have images of one shape and labels within the classes.

    Args:
        name: of the data set, for messages.
        num_classes: number of classes.
        splits: the splits, or None, by name; one is "train".

    Raises:
        ValueError: naming the split, and what is wrong with it.
    """
    train = splits["train"]
    assert train is not None
    for split_name, split in splits.items():
        if split is None:
            continue
        if split.image_shape != train.image_shape:
            raise ValueError(
                f"{name}: images of split {split_name} are {split.image_shape} (h, w, c) but those "
                f"of split train are {train.image_shape}"
            )
        if split.labels.max() >= num_classes:
            raise ValueError(
                f"{name}: split {split_name} has label {split.labels.max()}, but with "
                f"{num_classes} classes labels run from 0 to {num_classes - 1}"
            )


def channel_statistics(
    images: UInt8[np.ndarray, "n h w c"],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, exact: sums are taken in integers.

    Args:
        images: images, 0 to 255, (n, h, w, c).

    Returns:
        mean and std, one value a channel, in units of [0, 1].
    """
    channels = images.shape[-1]
    total = np.zeros(channels, np.int64)
    total_squares = np.zeros(channels, np.int64)
    for start in range(0, len(images), 1024):
        pixels = images[start : start + 1024].reshape(-1, channels).astype(np.int64)
        total += pixels.sum(axis=0)
        total_squares += (pixels * pixels).sum(axis=0)
    count = images.size // channels
    mean: Float64[np.ndarray, " c"] = total / count
    variance = total_squares / count - mean * mean
    std = np.sqrt(np.maximum(variance, 0.0))
    return tuple((mean / 255.0).tolist()), tuple((std / 255.0).tolist())


def hold_out(split: AnySplit, fraction: float, seed: int) -> tuple[AnySplit, AnySplit | None]:
    """Take a stratified part out of a split, or nothing.

    Args:
        split: the split to divide.
        fraction: share to take out, in [0, 1).
        seed: the same seed takes out the same images.

    Returns:
        what remains, and what was taken out (None if fraction is 0).

    Raises:
        ValueError: if fraction is not in [0, 1), or no class can spare an image.
    """
    if fraction == 0.0:
        return split, None
    return stratified_split(split, fraction, seed)


def stratified_split(split: AnySplit, fraction: float, seed: int) -> tuple[AnySplit, AnySplit]:
    """Divide a split in two, taking the same fraction of every class.

    Each class gives round(fraction * count) images, at least one if it has two or more, and
    keeps at least one. Both parts keep the order of the images.

    Args:
        split: the split to divide.
        fraction: share of the second part, in (0, 1).
        seed: the same seed takes out the same images.

    Returns:
        what remains, and what was taken out.

    Raises:
        ValueError: if fraction is not in (0, 1), or no class can spare an image.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"the held-out fraction must lie in [0, 1), but is {fraction}")
    chosen = []
    for label in np.unique(split.labels):
        members = np.flatnonzero(split.labels == label)
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        chosen.append(members[shuffled(len(members), seed, int(label))[:count]])
    taken = np.zeros(len(split), bool)
    taken[np.concatenate(chosen)] = True
    if not taken.any():
        raise ValueError(
            f"cannot hold out {fraction} of {len(split)} images: every class has only one; "
            "use fraction 0"
        )
    return split.take(np.flatnonzero(~taken)), split.take(np.flatnonzero(taken))


def shuffled(n: int, *entropy: int) -> Int64[np.ndarray, " n"]:
    """A permutation of range(n) that depends on nothing but n and the numbers given.

    Sorts raw 64-bit draws of PCG64, whose stream NumPy keeps fixed; the order of
    `Generator.permutation` may change with NumPy's version.

    Args:
        n: length.
        entropy: non-negative numbers, for example a seed and an epoch.

    Returns:
        the permutation, (n,).

    Raises:
        ValueError: if a number is negative.
    """
    if min(entropy) < 0:
        raise ValueError(f"a seed or epoch must be 0 or more, but got {entropy}")
    return np.argsort(np.random.PCG64(list(entropy)).random_raw(n), kind="stable")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceOptions(StreamSettings):
    """What a source may need to know; each source reads what concerns it.

    Attributes:
        name: which data set, for ``tfds`` (``cifar10``) and ``idx`` (``emnist-letters``, where
            files are so called); else what to call it, for ``idx`` and ``folder``; the sources
            ``digits`` and ``fake`` ignore name and data_dir.
        data_dir: directory of the files; empty for the source's default.

    Raises:
        ValueError: if a number is out of range.
    """

    name: str = ""
    data_dir: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SourceSplits:
    """What a source gives: all splits in memory, before resizing, or all streamed.

    Args:
        name: what to call the data set in logs and reports.
        num_classes: number of classes.
        train: training split.
        test: test split.
        validation: the data set's own validation split, or None if it has none.

    Raises:
        ValueError: if image shapes differ between splits, or a label is out of range.
    """

    name: str
    num_classes: int
    train: AnySplit
    test: AnySplit
    validation: AnySplit | None = None

    def __post_init__(self) -> None:
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        check_splits(self.name, self.num_classes, splits)
