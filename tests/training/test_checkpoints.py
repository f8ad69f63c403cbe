import contextlib
import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from falcon_jax.training.checkpoints import Checkpoints
from falcon_jax.training.devices import data_mesh, replicate
from falcon_jax.training.interruption import Stopped
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
        skipped=jnp.zeros((), jnp.int32),
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
    params, statistics = checkpoints.restore_best_model(like.params, like.statistics).arrays
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
    restored, meta = saved({5: 0.9, 7: 0.1}).restore_latest(state_at(0))
    assert meta == {"epoch": 7}
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
        assert a.sharding.is_fully_replicated and len(a.addressable_shards) == 8


def test_the_best_is_kept_beside_the_latest(saved, tmp_path):
    checkpoints = saved({1: 0.2, 2: 0.9, 3: 0.4, 4: 0.5})
    assert best_step(checkpoints) == 2
    assert steps_kept(tmp_path) == [2, 3, 4]


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
    params, statistics = checkpoints.restore_best_model(params, statistics).arrays
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
    assert steps_kept(tmp_path) == [1, 3, 4]


def test_within_an_epoch_a_checkpoint_is_never_the_best(saved):
    checkpoints = saved({1: 0.0, 2: None, 3: None})
    assert best_step(checkpoints) == 1
    assert int(checkpoints.restore_latest(state_at(0))[0].step) == 3


def test_a_checkpoint_of_the_same_step_is_replaced(saved, tmp_path):
    saved({1: 0.5, 2: None})
    checkpoints = saved({2: 0.9})
    assert best_step(checkpoints) == 2
    assert steps_kept(tmp_path) == [1, 2]


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damage(path, how, generator):
    data = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[: generator.integers(len(data))])
    else:
        data[generator.integers(len(data))] ^= 1 << generator.integers(8)
        path.write_bytes(data)


def restored_step(folder):
    """The step that is restored; its arrays are checked to be those of it."""
    checkpoints = Checkpoints(folder)
    try:
        state, _ = checkpoints.restore_latest(state_at(0))
    finally:
        checkpoints.close()
    step = int(state.step)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(state_at(step)), strict=True):
        np.testing.assert_array_equal(a, b)
    return step


@pytest.fixture
def two(saved, tmp_path):
    saved({1: 0.9, 2: 0.1})
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("how", ["flipped", "cut", "deleted"])
def test_whatever_file_is_damaged_the_one_before_is_used_and_the_bad_one_named(
    two, tmp_path, how, capsys
):
    names = [path.relative_to(two / "2") for path in files_of(two / "2")]
    generator, silent = np.random.default_rng(0), []
    for index, name in enumerate(names):
        folder = shutil.copytree(two, tmp_path / f"{how}{index}" / "checkpoints")
        damage(folder / "2" / name, how, generator)
        step = restored_step(folder)
        told = f"{folder / '2'} is damaged" in capsys.readouterr().err
        assert told == (step == 1)
        if step == 2:
            silent.append(name.name)
        else:
            assert (folder.parent / "damaged" / "2").is_dir()
    # Without its manifest a checkpoint is still verified, array by array.
    assert set(silent) <= {"manifest.json"}


def test_without_a_manifest_arrays_that_are_not_those_saved_are_noticed(two, capsys):
    """Those of the other checkpoint, as Orbax would restore them without a word."""
    (two / "2" / "manifest.json").unlink()
    assert restored_step(two) == 2
    (two / "2" / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(two / "2" / "model")
    shutil.copytree(two / "1" / "model", two / "2" / "model")
    assert restored_step(two) == 1
    assert "params.layers.0.kernel" in capsys.readouterr().err


def test_if_none_is_whole_the_run_says_so(two, capsys):
    for step in ("1", "2"):
        (two / step / "manifest.json").write_text("{}")
    for _ in range(2):  # and again, when the damaged ones have been moved
        checkpoints = Checkpoints(two)
        with pytest.raises(ValueError, match=r"no checkpoint in .* is whole"):
            checkpoints.restore_latest(state_at(0))
        like = state_at(0)
        with pytest.raises(ValueError, match=r"no checkpoint in .* is whole"):
            checkpoints.restore_best_model(like.params, like.statistics)
        checkpoints.close()
    assert capsys.readouterr().err.count("is damaged and not used") == 2


def note_of(folder):
    checkpoints = Checkpoints(folder)
    like = state_at(0)
    try:
        return checkpoints.restore_best_model(like.params, like.statistics).note
    finally:
        checkpoints.close()


def test_a_damaged_best_one_gives_way_to_the_next_best_and_that_is_noted(two, capsys):
    assert note_of(two) is None
    (two / "1" / "manifest.json").write_text("{}")
    checkpoints = Checkpoints(two)
    assert best_step(checkpoints) == 2
    checkpoints.close()
    assert f"{two / '1'} is damaged" in capsys.readouterr().err
    for _ in range(2):  # and again, when the damaged one has been moved
        note = note_of(two)
        assert note == "checkpoint of step 2 used: that of step 1, the best, is damaged or missing"


def test_a_best_one_that_was_removed_is_noted(two):
    shutil.rmtree(two / "1")
    assert "that of step 1, the best, is damaged or missing" in note_of(two)


def test_a_latest_one_that_was_damaged_could_have_been_the_best(two):
    (two / "2" / "manifest.json").write_text("{}")
    assert note_of(two) == (
        "checkpoint of step 1 used: a later one, of step 2, is damaged or missing"
    )


def test_the_note_outlives_going_on_and_ends_with_a_better_one(saved, two):
    (two / "1" / "manifest.json").write_text("{}")
    checkpoints = Checkpoints(two)
    checkpoints.restore_latest(state_at(0))
    checkpoints.save(state_at(3), {}, score=0.5)
    checkpoints.close()
    assert note_of(two).startswith("checkpoint of step 3 used: that of step 1")
    checkpoints = Checkpoints(two)
    checkpoints.restore_latest(state_at(0))
    checkpoints.save(state_at(4), {}, score=0.95)
    checkpoints.close()
    assert note_of(two) is None


@pytest.mark.parametrize("what", ["file", "link"])
def test_what_is_in_the_way_is_told(tmp_path, what):
    place = tmp_path / "checkpoints"
    if what == "file":
        place.write_text("")
    else:
        place.symlink_to(tmp_path / "nowhere" / "at all")
    with pytest.raises(Stopped, match="checkpoints cannot be used as a folder of checkpoints"):
        Checkpoints(place)
    assert place.is_symlink() or place.read_text() == ""


def test_a_folder_that_is_removed_meanwhile_is_told(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(Stopped, match=r"step 1 could not be saved .*the folder is gone"):
        checkpoints.save(state_at(1), {}, score=0.5)
    with contextlib.suppress(Stopped):
        checkpoints.close()


def test_damaged_ones_of_one_step_are_all_kept(two, tmp_path):
    (tmp_path / "damaged" / "2").mkdir(parents=True)
    (tmp_path / "damaged" / "2" / "mine.txt").write_text("")
    (two / "2" / "manifest.json").write_text("{}")
    assert restored_step(two) == 1
    assert (tmp_path / "damaged" / "2" / "mine.txt").exists()
    assert (tmp_path / "damaged" / "2.2" / "meta").is_dir()


def test_unfinished_directories_are_ignored(two):
    shutil.copytree(two / "2", two / "3.orbax-checkpoint-tmp-1")
    assert restored_step(two) == 2


def test_another_network_is_told_apart_from_damage(two):
    checkpoints = Checkpoints(two)
    like = state_at(0)
    other = dataclasses.replace(like, params={"head/bias": like.params["head/bias"]})
    with pytest.raises(ValueError, match="that of another network"):
        checkpoints.restore_latest(other)
    checkpoints.close()
    assert restored_step(two) == 2
