import dataclasses
import json

import jax
import numpy as np
import pytest

from falcon_jax.data.augmentation import Augmentation
from falcon_jax.training import loop
from falcon_jax.training.checkpoints import Checkpoints
from falcon_jax.training.config import LogConfig
from falcon_jax.training.loop import train
from falcon_jax.training.monitoring import MetricsLog
from falcon_jax.training.network import Network
from tests.training.tiny import Tiny, tiny_dataset, tiny_job

VARIED = Augmentation(crop_padding=1, flip=True)


def started(run):
    return train(run, *Network.split(Tiny())).arrays


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(folder):
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines(folder)]


def latest(run):
    """Return all arrays of the latest checkpoint, without a target."""
    import orbax.checkpoint as ocp

    manager = ocp.CheckpointManager(run.directory / "checkpoints")
    args = ocp.args.Composite(
        model=ocp.args.StandardRestore(), optimizer=ocp.args.StandardRestore()
    )
    found = manager.restore(manager.latest_step(), args=args)
    step = manager.latest_step()
    manager.close()
    return step, {**found["model"], **found["optimizer"]}


def assert_equal(a, b):
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of four epochs without interruption, and what it returned."""
    run = tiny_job(tmp_path_factory.mktemp("whole"), epochs=4, augmentation=VARIED)
    return run, started(run)


def test_a_line_an_epoch_with_all_metrics(whole):
    run, _ = whole
    found = lines(run.directory)
    assert [line["epoch"] for line in found] == [1, 2, 3, 4]
    assert [line["step"] for line in found] == [3, 6, 9, 12]  # 120 images, 40 a step
    names = {"step", "epoch", "loss", "accuracy", "images_per_s", "val_loss", "val_accuracy"}
    for line in found:
        assert set(line) == names
        assert all(np.isfinite(value) for value in line.values())
    assert found[-1]["loss"] < found[0]["loss"]


def test_the_parameters_given_are_neither_changed_nor_deleted(tmp_path):
    network, params, statistics = Network.split(Tiny())
    before = jax.device_get((params, statistics))
    train(tiny_job(tmp_path, epochs=1), network, params, statistics)
    assert_equal(params, before[0])
    assert_equal(statistics, before[1])


@pytest.mark.parametrize("interrupted_after", [1, 3])
def test_going_on_equals_never_having_stopped(whole, tmp_path, monkeypatch, interrupted_after):
    run = dataclasses.replace(whole[0], directory=tmp_path)
    save = Checkpoints.save

    def interrupted(self, state, meta, *, score):
        save(self, state, meta, score=score)
        if meta["epoch"] == interrupted_after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            started(run)
    assert latest(run)[0] == 3 * interrupted_after
    params, statistics = started(run)
    assert_equal(params, whole[1][0])
    assert_equal(statistics, whole[1][1])
    (step, arrays), (whole_step, whole_arrays) = latest(run), latest(whole[0])
    assert step == whole_step == 12
    assert_equal(arrays, whole_arrays)
    assert untimed(tmp_path) == untimed(whole[0].directory)


def test_every_epoch_has_its_line_wherever_the_run_was_stopped(whole, tmp_path, monkeypatch):
    run = dataclasses.replace(whole[0], directory=tmp_path)

    def interrupted(self, step, metrics):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(MetricsLog, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            started(run)
    started(run)
    assert untimed(tmp_path) == untimed(whole[0].directory)


def test_stopping_within_an_epoch_takes_it_anew(whole, tmp_path, monkeypatch):
    run = dataclasses.replace(whole[0], directory=tmp_path)
    batches = loop.train_batches

    def interrupted(split, batch_size, *, epoch, **options):
        for index, batch in enumerate(batches(split, batch_size, epoch=epoch, **options)):
            if (epoch, index) == (2, 1):
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patched:
        patched.setattr(loop, "train_batches", interrupted)
        with pytest.raises(KeyboardInterrupt):
            started(run)
    assert latest(run)[0] == 6
    assert_equal(started(run)[0], whole[1][0])
    assert untimed(tmp_path) == untimed(whole[0].directory)


def test_a_finished_run_takes_no_step(whole, monkeypatch):
    def fail(*args, **options):
        raise AssertionError("a step was made")

    monkeypatch.setattr(loop, "make_parallel_step", fail)
    before = (whole[0].directory / "metrics.jsonl").read_bytes()
    params, statistics = started(whole[0])
    assert_equal(params, whole[1][0])
    assert_equal(statistics, whole[1][1])
    assert (whole[0].directory / "metrics.jsonl").read_bytes() == before


def recorded(monkeypatch, scores=None):
    """Record what is saved; let ``scores`` stand for the validation accuracy."""
    saved = {}
    save = Checkpoints.save

    def recording(self, state, meta, *, score):
        given = score if scores is None else scores[meta["epoch"] - 1]
        saved[meta["epoch"]] = (jax.device_get(state.params), meta, score)
        save(self, state, meta, score=given)

    monkeypatch.setattr(Checkpoints, "save", recording)
    return saved


def test_the_epoch_with_the_best_validation_accuracy_is_returned(tmp_path, monkeypatch):
    saved = recorded(monkeypatch, scores=[0.1, 0.9, 0.3])
    params, _ = started(tiny_job(tmp_path))
    assert_equal(params, saved[2][0])
    assert not np.array_equal(params["head/bias"], saved[3][0]["head/bias"])
    sums = {"loss": 0.0, "accuracy": 0.0, "steps": 0}
    assert saved[2][1] == {"epoch": 2, "sums": sums, "model": "tiny"}


def test_the_score_is_the_validation_accuracy(tmp_path, monkeypatch):
    saved = recorded(monkeypatch)
    started(tiny_job(tmp_path))
    scores = [score for _, _, score in saved.values()]
    assert scores == [line["val_accuracy"] for line in lines(tmp_path)]


def test_without_a_validation_split_the_last_epoch_is_returned(tmp_path, monkeypatch):
    saved = recorded(monkeypatch)
    params, _ = started(tiny_job(tmp_path, dataset=tiny_dataset(validation=0.0), batch_size=80))
    assert_equal(params, saved[3][0])
    assert all("val_loss" not in line for line in lines(tmp_path))


def test_no_epochs_give_back_what_was_given(tmp_path):
    network, params, statistics = Network.split(Tiny())
    found = train(tiny_job(tmp_path / "run", epochs=0), network, params, statistics).arrays
    assert_equal(found[0], params)
    assert_equal(found[1], statistics)
    assert not (tmp_path / "run").exists()


def test_batches_that_do_not_fit_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="batch_size 30 cannot be shared evenly by 8 devices"):
        started(tiny_job(tmp_path / "run", batch_size=30))
    with pytest.raises(ValueError, match="batch_size 160 is larger than the training split"):
        started(tiny_job(tmp_path / "run", batch_size=160))
    assert not (tmp_path / "run").exists()


def test_the_profilers_window_leaves_a_trace(tmp_path):
    log = LogConfig(tensorboard=False, progress=False, profile_start_step=1, profile_steps=2)
    started(tiny_job(tmp_path, epochs=1, log=log))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_no_trace_without_a_window_and_no_event_files_unless_asked(whole):
    assert {path.name for path in whole[0].directory.iterdir()} == {"checkpoints", "metrics.jsonl"}


def test_event_files_and_progress_on_request(tmp_path, capsys):
    started(tiny_job(tmp_path, epochs=2, log=LogConfig()))
    assert list(tmp_path.glob("events.out.tfevents.*"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.split("  ")[0] for line in captured.err.splitlines()] == [
        "tiny: epoch 1/2",
        "tiny: epoch 2/2",
    ]


def test_quiet_on_request(tmp_path, capsys):
    started(tiny_job(tmp_path, epochs=1))
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_bfloat16_trains_with_float32_arrays(tmp_path):
    network, params, statistics = Network.split(Tiny(dtype=jax.numpy.bfloat16))
    found = train(
        tiny_job(tmp_path, epochs=1, dtype="bfloat16"), network, params, statistics
    ).arrays
    assert all(array.dtype == np.float32 for arrays in found for array in arrays.values())
