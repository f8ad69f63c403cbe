"""Options that say where images are, and the sub-command make-folder."""

import argparse
import itertools
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from falcon_jax.data.augmentation import normalize
from falcon_jax.data.batching import train_batches
from falcon_jax.data.dataset import Dataset
from falcon_jax.data.fake import make_image_folder
from falcon_jax.data.loading import SOURCES, DataConfig, load_dataset
from falcon_jax.paths import user_path
from falcon_jax.settings import no_such
from falcon_jax.storage.models import Description


def add_data_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add the options that `load_data` reads.

    Args:
        parser: of a sub-command.
        required: whether there must be data.
    """
    parser.add_argument(
        "--data",
        required=required,
        help=f"a folder of images, or a source: {', '.join(SOURCES)}, tfds:NAME",
    )
    parser.add_argument("--data-dir", default="", help="directory of the source's files")
    parser.add_argument("--batch-size", type=int, default=128, help="images a step (default: 128)")
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that decode images (default: 0)"
    )
    parser.add_argument(
        "--skip-broken", action="store_true", help="leave broken images out instead of stopping"
    )


def load_data(parsed: argparse.Namespace, description: Description) -> Dataset:
    """Load the data that the options name, as a model wants its images.

    Args:
        parsed: the options.
        description: of the model.

    Returns:
        The data; the model's own mean and standard deviation are to be used with it.

    Raises:
        ValueError: if the options or the data do not fit the model.
        OSError: if files are missing or cannot be read.
    """
    source, _, name = parsed.data.partition(":")
    data_dir = parsed.data_dir
    if source not in SOURCES and (os.sep in parsed.data or user_path(parsed.data).is_dir()):
        source, name, data_dir = "folder", "", parsed.data
    if source not in SOURCES:
        raise ValueError(no_such("data source", source, SOURCES))
    preprocessing = description.preprocessing
    dataset = load_dataset(
        DataConfig(
            source=source,
            name=name,
            data_dir=data_dir,
            image_size=preprocessing.image_size,
            workers=parsed.workers,
            skip_broken=parsed.skip_broken,
            shorter_side=preprocessing.shorter_side,
            interpolation=preprocessing.interpolation,
        )
    )
    if dataset.num_classes != description.classes:
        raise ValueError(
            f"{dataset.name} has {dataset.num_classes} classes, but the model has "
            f"{description.classes} outputs. Convert its weights with "
            f"--classes={dataset.num_classes} --head=new and train that, or give other data"
        )
    channels = len(preprocessing.mean)
    if dataset.train.image_shape[-1] != channels:
        raise ValueError(
            f"images of {dataset.name} have {dataset.train.image_shape[-1]} channels, but the "
            f"model takes {channels}"
        )
    return dataset


def training_inputs(
    parsed: argparse.Namespace, dataset: Dataset, description: Description, count: int
) -> Iterator[jax.Array]:
    """Yield so many training batches, normalised as the model wants them."""
    preprocessing = description.preprocessing
    size = min(parsed.batch_size, len(dataset.train))
    batches = train_batches(dataset.train, size, seed=0, epoch=0)
    for batch in itertools.islice(batches, count):
        yield normalize(jnp.asarray(batch["image"]), preprocessing.mean, preprocessing.std)


def add_make_folder(commands: Any) -> None:
    """Add `make-folder`: write a folder of made-up JPEG images, one subfolder a class.

    Args:
        commands: the sub-commands of the parser, as `add_subparsers` gives them.
    """
    text = "write a folder of made-up JPEG images, one subfolder a class"
    parser = commands.add_parser("make-folder", help=text, description=text.capitalize() + ".")
    parser.add_argument("--out", required=True, help="the folder; it must not hold anything yet")
    parser.add_argument("--classes", type=int, default=10, help="number of classes")
    parser.add_argument("--train", type=int, default=500, help="number of training images")
    parser.add_argument("--val", type=int, default=100, help="number of validation images")
    parser.add_argument("--side", type=int, default=400, help="mean height and width, pixels")
    parser.add_argument("--seed", type=int, default=0, help="the same seed makes the same images")
    parser.set_defaults(run=_run)


def _run(parsed: Any) -> None:
    directory = make_image_folder(
        parsed.out,
        num_classes=parsed.classes,
        num_train=parsed.train,
        num_val=parsed.val,
        side=parsed.side,
        seed=parsed.seed,
    )
    print(directory)
