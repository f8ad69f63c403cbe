"""From the name of a source to a data set ready for training."""

from collections.abc import Callable, Mapping

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
from falcon_jax.data.decoding import resize_images
from falcon_jax.data.digits import load_digits
from falcon_jax.data.fake import load_fake
from falcon_jax.data.folder import load_folder
from falcon_jax.data.idx import load_idx
from falcon_jax.data.streamed import StreamedSplit
from falcon_jax.data.tfds import load_tfds
from falcon_jax.settings import no_such

SOURCES: Mapping[str, Callable[[SourceOptions], SourceSplits]] = {
    "digits": load_digits,
    "idx": load_idx,
    "tfds": load_tfds,
    "fake": load_fake,
    "folder": load_folder,
}

# Of ImageNet's training images; pretrained weights expect streamed images normalised with them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
    shorter_side: int = 0,
    workers: int = 0,
    skip_broken: bool = False,
    interpolation: str = "bilinear",
) -> Dataset:
    """Load a data set, into memory or streamed, and hold out a validation split.

    A folder, and a TFDS data set whose images vary in size, are streamed; anything else is held in
    memory and resized at once.

    A validation split of the data set's own is used as it is; otherwise a stratified part of the
    training split becomes one. With validation_fraction 0 there is none. The channel statistics
    are those of the training split that remains, after resizing; those of ImageNet for streamed
    images.

    Args:
        source: name of a source, one of SOURCES.
        name: which data set, for "tfds" ("cifar10") and "idx" ("emnist-letters", where files are
            so called); else what to call it, for "idx" and "folder"; the
            sources "digits" and "fake" ignore name and data_dir.
        data_dir: directory of the files, or "" for the source's default.
        image_size: height and width of the images, pixels.
        resize: how images in memory get there, one of resizing.RESIZE_MODES; "auto" if streamed,
            which has its own way: random crops for training, the centre for evaluation.
        train_fraction: share of the training split to use at all, the same of every class, in
            (0, 1].
        validation_fraction: share of the training split to hold out, in [0, 1).
        seed: seed of the held-out split and of fake images.
        shorter_side: of streamed images before their centre is taken for evaluation, pixels; 0 for
            image_size / 0.875. This and what follows concerns streamed images only.
        workers: processes that read and decode; 0 for threads of this process.
        skip_broken: whether to leave out images that cannot be read, counting them, or to fail.
        interpolation: of evaluation images, bilinear or bicubic.

    Returns:
        the data set.

    Raises:
        ValueError: if an argument is out of range, or the data is not as it should be.
        OSError: if files are missing or cannot be read; says how to get them.
        ImportError: if the source needs a package that is not installed.
    """
    if source not in SOURCES:
        raise ValueError(no_such("data source", source, SOURCES))
    check_fractions(train_fraction=train_fraction, validation_fraction=validation_fraction)
    options = SourceOptions(
        name=name,
        data_dir=data_dir,
        image_size=image_size,
        seed=seed,
        shorter_side=shorter_side,
        workers=workers,
        skip_broken=skip_broken,
        interpolation=interpolation,
    )
    splits = SOURCES[source](options)
    train, validation, test = splits.train, splits.validation, splits.test
    if train_fraction < 1.0:
        _, train = stratified_split(train, train_fraction, seed)
    if validation is None:
        train, validation = hold_out(train, validation_fraction, seed)
    elif validation_fraction == 0.0:
        validation = None
    if isinstance(train, StreamedSplit):
        if resize != "auto":
            raise ValueError(
                f"resize must be 'auto' for {splits.name}, whose images are streamed, but is "
                f"{resize!r}; see shorter_side"
            )
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    else:
        train, test = (_resized(split, image_size, resize) for split in (train, test))
        if validation is not None:
            validation = _resized(validation, image_size, resize)
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


def check_fractions(*, train_fraction: float, validation_fraction: float) -> None:
    """Raise if the training split is to be shared out in a way that cannot be.

    Args:
        train_fraction: share of the training split to use at all.
        validation_fraction: share of it to hold out.

    Raises:
        ValueError: if one is out of range.
    """
    if not 0.0 < train_fraction <= 1.0:
        raise ValueError(f"train_fraction must lie in (0, 1], but is {train_fraction}")
    if not 0.0 <= validation_fraction < 1.0:
        raise ValueError(f"validation_fraction must lie in [0, 1), but is {validation_fraction}")


def check_augmentation(dataset: Dataset, augmentation: Augmentation) -> None:
    """Raise if images are streamed and to be varied on the device, too.

    Args:
        dataset: the data.
        augmentation: what to do on the device.

    Raises:
        ValueError: naming the fields of the config.
    """
    fields = {"crop_padding": augmentation.crop_padding, "flip": augmentation.flip}
    chosen = [f"config.data.augmentation.{name}" for name, value in fields.items() if value]
    if chosen and isinstance(dataset.train, StreamedSplit):
        raise ValueError(
            f"{' and '.join(chosen)}: the images of {dataset.name} are streamed, cropped and "
            "mirrored at random while they are read; leave crop_padding 0 and flip False"
        )


def _resized(split: AnySplit, image_size: int, resize: str) -> Split:
    assert isinstance(split, Split)  # a source gives splits of one kind
    return Split(images=resize_images(split.images, image_size, resize), labels=split.labels)
