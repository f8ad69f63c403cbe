import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from falcon_jax.data.dataset import SourceOptions
from falcon_jax.data.idx import FASHION_MNIST_DIRECTORY, load_idx, read_idx

IMAGES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
LABELS = {"train": "train-labels-idx1-ubyte", "test": "t10k-labels-idx1-ubyte"}


def idx_bytes(values, code=8):
    shape = struct.pack(f">{values.ndim}I", *values.shape)
    return bytes([0, 0, code, values.ndim]) + shape + values.tobytes()


def write(path, content, gzipped):
    if gzipped:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


@pytest.fixture
def arrays():
    random = np.random.default_rng(0)
    return {
        "train": (
            random.integers(0, 256, (30, 5, 4), dtype=np.uint8),
            np.arange(30, dtype=np.uint8) % 3,
        ),
        "test": (
            random.integers(0, 256, (9, 5, 4), dtype=np.uint8),
            np.arange(9, dtype=np.uint8) % 3,
        ),
    }


def write_all(directory, arrays, gzipped=True):
    for split, (images, labels) in arrays.items():
        write(directory / IMAGES[split], idx_bytes(images), gzipped)
        write(directory / LABELS[split], idx_bytes(labels), gzipped)
    return SourceOptions(data_dir=str(directory))


@pytest.mark.parametrize("gzipped", [True, False])
def test_reads_what_was_written(tmp_path, arrays, gzipped):
    splits = load_idx(write_all(tmp_path, arrays, gzipped))
    assert splits.num_classes == 3
    assert splits.name == tmp_path.name
    for split, (images, labels) in zip((splits.train, splits.test), arrays.values(), strict=True):
        np.testing.assert_array_equal(split.images[..., 0], images)
        np.testing.assert_array_equal(split.labels, labels)


def write_named(directory, arrays, name, pack=bytes):
    """Writes the four files; name has places for the split, images or labels, and dimensions."""
    for split, both in arrays.items():
        for what, values in zip(("images", "labels"), both, strict=True):
            path = directory / name.format(split=split, what=what, n=values.ndim)
            path.write_bytes(pack(idx_bytes(values)))
    return SourceOptions(data_dir=str(directory))


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize(
    "name",
    [
        "{split}-{what}.idx{n}-ubyte",
        "{split}-{what}-idx{n}-ubyte.gz",
        "{split}_{what}.IDX{n}",
        "{split}-{what}.gz",
        "emnist-digits-{split}-{what}-idx{n}-ubyte",
    ],
)
def test_names_and_packing_that_people_have(tmp_path, arrays, name, pack):
    splits = load_idx(write_named(tmp_path, arrays, name, pack))
    assert splits.name == ("emnist-digits" if "emnist" in name else tmp_path.name)
    for split, (images, labels) in zip((splits.train, splits.test), arrays.values(), strict=True):
        np.testing.assert_array_equal(split.images[..., 0], images)
        np.testing.assert_array_equal(split.labels, labels)


def test_of_several_sets_one_is_named(tmp_path, arrays):
    write_named(tmp_path, arrays, "emnist-digits-{split}-{what}-idx{n}-ubyte")
    letters = {split: (images, labels + 1) for split, (images, labels) in arrays.items()}
    write_named(tmp_path, letters, "emnist-letters-{split}-{what}-idx{n}-ubyte")
    for name in ("", "emnist-balanced"):
        with pytest.raises(ValueError, match=r"the files of emnist-digits, emnist-letters; give"):
            load_idx(SourceOptions(name=name, data_dir=str(tmp_path)))
    splits = load_idx(SourceOptions(name="emnist-digits", data_dir=str(tmp_path)))
    np.testing.assert_array_equal(splits.train.labels, arrays["train"][1])


def test_labels_from_1_on_are_counted_from_0_and_that_is_logged(tmp_path, arrays, caplog):
    letters = {split: (images, labels + 1) for split, (images, labels) in arrays.items()}
    splits = load_idx(write_named(tmp_path, letters, "emnist-letters-{split}-{what}-idx{n}-ubyte"))
    assert splits.num_classes == 3
    for split, (_, labels) in zip((splits.train, splits.test), arrays.values(), strict=True):
        np.testing.assert_array_equal(split.labels, labels)
    assert "labels 1 to 3 are counted from 0" in caplog.text


def test_a_file_unpacked_beside_its_archive_is_one_but_two_files_are_told(tmp_path, arrays):
    write_all(tmp_path, arrays, gzipped=True)
    load_idx(write_all(tmp_path, arrays, gzipped=False))
    (tmp_path / "train-images.idx3-ubyte").write_bytes(idx_bytes(arrays["train"][0]))
    told = r"several files of the train images: train-images-idx3-ubyte, train-images\.idx3-ubyte; "
    with pytest.raises(ValueError, match=told):
        load_idx(SourceOptions(data_dir=str(tmp_path)))


def test_a_folder_without_such_files_says_what_they_are_called(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"PK")
    with pytest.raises(FileNotFoundError, match="no file with a name such as train-images-idx3"):
        load_idx(SourceOptions(data_dir=str(tmp_path)))


def test_name_is_the_users(tmp_path, arrays):
    write_all(tmp_path, arrays)
    assert load_idx(SourceOptions(name="mine", data_dir=str(tmp_path))).name == "mine"


def test_missing_directory_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        load_idx(SourceOptions(data_dir=str(tmp_path / "nowhere")))


def test_missing_file_is_named(tmp_path, arrays):
    options = write_all(tmp_path, arrays)
    (tmp_path / f"{LABELS['test']}.gz").unlink()
    with pytest.raises(FileNotFoundError, match="neither t10k-labels-idx1-ubyte nor"):
        load_idx(options)


def replace_labels(split, labels):
    def change(directory, arrays):
        write(directory / LABELS[split], idx_bytes(np.asarray(labels, np.uint8)), True)

    return change


def replace_images(content):
    def change(directory, arrays):
        write(directory / IMAGES["train"], content(arrays["train"][0]), True)

    return change


def edit_file(edit):
    def change(directory, arrays):
        path = directory / f"{IMAGES['train']}.gz"
        path.write_bytes(edit(path.read_bytes()))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (replace_labels("train", np.arange(29) % 3), r"train-images.*30 images.*29 labels"),
        (replace_labels("train", [0, 1, 5] * 10), "go up to 5 but none is 2"),
        (replace_labels("train", [2, 3] * 15), "go up to 3 but none is 1"),
        (replace_labels("train", [1, 2] * 15), "a test label is 0 but .* from 1 up to 2"),
        (replace_labels("test", [0, 1, 3] * 3), "a test label is 3 but .* up to 2"),
        (replace_images(lambda a: idx_bytes(a, code=13)), "begins with 00000d03, not 00000803"),
        (replace_images(lambda a: idx_bytes(a[0])), "begins with 00000802"),
        (replace_images(lambda a: b""), "begins with nothing"),
        (replace_images(lambda a: idx_bytes(a)[:9]), "ends within its header"),
        (replace_images(lambda a: idx_bytes(a)[:-1]), r"fewer values than the shape \(30, 5, 4\)"),
        (replace_images(lambda a: idx_bytes(a) + b"x"), "more values than the shape"),
        (
            replace_images(lambda a: idx_bytes(a)[:4] + b"\xff" * 12),
            "too short for the shape",
        ),
        (replace_images(lambda a: idx_bytes(a[:0])), "holds no images"),
        (
            replace_images(lambda a: idx_bytes(a[:, :4])),
            r"t10k-images-idx3-ubyte\.gz are \(5, 4, 1\) .*, but those of train-.* \(4, 4, 1\)",
        ),
        (edit_file(lambda b: b[: len(b) // 2]), "truncated or damaged"),
        (edit_file(lambda b: b[:-6]), "truncated or damaged"),
        (edit_file(lambda b: b[:40] + bytes([b[40] ^ 255]) + b[41:]), "truncated or damaged"),
        (edit_file(lambda b: b"not gzip at all, but long enough"), "begins with 6e6f7420"),
    ],
)
def test_damage_is_named_in_one_sentence(tmp_path, arrays, damage, message):
    options = write_all(tmp_path, arrays)
    damage(tmp_path, arrays)
    with pytest.raises(ValueError, match=message) as caught:
        load_idx(options)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_truncation_is_refused(tmp_path):
    content = gzip.compress(idx_bytes(np.arange(12, dtype=np.uint8).reshape(3, 2, 2)))
    path = tmp_path / "images.gz"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"images\.gz"):
            read_idx(path, 3)


def test_no_flipped_bit_of_a_gzipped_file_passes_unseen(tmp_path):
    values = np.random.default_rng(1).integers(0, 256, (3, 2, 2), dtype=np.uint8)
    content = gzip.compress(idx_bytes(values))
    path = tmp_path / "images.gz"
    refused = 0
    for i in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[i // 8] ^= 1 << i % 8
        path.write_bytes(damaged)
        try:
            np.testing.assert_array_equal(read_idx(path, 3), values)  # a time stamp or the like
        except ValueError as error:
            refused += 1
            assert str(path) in str(error)
            assert "\n" not in str(error)
    assert refused > 8 * (len(content) - 10)


@pytest.mark.skipif(not Path(FASHION_MNIST_DIRECTORY).is_dir(), reason="Fashion-MNIST is not here")
def test_fashion_mnist():
    splits = load_idx(SourceOptions())
    assert splits.name == "fashion-mnist"
    assert splits.train.images.shape == (60000, 28, 28, 1)
    assert np.bincount(splits.train.labels).tolist() == [6000] * 10
    assert np.bincount(splits.test.labels).tolist() == [1000] * 10
    # The published statistics of the training images.
    assert abs(splits.train.images.mean() / 255 - 0.2860) < 1e-4
    assert abs(splits.train.images.std() / 255 - 0.3530) < 1e-4
