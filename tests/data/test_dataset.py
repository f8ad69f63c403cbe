import dataclasses

import jaxtyping
import numpy as np
import pytest

from falcon_jax.data.dataset import (
    Dataset,
    Split,
    channel_statistics,
    hold_out,
    shuffled,
    stratified_split,
)


def make_split(labels, shape=(4, 4, 1)):
    labels = np.asarray(labels, np.int32)
    values = np.arange(len(labels) * np.prod(shape)) % 251
    return Split(images=values.astype(np.uint8).reshape(-1, *shape), labels=labels)


def make_dataset(**changes):
    split = make_split([0, 1, 2])
    toy = Dataset(
        name="toy", num_classes=3, train=split, validation=None, test=split, mean=(0.5,), std=(0.2,)
    )
    return dataclasses.replace(toy, **changes)


@pytest.fixture
def as_users_have_it():
    """Without the run-time checks of annotations, which only tests have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 4, 4), np.uint8), np.zeros(2, np.int32), r"\(n, h, w, c\).*\(2, 4, 4\)"),
        (np.zeros((2, 4, 4, 1), np.float32), np.zeros(2, np.int32), "uint8.*float32"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, np.int64), "int32.*int64"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros((2, 1), np.int32), r"\(n,\).*\(2, 1\)"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(3, np.int32), "2 images but 3 labels"),
        (np.zeros((0, 4, 4, 1), np.uint8), np.zeros(0, np.int32), "must hold images"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.array([0, -1], np.int32), "smallest is -1"),
    ],
)
def test_split_refuses_what_is_not_images_and_labels(images, labels, message):
    with pytest.raises(ValueError, match=message):
        Split(images=images, labels=labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": make_split([0], (5, 4, 1))}, r"split test are \(5, 4, 1\)"),
        ({"test": make_split([3])}, "split test has label 3, but with 3 classes"),
        ({"validation": make_split([7])}, "split validation has label 7"),
        ({"mean": (0.5, 0.5)}, "each of 1 channels, but have 2 and 1"),
        ({"std": (0.0,)}, "constant"),
    ],
)
def test_dataset_refuses_splits_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        make_dataset(**changes)


def test_channel_statistics_match_float64():
    images = np.random.default_rng(0).integers(0, 256, (2500, 3, 5, 2), dtype=np.uint8)
    mean, std = channel_statistics(images)
    unit = images.astype(np.float64) / 255
    np.testing.assert_allclose(mean, unit.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, unit.std(axis=(0, 1, 2)), rtol=1e-12)


def test_hold_out_takes_the_same_share_of_every_class():
    labels = np.repeat([0, 1, 2, 3], [100, 50, 10, 2])
    split = make_split(labels)
    rest, held = hold_out(split, 0.2, seed=3)
    assert held is not None
    assert np.bincount(held.labels).tolist() == [20, 10, 2, 1]
    assert np.bincount(rest.labels).tolist() == [80, 40, 8, 1]


def test_hold_out_divides_without_loss_or_repetition():
    split = make_split(np.arange(60) % 3, (2, 2, 1))
    rest, held = hold_out(split, 0.25, seed=1)
    assert held is not None
    both = np.concatenate([rest.images, held.images]).reshape(60, -1)
    np.testing.assert_array_equal(
        sorted(map(tuple, both)), sorted(map(tuple, split.images.reshape(60, -1)))
    )


def test_hold_out_depends_on_the_seed_only():
    split = make_split(np.arange(200) % 4)
    first, again, other = (hold_out(split, 0.3, seed)[0].images for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_hold_out_nothing():
    split = make_split([0, 1])
    assert hold_out(split, 0.0, seed=0) == (split, None)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 7.0, float("nan")])
def test_hold_out_refuses_fractions_outside_its_range(fraction):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        hold_out(make_split([0, 0, 1, 1]), fraction, seed=0)


def test_stratified_split_refuses_classes_of_one_image():
    with pytest.raises(ValueError, match="every class has only one"):
        stratified_split(make_split([0, 1, 2]), 0.5, seed=0)


def test_shuffled_is_a_permutation_fixed_for_good():
    order = shuffled(1000, 5, 9)
    np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    # Raw PCG64 draws, sorted by Python: the definition, and independent of Generator.
    draws = np.random.PCG64([5, 9]).random_raw(6).tolist()
    assert shuffled(6, 5, 9).tolist() == sorted(range(6), key=draws.__getitem__)
    assert shuffled(6, 0, 0).tolist() != shuffled(6, 0, 1).tolist()


def test_shuffled_refuses_negative_seeds():
    with pytest.raises(ValueError, match=r"0 or more, but got \(-1, 0\)"):
        shuffled(3, -1, 0)
