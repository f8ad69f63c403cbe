import jax
import numpy as np
import pytest

from falcon_jax.training.devices import (
    check_divides,
    data_mesh,
    replicate,
    shard_batch,
    shared_batch_size,
)


def test_the_mesh_is_of_all_devices():
    mesh = data_mesh()
    assert mesh.axis_names == ("data",)
    assert set(mesh.devices.flat) == set(jax.devices())


def test_replicated_arrays_are_whole_everywhere():
    array = replicate({"a": np.arange(6.0)}, data_mesh())["a"]
    assert len(array.addressable_shards) == 8
    assert all(shard.data.shape == (6,) for shard in array.addressable_shards)


def test_batches_are_split_along_their_first_axis():
    batch = {"image": np.arange(32).reshape(16, 2), "label": np.arange(16)}
    split = shard_batch(batch, data_mesh())
    for name in batch:
        np.testing.assert_array_equal(split[name], batch[name])
        assert all(len(shard.data) == 2 for shard in split[name].addressable_shards)


@pytest.mark.parametrize("size, shared", [(1, 8), (8, 8), (9, 16), (256, 256), (250, 256)])
def test_padded_batches_round_up(size, shared):
    assert shared_batch_size(size, data_mesh()) == shared


def test_batches_that_cannot_be_shared_name_the_nearest():
    check_divides("batch_size", 64, data_mesh())
    with pytest.raises(ValueError) as caught:
        check_divides("batch_size", 100, data_mesh())
    assert str(caught.value) == (
        "batch_size 100 cannot be shared evenly by 8 devices; use 96 or 104"
    )
    check_divides("batch_size", 64, data_mesh(), accumulate=4)
    with pytest.raises(ValueError, match=r"by 8 devices in 4 parts; use 64 or 96$"):
        check_divides("batch_size", 72, data_mesh(), accumulate=4)
    with pytest.raises(ValueError, match=r"batch_size 3 cannot be .*; use 8$"):
        check_divides("batch_size", 3, data_mesh())
