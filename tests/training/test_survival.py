"""Runs that are stopped anywhere end as if they had never been; runs whose numbers go bad stop."""

import dataclasses
import itertools
import json
import os
import signal

import numpy as np
import pytest

from falcon_jax.data.augmentation import Augmentation
from falcon_jax.data.batching import train_batches
from falcon_jax.training import evaluation, loop
from falcon_jax.training import monitoring as watch
from falcon_jax.training.interruption import Interruption, Stopped
from falcon_jax.training.network import Network
from tests.training.test_loop import assert_equal, latest, started, untimed
from tests.training.tiny import Touchy, tiny_job

VARIED = Augmentation(crop_padding=1, flip=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of three epochs of three steps without interruption, and what it returned."""
    run = tiny_job(tmp_path_factory.mktemp("whole"), augmentation=VARIED)
    return run, started(run)


def stopping_at(monkeypatch, run, step):
    """Let the run be asked to stop when it is about to take a step."""
    see = watch.Watch.see

    def seeing(self, at, indices, metrics):
        run.interruption.requested = run.interruption.requested or at == step
        see(self, at, indices, metrics)

    monkeypatch.setattr(watch.Watch, "see", seeing)


def anew(run, directory, **changes):
    """Return the run in another folder, with changes of its checkpoints."""
    config = dataclasses.replace(
        run.config, checkpoint=dataclasses.replace(run.config.checkpoint, **changes)
    )
    return dataclasses.replace(run, directory=directory, config=config, interruption=Interruption())


def assert_same_end(run, result, whole):
    assert_equal(result[0], whole[1][0])
    assert_equal(result[1], whole[1][1])
    (step, arrays), (whole_step, whole_arrays) = latest(run), latest(whole[0])
    assert step == whole_step
    assert_equal(arrays, whole_arrays)
    assert untimed(run.directory) == untimed(whole[0].directory)


@pytest.mark.parametrize("step", [1, 3, 5, 8])
def test_a_run_that_is_asked_to_stop_saves_there_and_goes_on(whole, tmp_path, monkeypatch, step):
    run = anew(whole[0], tmp_path)
    with monkeypatch.context() as patched:
        stopping_at(patched, run, step)
        with pytest.raises(Stopped, match=f"tiny: stopped and saved at step {step}; the same"):
            started(run)
    assert latest(run)[0] == step
    run = anew(run, tmp_path)
    assert_same_end(run, started(run), whole)


def test_a_stop_while_evaluating_evaluates_later(whole, tmp_path, monkeypatch):
    run = anew(whole[0], tmp_path)
    batches = evaluation.eval_batches

    def stopping(*args, **options):
        run.interruption.requested = True
        return batches(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "eval_batches", stopping)
        with pytest.raises(Stopped, match="saved at step 3"):
            started(run)
    assert not (tmp_path / "metrics.jsonl").exists()
    run = anew(run, tmp_path)
    assert_same_end(run, started(run), whole)


def test_checkpoints_within_epochs_change_nothing(whole, tmp_path, monkeypatch):
    run = anew(whole[0], tmp_path, every_steps=2)
    with monkeypatch.context() as patched:

        def killed(self, state, images_per_s):
            raise KeyboardInterrupt

        patched.setattr(loop._Training, "_finish_epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            started(run)
    assert latest(run)[0] == 2
    run = anew(run, tmp_path)
    assert_same_end(run, started(run), whole)


def test_signals_are_remembered_and_handed_back(capsys):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Interruption() as interruption:
        interruption.check()
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.requested
        with pytest.raises(Stopped):
            interruption.check()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert "SIGTERM: saving at the next step" in capsys.readouterr().err


@pytest.fixture
def touchy(tmp_path, monkeypatch):
    """Train a network that cannot stand white images with batches of white images at some steps."""
    batches = loop.train_batches

    def train(white, **settings):
        def whitened(split, batch_size, *, epoch, start_step, **options):
            given = batches(split, batch_size, epoch=epoch, start_step=start_step, **options)
            for step, batch in enumerate(given, 3 * epoch + start_step + 1):
                image = np.full_like(batch["image"], 255) if step in white else batch["image"]
                yield {**batch, "image": image}

        monkeypatch.setattr(loop, "train_batches", whitened)
        run = tiny_job(tmp_path, **settings)
        return run, loop.train(run, *Network.split(Touchy())).arrays

    return train


def test_numbers_that_go_bad_stop_the_run_and_keep_the_epoch_before(tmp_path, touchy):
    with pytest.raises(FloatingPointError, match=r"loss nan, .* at step 5 in epoch 2.*Try a lower"):
        touchy(white=[5])
    run = tiny_job(tmp_path)
    assert latest(run)[0] == 3
    assert len(untimed(tmp_path)) == 1
    kept = json.loads((tmp_path / "not_finite_step_5.json").read_text())
    assert (kept["step"], kept["epoch"], kept["loss"]) == (5, 2, "nan")
    (expected,) = itertools.islice(
        train_batches(run.dataset.train, 40, seed=run.config.seed, epoch=1), 1, 2
    )
    assert kept["indices"] == expected["index"].tolist()


def test_so_many_bad_steps_are_skipped_as_was_asked_for(tmp_path, touchy):
    _, (params, _) = touchy(white=[2, 5], skip_nonfinite=2)
    assert all(np.isfinite(array).all() for array in params.values())
    assert all(np.isfinite(line["loss"]) for line in untimed(tmp_path))
    names = {path.name for path in tmp_path.glob("not_finite*")}
    assert names == {"not_finite_step_2.json", "not_finite_step_5.json"}


def test_one_more_than_that_ends_the_run(touchy):
    with pytest.raises(FloatingPointError, match=r"at step 6.*skip_nonfinite above 2"):
        touchy(white=[2, 5, 6], skip_nonfinite=2)
