import sys

import numpy as np
import pytest
from sklearn import datasets

from falcon_jax.data.dataset import SourceOptions
from falcon_jax.data.digits import load_digits


def test_digits_are_scikit_learns():
    splits = load_digits(SourceOptions())
    assert (splits.name, splits.num_classes, splits.validation) == ("digits", 10, None)
    images = np.concatenate([splits.train.images, splits.test.images])
    assert images.shape == (1797, 8, 8, 1)
    values, labels = datasets.load_digits(return_X_y=True)
    ours = {
        (tuple(image.ravel()), int(label))
        for split in (splits.train, splits.test)
        for image, label in zip(split.images, split.labels, strict=True)
    }
    theirs = {
        (tuple(round(v * 255 / 16) for v in image), int(label))
        for image, label in zip(values.tolist(), labels, strict=True)
    }
    assert ours == theirs


def test_digits_test_split_is_stratified_and_fixed():
    first, other_seed = load_digits(SourceOptions()), load_digits(SourceOptions(), seed=7)
    np.testing.assert_array_equal(first.test.images, other_seed.test.images)
    counts = np.bincount(first.train.labels) + np.bincount(first.test.labels)
    np.testing.assert_array_equal(np.bincount(first.test.labels), np.rint(0.2 * counts))


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r'pip install "falcon-jax\[train\]"'):
        load_digits(SourceOptions())
