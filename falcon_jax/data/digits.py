"""Scikit-learn's handwritten digits: 1,797 real 8x8 images that come with the package."""

import numpy as np

from falcon_jax.data.dataset import SourceOptions, SourceSplits, Split, stratified_split

_TEST_FRACTION = 0.2
_TEST_SEED = 1797  # fixed, so that every run is scored on the same images


def load_digits(options: SourceOptions, *, seed: int = 0) -> SourceSplits:
    """Load the digits: 8x8 grey images, ten classes.

    There is no official test split: a stratified 20% is set aside, always the same.

    Args:
        options: nothing in it concerns this source.
        seed: without effect.

    Returns:
        the splits, images (n, 8, 8, 1).

    Raises:
        ImportError: if scikit-learn is not installed.
    """
    del options, seed
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            f'the source "digits" needs scikit-learn ({error}): pip install "falcon-jax[train]"'
        ) from error
    values, labels = datasets.load_digits(return_X_y=True)
    images = np.rint(np.asarray(values) * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    everything = Split(images=images, labels=np.asarray(labels).astype(np.int32))
    train, test = stratified_split(everything, _TEST_FRACTION, _TEST_SEED)
    return SourceSplits(name="digits", num_classes=10, train=train, test=test)
