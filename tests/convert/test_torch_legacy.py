"""Files from before torch 1.6."""

import os
import pickle
import random

import numpy as np
import pytest

import falcon_jax as fj
from tests.convert.archives import dictionary, tensor, write_legacy
from tests.convert.test_torch_file import SIX, damaged, refused

CONTENT = dictionary(
    {
        "a": tensor("70", 6, (2, 3), (3, 1), view=b"N"),
        "b": tensor("70", 6, (3, 2), (1, 3), view=b"N"),
        "c": tensor("8", 2, (2,), (1,), storage="torch\nLongStorage", view=b"N"),
    }
)
STORAGES = {"70": (6, SIX.tobytes()), "8": (2, np.array([1, -1]).astype("<i8").tobytes())}


@pytest.fixture
def legacy(tmp_path):
    return write_legacy(tmp_path / "legacy.pth", CONTENT, STORAGES)


def test_tensors_are_read_and_shared(legacy):
    named = fj.convert.load_torch(legacy)
    np.testing.assert_array_equal(named["a"], SIX.reshape(2, 3))
    np.testing.assert_array_equal(named["b"], SIX.reshape(2, 3).T)
    np.testing.assert_array_equal(named["c"], [1, -1])
    assert np.shares_memory(named["a"], named["b"])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"magic": 7}, "a pickle, but not one of torch.save"),
        ({"version": 1002}, "protocol 1002"),
        ({"storages": {"70": STORAGES["70"]}}, "not those that its tensors need"),
        ({"storages": {**STORAGES, "9": STORAGES["8"]}}, "not those that its tensors need"),
        ({"storages": {**STORAGES, "8": (3, bytes(24))}}, "must have 2 elements; it has 3"),
        ({"storages": {**STORAGES, "8": (2, bytes(15))}}, "with 15 bytes to come"),
    ],
)
def test_files_that_do_not_hold_together_are_refused(tmp_path, change, match):
    options = {"content": CONTENT, "storages": STORAGES} | change
    refused(write_legacy(tmp_path / "a.pth", **options), match)


def test_code_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trace"),)

    path = tmp_path / "a.pth"
    path.write_bytes(pickle.dumps(Evil(), protocol=2))
    refused(path, "not one of torch.save")
    evil = pickle.dumps(Evil(), protocol=2)[2:-1]
    refused(write_legacy(path, evil, {}), r"it holds \w+\.mkdir, not a state dict")
    assert not (tmp_path / "trace").exists()


def test_truncated_files_are_refused(legacy, tmp_path):
    data, path = legacy.read_bytes(), tmp_path / "truncated.pth"
    for length in range(0, len(data), 5):
        path.write_bytes(data[:length])
        refused(path, "empty|neither|truncated|damaged|not one of torch.save")


def test_damaged_bytes_give_an_error_or_small_arrays(legacy, tmp_path):
    data, path, generator = legacy.read_bytes(), tmp_path / "damaged.pth", random.Random(0)
    for _ in range(600):
        path.write_bytes(damaged(data, generator))
        try:
            named = fj.convert.load_torch(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert sum(array.nbytes for array in named.values()) < 2**10
