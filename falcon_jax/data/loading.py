"""From the name of a source to a data set ready for training."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from falcon_jax.data.augmentation import Augmentation
from falcon_jax.data.dataset import (
    AnySplit,
    Dataset,
    SourceOptions,
    SourceSplits,
    Split,
    channel_statistics,
    hold_out,
    stratified_split,
)
from falcon_jax.data.decoding import RESIZE_MODES, resize_images
from falcon_jax.data.digits import load_digits
from falcon_jax.data.fake import load_fake
from falcon_jax.data.folder import load_folder
from falcon_jax.data.idx import load_idx
from falcon_jax.data.streamed import StreamedSplit
from falcon_jax.data.tfds import load_tfds
from falcon_jax.settings import checked, must_be, named, unknown_field

SOURCES: Mapping[str, Callable[..., SourceSplits]] = {
    "digits": load_digits,
    "idx": load_idx,
    "tfds": load_tfds,
    "fake": load_fake,
    "folder": load_folder,
}

# Of ImageNet's training images; pretrained weights expect streamed images normalised with them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(SourceOptions):
    """Which images a network is trained and tested on, and how they get their size.

    Attributes:
        source: where they come from: ``digits``, ``idx``, ``tfds``, ``fake`` or ``folder``.
        resize: how images in memory get their size: ``auto``, ``pad``, ``bilinear`` or ``none``;
            ``auto`` if streamed, which has its own way: random crops for training, the centre for
            evaluation.
        train_fraction: share of the training split to use at all, the same of every class.
        validation_fraction: share of the training split to hold out, where the data has no
            validation split of its own; 0 for no validation.
        augmentation: of training images in memory, on the device.

    Raises:
        ValueError: if there is no such source, or a number is out of range.
    """

    source: str = "digits"
    resize: str = checked("auto", named(RESIZE_MODES))
    train_fraction: float = checked(1.0, must_be("in (0, 1]", lambda share, _: 0 < share <= 1))
    validation_fraction: float = checked(0.1, must_be("in [0, 1)", lambda share, _: 0 <= share < 1))
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source not in SOURCES:
            raise ValueError(unknown_field("source", self.source, SOURCES))


def load_dataset(source: str | DataConfig, *, seed: int = 0, **settings: Any) -> Dataset:
    """Load a data set, into memory or streamed, and hold out a validation split.

    >>> len(load_dataset("digits", validation_fraction=0.0).train)
    1438

    A folder, and a TFDS data set whose images vary in size, are streamed; anything else is held in
    memory and resized at once.

    A validation split of the data set's own is used as it is; otherwise a stratified part of the
    training split becomes one. With validation_fraction 0 there is none. The channel statistics
    are those of the training split that remains, after resizing; those of ImageNet for streamed
    images.

    Args:
        source: which data, and how; or the name of the source.
        seed: of the held-out split and of fake images.
        settings: the other fields of `DataConfig`, beside the name of a source.

    Returns:
        the data set.

    Raises:
        ValueError: if the data is not as it should be, or does not fit the settings.
        TypeError: if there is no such setting.
        OSError: if files are missing or cannot be read; says how to get them.
        ImportError: if the source needs a package that is not installed.
    """
    if seed < 0:
        raise ValueError(f"the seed must be 0 or more, but is {seed}")
    if isinstance(source, DataConfig):
        config = dataclasses.replace(source, **settings)
    else:
        config = DataConfig(source=source, **settings)
    splits = SOURCES[config.source](config, seed=seed)
    train, validation, test = splits.train, splits.validation, splits.test
    if config.train_fraction < 1.0:
        _, train = stratified_split(train, config.train_fraction, seed)
    if validation is None:
        train, validation = hold_out(train, config.validation_fraction, seed)
    elif config.validation_fraction == 0.0:
        validation = None
    if isinstance(train, StreamedSplit):
        if config.resize != "auto":
            raise ValueError(
                f"resize must be 'auto' for {splits.name}, whose images are streamed, but is "
                f"{config.resize!r}; see shorter_side"
            )
        _check_augmentation(splits.name, config.augmentation)
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    else:
        train, test = (_resized(split, config) for split in (train, test))
        if validation is not None:
            validation = _resized(validation, config)
        mean, std = channel_statistics(train.images)
    return Dataset(
        name=splits.name,
        num_classes=splits.num_classes,
        train=train,
        validation=validation,
        test=test,
        mean=mean,
        std=std,
    )


def _check_augmentation(name: str, augmentation: Augmentation) -> None:
    """Raise if streamed images are to be varied on the device, too."""
    fields = dataclasses.asdict(augmentation)
    chosen = [f"config.data.augmentation.{field}" for field, value in fields.items() if value]
    if chosen:
        raise ValueError(
            f"{' and '.join(chosen)}: the images of {name} are streamed, cropped and mirrored at "
            "random while they are read; leave crop_padding 0 and flip False"
        )


def _resized(split: AnySplit, config: DataConfig) -> Split:
    assert isinstance(split, Split)  # a source gives splits of one kind
    images = resize_images(split.images, config.image_size, config.resize)
    return Split(images=images, labels=split.labels)
