import dataclasses

import numpy as np
import pytest

from falcon_jax.data import loading
from falcon_jax.data.dataset import SourceSplits, Split
from falcon_jax.data.fake import make_fake
from falcon_jax.data.loading import DataConfig, load_dataset


def test_digits_ready_for_training():
    data = load_dataset(DataConfig(source="digits", validation_fraction=0.1))
    assert data.train.images.shape[1:] == (32, 32, 1)
    assert data.validation is not None
    assert len(data.train) + len(data.validation) + len(data.test) == 1797
    pixels = data.train.images.astype(np.float64) / 255
    np.testing.assert_allclose(data.mean, [pixels.mean()], rtol=1e-12)
    np.testing.assert_allclose(data.std, [pixels.std()], rtol=1e-12)


def test_seed_changes_the_held_out_split_but_not_the_test_split():
    one, two = (
        load_dataset(DataConfig(source="digits", image_size=8), seed=seed) for seed in (0, 1)
    )
    assert one.validation is not None
    assert two.validation is not None
    np.testing.assert_array_equal(one.test.images, two.test.images)
    assert (one.validation.images != two.validation.images).any()


def test_no_validation_split_on_request():
    data = load_dataset(DataConfig(source="digits", image_size=8, validation_fraction=0.0))
    assert data.validation is None
    assert len(data.train) + len(data.test) == 1797


@pytest.fixture
def own_validation(monkeypatch):
    parts = make_fake(image_size=4, seed=0, num_train=40, num_test=20)
    validation = Split(images=parts.test.images[:10] // 2, labels=parts.test.labels[:10])
    splits = SourceSplits(
        name="own", num_classes=10, train=parts.train, test=parts.test, validation=validation
    )
    monkeypatch.setattr(loading, "SOURCES", {"own": lambda options, seed: splits})
    return splits


def test_own_validation_split_is_kept(own_validation):
    data = load_dataset(DataConfig(source="own", image_size=4))
    assert data.validation is not None
    np.testing.assert_array_equal(data.validation.images, own_validation.validation.images)
    assert len(data.train) == 40


def test_own_validation_split_is_left_out_on_request(own_validation):
    assert (
        load_dataset(DataConfig(source="own", image_size=4, validation_fraction=0.0)).validation
        is None
    )


def test_smoke_runs_keep_name_and_data_dir():
    data = load_dataset(
        DataConfig(source="fake", name="cifar10", data_dir="/nowhere", image_size=8)
    )
    assert data.name == "fake"


def test_sources_that_contradict_themselves_are_refused():
    splits = make_fake(image_size=4, seed=0, num_train=40, num_test=20)
    with pytest.raises(ValueError, match=r"own: images of split test are \(5, 5, 3\) "):
        dataclasses.replace(
            splits, name="own", test=make_fake(image_size=5, seed=0, num_test=10).test
        )
    with pytest.raises(ValueError, match="own: split train has label 9, but with 9 classes"):
        dataclasses.replace(splits, name="own", num_classes=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "digit"}, "there are digits, idx, tfds, fake, folder; did you mean 'digits'"),
        ({"source": "?"}, "'[?]'; there are digits, idx, tfds, fake, folder$"),
        (
            {"source": "fake", "resize": "crop"},
            "resize: there is no 'crop'; there are auto, pad, bilinear, none",
        ),
        ({"source": "fake", "image_size": 0}, "image_size must be 1 or more, but is 0"),
        ({"source": "digits", "image_size": 4, "resize": "pad"}, "8x8 pixels cannot be padded"),
        (
            {"source": "fake", "validation_fraction": 1.5},
            r"validation_fraction must be in \[0, 1\), but is 1.5",
        ),
        ({"source": "fake", "seed": -1}, "the seed must be 0 or more, but is -1"),
    ],
)
def test_bad_options_are_refused(options, message):
    seed = options.pop("seed", 0)
    with pytest.raises(ValueError, match=message):
        load_dataset(DataConfig(**options), seed=seed)
