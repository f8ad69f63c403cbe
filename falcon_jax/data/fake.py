"""Made-up images whose class can be learned, for smoke runs and benchmarks."""

from __future__ import annotations

import numpy as np

from falcon_jax.data.dataset import Split
from falcon_jax.data.source import SourceOptions, SourceSplits

_PATTERN = 4  # each class is a random pattern of 4x4 blocks
_NOISE = 32  # the noise is uniform in [-32, 32]


def load_fake(options: SourceOptions) -> SourceSplits:
    """Makes 2,000 training and 500 test images of ten classes, three channels.

    Args:
        options: image_size and seed of the images.

    Returns:
        the splits, images (n, image_size, image_size, 3).
    """
    return make_fake(image_size=options.image_size, seed=options.seed)


def make_fake(
    *,
    image_size: int,
    seed: int,
    num_train: int = 2000,
    num_test: int = 500,
    num_classes: int = 10,
    channels: int = 3,
) -> SourceSplits:
    """Makes images that are a random pattern of their class plus noise.

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
