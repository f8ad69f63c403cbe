"""From the name of a source to a data set ready for training."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from falcon_jax.data.dataset import (
    Dataset,
    Split,
    channel_statistics,
    hold_out,
    stratified_split,
)
from falcon_jax.data.digits import load_digits
from falcon_jax.data.fake import load_fake
from falcon_jax.data.idx import load_idx
from falcon_jax.data.resizing import resize_images
from falcon_jax.data.source import SourceOptions, SourceSplits
from falcon_jax.data.tfds import load_tfds
from falcon_jax.names import no_such

SOURCES: Mapping[str, Callable[[SourceOptions], SourceSplits]] = {
    "digits": load_digits,
    "idx": load_idx,
    "tfds": load_tfds,
    "fake": load_fake,
}


def load_dataset(
    source: str,
    *,
    name: str = "",
    data_dir: str = "",
    image_size: int = 32,
    resize: str = "auto",
    train_fraction: float = 1.0,
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> Dataset:
    """Loads a data set into memory, resizes it and holds out a validation split.

    A validation split of the data set's own is used as it is; otherwise a stratified part of the
    training split becomes one. With validation_fraction 0 there is none. The channel statistics
    are those of the training split that remains, after resizing.

    Args:
        source: name of a source, one of SOURCES.
        name: which data set, for "tfds" ("cifar10"); what to call it, for "idx"; the sources
            "digits" and "fake" ignore name and data_dir.
        data_dir: directory of the files, or "" for the source's default.
        image_size: height and width of the images, pixels.
        resize: how to get there, one of resizing.RESIZE_MODES.
        train_fraction: share of the training split to use at all, the same of every class, in
            (0, 1].
        validation_fraction: share of the training split to hold out, in [0, 1).
        seed: seed of the held-out split and of fake images.

    Returns:
        the data set.

    Raises:
        ValueError: if an argument is out of range, or the data is not as it should be.
        OSError: if files are missing or cannot be read; says how to get them.
        ImportError: if the source needs a package that is not installed.
    """
    if source not in SOURCES:
        raise ValueError(no_such("data source", source, SOURCES))
    splits = SOURCES[source](
        SourceOptions(name=name, data_dir=data_dir, image_size=image_size, seed=seed)
    )
    if not 0.0 < train_fraction <= 1.0:
        raise ValueError(f"train_fraction must lie in (0, 1], but is {train_fraction}")
    train, validation = splits.train, splits.validation
    if train_fraction < 1.0:
        _, train = stratified_split(train, train_fraction, seed)
    if validation is None:
        train, validation = hold_out(train, validation_fraction, seed)
    elif validation_fraction == 0.0:
        validation = None

    def resized(split: Split) -> Split:
        return Split(images=resize_images(split.images, image_size, resize), labels=split.labels)

    train = resized(train)
    mean, std = channel_statistics(train.images)
    return Dataset(
        name=splits.name,
        num_classes=splits.num_classes,
        train=train,
        validation=None if validation is None else resized(validation),
        test=resized(splits.test),
        mean=mean,
        std=std,
    )
