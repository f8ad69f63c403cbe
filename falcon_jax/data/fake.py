"""Made-up images whose class can be learned, for smoke runs and benchmarks."""

import os
import tempfile
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from falcon_jax.data.dataset import SourceOptions, SourceSplits, Split
from falcon_jax.paths import user_path

_PATTERN = 4  # each class is a random pattern of 4x4 blocks
_NOISE = 32  # the noise is uniform in [-32, 32]


def load_fake(options: SourceOptions, *, seed: int = 0) -> SourceSplits:
    """Make 2,000 training and 500 test images of ten classes, three channels.

    Args:
        options: image_size of the images.
        seed: the same seed makes the same images.

    Returns:
        the splits, images (n, image_size, image_size, 3).
    """
    return make_fake(image_size=options.image_size, seed=seed)


def make_fake(
    *,
    image_size: int,
    seed: int,
    num_train: int = 2000,
    num_test: int = 500,
    num_classes: int = 10,
    channels: int = 3,
) -> SourceSplits:
    """Make images that are a random pattern of their class plus noise.

    Args:
        image_size: height and width, pixels.
        seed: the same seed makes the same images.
        num_train: number of training images.
        num_test: number of test images.
        num_classes: number of classes, in turn over the images.
        channels: number of channels.

    Returns:
        the splits, images (n, image_size, image_size, channels).
    """
    random = np.random.default_rng(seed)
    blocks = random.integers(
        _NOISE, 256 - _NOISE, (num_classes, _PATTERN, _PATTERN, channels), dtype=np.int16
    )
    rows = np.arange(image_size) * _PATTERN // image_size
    patterns = blocks[:, rows[:, None], rows[None, :]]

    def make(n: int) -> Split:
        labels = np.arange(n, dtype=np.int32) % num_classes
        shape = (n, image_size, image_size, channels)
        noise = random.integers(-_NOISE, _NOISE, shape, dtype=np.int16, endpoint=True)
        return Split(images=(patterns[labels] + noise).astype(np.uint8), labels=labels)

    return SourceSplits(
        name="fake", num_classes=num_classes, train=make(num_train), test=make(num_test)
    )


_VARIATION = 0.3  # sides vary by this share of the mean side
_PERIODS = 6.0  # of a class's pattern, along the mean side
_FINE_NOISE = 12.0  # standard deviation; makes files as large as those of photographs
_COARSE_NOISE = 25.0


def make_image_folder(
    directory: str | os.PathLike[str],
    *,
    num_classes: int = 10,
    num_train: int = 500,
    num_val: int = 100,
    side: int = 400,
    seed: int = 0,
    quality: int = 90,
) -> Path:
    """Write train/ and val/, each with one folder a class, full of JPEG images of varying sizes.

    A class is a checkered pattern of two colours in one direction, so that crops and mirror images
    show it, too; noise is added. Either the whole folder appears, or nothing.

    Args:
        directory: the folder to make; it may exist if it is empty.
        num_classes: number of classes, in turn over the images.
        num_train: number of training images.
        num_val: number of validation images.
        side: mean height and width, pixels; each varies by 30% on its own.
        seed: the same seed makes the same images.
        quality: of JPEG, 1 to 95.

    Returns:
        the folder.

    Raises:
        ValueError: if a number is out of range.
        OSError: if the folder is not empty or cannot be written.
    """
    least = {"num_classes": 1, "num_train": num_classes, "num_val": num_classes, "side": 8}
    given = {"num_classes": num_classes, "num_train": num_train, "num_val": num_val, "side": side}
    for name, value in given.items():
        if value < least[name]:
            raise ValueError(f"{name} must be {least[name]} or more, but is {value}")
    if seed < 0 or not 1 <= quality <= 95:
        raise ValueError(f"seed must be 0 or more and quality 1 to 95, not {seed} and {quality}")
    directory = user_path(directory).absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} is there already and is not an empty folder")
    directory.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    colours = random.uniform(40, 215, (num_classes, 2, 3))
    angles = random.permutation(num_classes) * (np.pi / num_classes)
    digits = len(str(num_classes - 1))
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".making-") as temporary:
        made = Path(temporary) / "made"
        for split, count in (("train", num_train), ("val", num_val)):
            for i in range(count):
                label = i % num_classes
                pixels = _image(random, colours[label], angles[label], side)
                path = made / split / f"class_{label:0{digits}d}" / f"{i:06d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path, quality=quality)
        os.replace(made, directory)
    return directory


def _image(
    random: np.random.Generator, colours: np.ndarray, angle: float, side: int
) -> UInt8[np.ndarray, "h w 3"]:
    height, width = np.rint(side * random.uniform(1 - _VARIATION, 1 + _VARIATION, 2)).astype(int)
    rows, columns = np.mgrid[0:height, 0:width] * (2 * np.pi * _PERIODS / side)
    along = np.sin(np.cos(angle) * rows + np.sin(angle) * np.abs(columns - columns.mean()))
    share = (0.5 + 0.5 * along)[..., None]
    coarse = random.normal(0, _COARSE_NOISE, (height // 16 + 2, width // 16 + 2, 3))
    coarse = coarse.repeat(16, axis=0).repeat(16, axis=1)[:height, :width]
    noise = coarse + random.normal(0, _FINE_NOISE, (height, width, 3))
    pixels = colours[0] * share + colours[1] * (1 - share) + noise
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
