import numpy as np

from falcon_jax.data.dataset import SourceOptions
from falcon_jax.data.fake import load_fake, make_fake


def test_same_seed_same_images():
    one, same, other = (
        make_fake(image_size=8, seed=s, num_train=20, num_test=10) for s in (1, 1, 2)
    )
    np.testing.assert_array_equal(one.train.images, same.train.images)
    assert (one.train.images != other.train.images).any()
    assert (one.train.images[:10] != one.test.images).any()


def test_shapes_and_classes():
    splits = load_fake(SourceOptions(image_size=12), seed=0)
    assert splits.train.images.shape == (2000, 12, 12, 3)
    assert splits.test.images.shape == (500, 12, 12, 3)
    assert np.bincount(splits.test.labels).tolist() == [50] * 10


def test_class_can_be_learned_by_nearest_mean():
    splits = make_fake(image_size=16, seed=0, num_train=200, num_test=100, channels=1)
    train = splits.train.images.astype(float)
    means = np.stack([train[splits.train.labels == k].mean(axis=0).ravel() for k in range(10)])
    test = splits.test.images.reshape(100, -1).astype(float)
    nearest = ((test[:, None] - means[None]) ** 2).sum(axis=2).argmin(axis=1)
    np.testing.assert_array_equal(nearest, splits.test.labels)
