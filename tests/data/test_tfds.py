import json
import sys
import time

import numpy as np
import pytest

from falcon_jax.data.dataset import SourceOptions
from falcon_jax.data.tfds import load_tfds, prepare_command, prepared_directory, tfds_directory
from tests.data import tiny_tfds


def prepare(builder_class, directory):
    builder_class(data_dir=directory, file_format="array_record").download_and_prepare()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    for builder_class in (
        tiny_tfds.TinySet,
        tiny_tfds.TinyValidated,
        tiny_tfds.TinyTrainOnly,
        tiny_tfds.TinyUnlabelled,
        tiny_tfds.TinyDeep,
        tiny_tfds.TinyFloat,
        tiny_tfds.TinyFloatRagged,
    ):
        prepare(builder_class, directory)
    return directory


def load(name, data_dir):
    return load_tfds(SourceOptions(name=name, data_dir=str(data_dir)))


def by_content(images, labels):
    return sorted(
        (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
    )


def test_reads_what_was_prepared(data_dir):
    splits = load("tiny_set", data_dir)
    assert (splits.name, splits.num_classes, splits.validation) == ("tiny_set", 4, None)
    for split, name in ((splits.train, "train"), (splits.test, "test")):
        images = tiny_tfds.tiny_images(name)
        assert split.images.dtype == np.uint8
        # TFDS shuffles when it prepares.
        assert by_content(split.images, split.labels) == by_content(
            images, np.arange(len(images)) % tiny_tfds.CLASSES
        )


def test_images_of_16_bits_and_floats_are_scaled(data_dir):
    for name in ("tiny_deep", "tiny_float"):
        images = tiny_tfds.tiny_images("test")
        split = load(name, data_dir).test
        assert by_content(split.images, split.labels) == by_content(
            images, np.arange(len(images)) % tiny_tfds.CLASSES
        )


def test_own_validation_split_is_read(data_dir):
    splits = load("tiny_validated", data_dir)
    assert splits.validation is not None
    assert len(splits.validation) == 4


def test_version_can_be_named(data_dir):
    assert len(load("tiny_set:1.2.0", data_dir).train) == 20
    with pytest.raises(FileNotFoundError, match=r"tiny_set:1\.0\.0 is not prepared"):
        load("tiny_set:1.0.0", data_dir)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny_train_only", "no split 'test', only train"),
        ("tiny_unlabelled", 'features image, label; needed are "image" and "label" .a class'),
        ("tiny_float_ragged", "holds float32 values whose shape varies; they must be images of"),
        ("", "'' cannot be the name"),
        ("../tiny_set", "cannot be the name"),
    ],
)
def test_unfit_data_sets_are_refused(data_dir, name, message):
    with pytest.raises(ValueError, match=message):
        load(name, data_dir)


def test_unprepared_fails_at_once_and_says_what_to_run(tmp_path):
    start = time.monotonic()
    command = f"python -m falcon_jax prepare --name cifar10 --data-dir {tmp_path}"
    with pytest.raises(FileNotFoundError, match=command):
        load("cifar10", tmp_path)
    assert time.monotonic() - start < 1.0


def test_damaged_file_is_named(tmp_path):
    prepare(tiny_tfds.TinySet, tmp_path)
    [path] = tmp_path.glob("tiny_set/*/*-test.array_record*")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"test\.array_record-.* is missing or damaged"):
        load("tiny_set", tmp_path)


def fake_preparation(root, version, content='{"fileFormat": "array_record"}'):
    (root / version).mkdir(parents=True)
    (root / version / "dataset_info.json").write_text(content)


def test_newest_version_is_found_by_number(tmp_path):
    for version in ("9.0.0", "10.1.0", "10.0.9", "incomplete"):
        fake_preparation(tmp_path / "toy", version)
    assert prepared_directory("toy", str(tmp_path)) == tmp_path / "toy" / "10.1.0"
    assert prepared_directory("toy:9.0.0", str(tmp_path)) == tmp_path / "toy" / "9.0.0"


def test_configs_that_are_prepared_are_listed(tmp_path):
    fake_preparation(tmp_path / "toy" / "small", "1.0.0")
    with pytest.raises(FileNotFoundError, match="prepared there: toy/small"):
        prepared_directory("toy", str(tmp_path))
    expected = tmp_path / "toy" / "small" / "1.0.0"
    assert prepared_directory("toy/small", str(tmp_path)) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps({"fileFormat": "tfrecord"}), "prepared as tfrecord"),
        ("{}", "prepared as tfrecord"),
        ("{", r"dataset_info\.json is damaged"),
        ("[]", r"dataset_info\.json is damaged"),
    ],
)
def test_other_formats_and_damage_are_refused(tmp_path, content, message):
    fake_preparation(tmp_path / "toy", "1.0.0", content)
    with pytest.raises(ValueError, match=message):
        prepared_directory("toy", str(tmp_path))


def test_default_directory_is_tfds_own(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert tfds_directory("") == tmp_path
    assert prepare_command("toy", "").endswith(f"--data-dir {tmp_path}")
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tfds_directory("") == tmp_path / "tensorflow_datasets"


def test_missing_tfds_names_the_extra(data_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r'pip install "falcon-jax\[train\]"'):
        load("tiny_set", data_dir)
