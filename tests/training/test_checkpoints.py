import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from falcon_jax.training.checkpoints import Checkpoints
from falcon_jax.training.parallel import data_mesh, replicate
from falcon_jax.training.step import TrainState, init_state

OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def state_at(step):
    """Return a state whose arrays tell the step that they are of."""
    params = {"layers/0/kernel": jnp.full((2, 3), float(step)), "head/bias": jnp.arange(3.0) / 7}
    statistics = {"layers/1/mean": jnp.full(3, step + 0.5)}
    state = init_state(params, statistics, OPTIMIZER)
    momentum = jax.tree.map(lambda a: a + step, state.opt_state)
    state = TrainState(
        step=jnp.asarray(step, jnp.int32),
        params=params,
        statistics=statistics,
        opt_state=momentum,
    )
    return replicate(state, data_mesh())


@pytest.fixture
def saved(tmp_path):
    """Save states with given scores, wait, and open the folder anew."""
    opened = []

    def save(scores, **options):
        checkpoints = Checkpoints(tmp_path / "checkpoints", **options)
        for step, score in scores.items():
            checkpoints.save(state_at(step), {"epoch": step}, score=score)
        checkpoints.close()
        opened.append(Checkpoints(tmp_path / "checkpoints", **options))
        return opened[-1]

    yield save
    for checkpoints in opened:
        checkpoints.close()


def best_step(checkpoints):
    like = state_at(0)
    params, statistics = checkpoints.restore_best_model(like.params, like.statistics)
    step = float(params["layers/0/kernel"][0, 0])
    assert float(statistics["layers/1/mean"][0]) == step + 0.5
    return int(step)


def steps_kept(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.is_dir())


def test_nothing_to_restore(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    like = state_at(0)
    assert checkpoints.restore_latest(like) is None
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        checkpoints.restore_best_model(like.params, like.statistics)
    checkpoints.close()


def test_the_latest_comes_back_exactly_where_it_should_be(saved):
    expected = state_at(7)
    restored = saved({5: 0.9, 7: 0.1}).restore_latest(state_at(0))
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
        assert a.sharding.is_fully_replicated and len(a.addressable_shards) == 8


def test_the_best_is_kept_beside_the_latest(saved, tmp_path):
    checkpoints = saved({1: 0.2, 2: 0.9, 3: 0.4, 4: 0.5})
    assert best_step(checkpoints) == 2
    assert steps_kept(tmp_path) == [2, 4]


def test_keep_says_how_many_of_the_latest(saved, tmp_path):
    saved({1: 0.9, 2: 0.1, 3: 0.2, 4: 0.3, 5: 0.4}, keep=3)
    assert steps_kept(tmp_path) == [1, 3, 4, 5]


def test_of_equals_the_latest_is_the_best(saved, tmp_path):
    checkpoints = saved({1: 0.3, 2: 0.8, 3: 0.8, 4: 0.8, 5: 0.1})
    assert best_step(checkpoints) == 4
    assert steps_kept(tmp_path) == [4, 5]


def test_the_best_needs_nothing_of_the_optimizer(saved):
    checkpoints = saved({1: 0.5})
    like = state_at(0)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    params, statistics = jax.device_put((like.params, like.statistics), one)
    params, statistics = checkpoints.restore_best_model(params, statistics)
    np.testing.assert_array_equal(params["layers/0/kernel"], np.full((2, 3), 1.0))
    assert set(params) == set(like.params) and set(statistics) == set(like.statistics)
    assert params["layers/0/kernel"].devices() == {jax.devices()[3]}


def test_the_best_can_be_asked_for_right_after_saving(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(state_at(1), {}, score=0.1)
    assert best_step(checkpoints) == 1
    checkpoints.close()


def test_going_on_after_opening_anew(saved, tmp_path):
    saved({1: 0.7, 2: 0.1})
    checkpoints = saved({3: 0.5, 4: 0.6})
    assert best_step(checkpoints) == 1
    assert steps_kept(tmp_path) == [1, 4]
