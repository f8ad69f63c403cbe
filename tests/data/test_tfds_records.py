import io
import logging
import pickle

import numpy as np
import pytest
from PIL import Image

from falcon_jax.data import tfds as tfds_records
from falcon_jax.data.loading import DataConfig, load_dataset
from falcon_jax.data.streamed import StreamedSplit
from tests.data import tiny_tfds


def prepare(builder_class, directory):
    builder_class(data_dir=directory, file_format="array_record").download_and_prepare()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    for builder_class in (tiny_tfds.TinyRagged, tiny_tfds.Imagenet2012):
        prepare(builder_class, directory)
    return directory


def load(name, directory, **options):
    options = {"image_size": 4, "validation_fraction": 0.0, **options}
    return load_dataset(DataConfig(source="tfds", name=name, data_dir=str(directory), **options))


def pixels(split):
    return [np.asarray(Image.open(io.BytesIO(split.records.read(int(p))))) for p in split.positions]


def test_images_that_vary_in_size_are_streamed(made):
    data = load("tiny_ragged", made)
    assert isinstance(data.train, StreamedSplit)
    assert (data.num_classes, len(data.train), len(data.test)) == (4, 20, 8)
    assert data.train.image_shape == (4, 4, 3)
    for split, name in ((data.train, "train"), (data.test, "test")):
        images = tiny_tfds.ragged_images(name)
        # TFDS shuffles when it prepares.
        found = sorted((i.tobytes(), int(n)) for i, n in zip(pixels(split), split.labels))  # noqa: B905
        assert found == sorted((image.tobytes(), i % 4) for i, image in enumerate(images))


def test_the_validation_split_of_imagenet_is_its_test_split(made):
    data = load("imagenet2012", made, validation_fraction=0.2)
    assert len(data.test) == 4
    assert isinstance(data.validation, StreamedSplit)
    assert np.bincount(data.validation.labels).tolist() == [1] * 4


def test_labels_are_kept_while_the_data_is_the_same(made, monkeypatch):
    first = load("tiny_ragged", made)
    kept = next(made.glob("tiny_ragged/*/labels-train.npz"))

    def fail(records):
        raise AssertionError("the records were read again")

    with monkeypatch.context() as patched:
        patched.setattr(tfds_records, "_scan", fail)
        again = load("tiny_ragged", made)
    np.testing.assert_array_equal(again.train.labels, first.train.labels)

    scans = []
    scan = tfds_records._scan

    def counted(records):
        scans.append(records.split)
        return scan(records)

    monkeypatch.setattr(tfds_records, "_scan", counted)
    kept.write_bytes(kept.read_bytes()[:100])
    np.testing.assert_array_equal(load("tiny_ragged", made).train.labels, first.train.labels)
    assert scans == ["train"]
    next(made.glob("tiny_ragged/*/*-test.array_record*")).touch()
    load("tiny_ragged", made)
    assert scans == ["train", "test"]


def test_a_directory_that_cannot_be_written_is_read_every_time(made, monkeypatch):
    def fail(*arguments, **options):
        raise PermissionError

    for kept in made.glob("tiny_ragged/*/labels-*"):
        kept.unlink()
    monkeypatch.setattr(tfds_records.tempfile, "NamedTemporaryFile", fail)
    assert len(load("tiny_ragged", made).train) == 20
    assert not list(made.glob("tiny_ragged/*/labels-*"))


def test_records_go_to_workers_unopened(made):
    records = load("tiny_ragged", made).train.records
    content = records.read(3)
    sent = pickle.loads(pickle.dumps(records))
    assert sent._source is None
    assert sent.read(3) == content
    assert sent.name(3).endswith("tiny_ragged/1.2.0: image 3 of split train")


class TinyBroken(tiny_tfds.TinyRagged):
    def _generate_examples(self, split):
        for i, example in super()._generate_examples(split):
            broken = split == "train" and i in (3, 5)
            yield i, example | ({"image": io.BytesIO(b"no image")} if broken else {})


class TinyBadLabel(tiny_tfds.TinyRagged):
    def _generate_examples(self, split):
        for i, example in super()._generate_examples(split):
            yield i, example | ({"label": -1} if (split, i) == ("test", 2) else {})


def test_broken_images_are_told_or_left_out(tmp_path, caplog):
    prepare(TinyBroken, tmp_path)
    told = r"2 of 20 images of .*tiny_broken/1\.2\.0, split train, cannot be read: .*: image \d+ of"
    with pytest.raises(ValueError, match=told):
        load("tiny_broken", tmp_path)
    with caplog.at_level(logging.WARNING):
        data = load("tiny_broken", tmp_path, skip_broken=True)
    assert len(data.train) == 18
    assert len(data.train.skipped) == 2
    assert "2 of 20 images" in caplog.text
    assert not list(tmp_path.glob("tiny_broken/*/labels-train.npz"))


def test_labels_out_of_range_are_told(tmp_path):
    prepare(TinyBadLabel, tmp_path)
    told = r"image \d of split test has label -1, but with 4 classes labels run from 0 to 3"
    for _ in range(2):
        with pytest.raises(ValueError, match=told):
            load("tiny_bad_label", tmp_path)


def test_damaged_records_are_told(tmp_path):
    prepare(tiny_tfds.TinyRagged, tmp_path)
    [path] = tmp_path.glob("tiny_ragged/*/*-test.array_record*")
    content = path.read_bytes()
    at = content.index(b"PNG")
    path.write_bytes(content[:at] + b"JNG" + content[at + 3 :])
    told = r"tiny_ragged/1\.2\.0: image 0 of split test, or one soon after, cannot be read: "
    with pytest.raises(ValueError, match=told) as caught:
        load("tiny_ragged", tmp_path)
    assert "\n" not in str(caught.value)
