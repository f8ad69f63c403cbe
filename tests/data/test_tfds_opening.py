import json

import numpy as np
import pytest

from falcon_jax.data.loading import DataConfig, load_dataset
from tests.data import tiny_tfds

BUILDERS = {"tiny_set": tiny_tfds.TinySet, "tiny_ragged": tiny_tfds.TinyRagged}


@pytest.fixture(params=BUILDERS)
def prepared(request, tmp_path):
    builder = BUILDERS[request.param](data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()

    def load():
        data = load_dataset(
            DataConfig(
                source="tfds",
                name=request.param,
                data_dir=str(tmp_path),
                image_size=6,
                resize="auto",
                validation_fraction=0.0,
            )
        )
        splits = (data.train, data.test)
        for kept in directory.glob("labels-*.npz"):
            kept.unlink()
        return [(s.labels, s.evaluation_rows(range(len(s))).images) for s in splits]

    directory = tmp_path / request.param / "1.2.0"
    return directory, load


def refused(load):
    with pytest.raises((ValueError, OSError)) as caught:
        load()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_and_cut_files_are_named(prepared):
    directory, load = prepared
    for path in sorted(directory.iterdir()):
        content = path.read_bytes()
        for length in (None, 0, len(content) // 2, len(content) - 1):
            path.unlink() if length is None else path.write_bytes(content[:length])
            message = refused(load)
            assert str(directory) in message or "is not prepared" in message
        path.write_bytes(content)


def test_flipped_bits_are_refused_or_change_nothing(prepared):
    directory, load = prepared
    random = np.random.default_rng(0)
    expected = load()
    for path in sorted(directory.glob("*.array_record*")):
        content = path.read_bytes()
        # Most of such a file is padding: look for damage where the records are.
        held = np.flatnonzero(np.frombuffer(content, np.uint8))
        for at in random.choice(held, 15, replace=False).tolist():
            damaged = bytearray(content)
            damaged[at] ^= 1 << int(random.integers(8))
            path.write_bytes(damaged)
            try:
                found = load()
            except ValueError as error:
                assert str(directory) in str(error)
                assert "\n" not in str(error)
            else:
                for one, other in zip(found, expected, strict=True):
                    np.testing.assert_array_equal(one[0], other[0])
                    np.testing.assert_array_equal(one[1], other[1])
        path.write_bytes(content)


def test_damaged_metadata_is_one_sentence(prepared):
    directory, load = prepared
    random = np.random.default_rng(1)
    for path in sorted(directory.glob("*.json")):
        content = path.read_bytes()
        for at in random.integers(0, len(content), 15).tolist():
            damaged = bytearray(content)
            damaged[at] ^= 1 << int(random.integers(7))
            path.write_bytes(damaged)
            try:
                load()
            except (ValueError, OSError) as error:
                assert "\n" not in str(error)
        path.write_bytes(content)


@pytest.mark.parametrize("count", ["19", "21", "0"])
def test_a_wrong_number_of_records_is_told(prepared, count):
    directory, load = prepared
    path = directory / "dataset_info.json"
    info = json.loads(path.read_text())
    [split] = [split for split in info["splits"] if split["name"] == "train"]
    split["shardLengths"] = [count]
    path.write_text(json.dumps(info))
    told = "split train is empty" if count == "0" else f"holds 20 records, but .* says {count}"
    with pytest.raises(ValueError, match=told):
        load()
