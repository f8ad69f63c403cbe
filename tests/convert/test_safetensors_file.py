"""Files in the safetensors format."""

import random

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import falcon_jax as fj
from tests.convert.test_torch_file import SIX, damaged, refused, same


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_safetensors_are_told_by_their_content(tmp_path, name):
    expected = {
        "a": np.arange(6, dtype=np.float16).reshape(2, 3),
        "b": np.array([1, -2], ml_dtypes.bfloat16),
        "c": np.array(True),
        "d": np.zeros((0, 3), np.int64),
    }
    save_file(expected, tmp_path / name)
    assert same(fj.convert.load_torch(tmp_path / name), expected)


def test_damaged_safetensors_are_refused_or_read(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": SIX, "b": SIX.astype(np.int8)}, path)
    data, generator = path.read_bytes(), random.Random(0)
    for length in range(0, len(data), 3):
        path.write_bytes(data[:length])
        refused(path, "empty|safetensors")
    for _ in range(200):
        path.write_bytes(damaged(data, generator))
        try:
            fj.convert.load_torch(path)
        except ValueError as error:
            assert str(path) in str(error)


def test_safetensors_of_unknown_types_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    header = b'{"a":{"dtype":"C64","shape":[1],"data_offsets":[0,8]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    refused(path, "its entry a is of type C64; possible are F16")
