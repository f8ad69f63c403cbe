"""The training loop: epochs, checkpoints, the best of them, and going on after an interruption."""

import dataclasses
import pathlib
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from falcon_jax.data.batching import steps_per_epoch, train_batches
from falcon_jax.data.dataset import Dataset
from falcon_jax.training.checkpoints import Checkpoints
from falcon_jax.training.evaluation import evaluate
from falcon_jax.training.metrics import MetricsLog
from falcon_jax.training.network import Arrays, Network
from falcon_jax.training.optimizers import make_optimizer
from falcon_jax.training.parallel import check_divides, replicate, shard_batches
from falcon_jax.training.progress import Progress
from falcon_jax.training.settings import TrainSettings
from falcon_jax.training.step import (
    Metrics,
    Preprocessing,
    TrainState,
    init_state,
    make_eval_step,
    make_train_step,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogSettings:
    """What a run leaves behind and shows.

    Attributes:
        tensorboard: whether to write event files.
        progress: whether to show progress.
        profile_start_step: first step of the profiler's window.
        profile_steps: length of the window; 0 for none. The trace goes to ``profile/``.
    """

    tensorboard: bool = True
    progress: bool = True
    profile_start_step: int = 10
    profile_steps: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What a training run needs beside the network.

    Attributes:
        label: shown with the progress.
        directory: of checkpoints and metrics.
        dataset: training, validation and test split.
        preprocessing: of images on the device.
        settings: epochs, optimizer and the rest.
        log: what is shown and kept.
        keep: latest checkpoints kept beside the best.
        seed: of the order of examples, augmentation and dropout.
        mesh: the devices.
        meta: plain data kept with every checkpoint.
    """

    label: str
    directory: pathlib.Path
    dataset: Dataset
    preprocessing: Preprocessing
    settings: TrainSettings
    log: LogSettings
    keep: int
    seed: int
    mesh: Mesh
    meta: dict[str, Any]


def train(run: Run, network: Network, params: Arrays, statistics: Arrays) -> tuple[Arrays, Arrays]:
    """Train a network, or go on where an earlier start of the same run stopped.

    After every epoch the network is evaluated on the validation split and saved. The result is
    that of the best epoch there, never chosen on the test split; without a validation split, that
    of the last epoch.

    Args:
        run: data, settings and places.
        network: structure of the model.
        params: parameters to start from; they are copied.
        statistics: BatchNorm statistics to start from; they are copied.

    Returns:
        Parameters and statistics.

    Raises:
        ValueError: if the devices cannot share a batch, or a batch is larger than the split.
        FloatingPointError: if the loss is not finite.
    """
    settings, mesh = run.settings, run.mesh
    check_divides("batch_size", settings.batch_size, mesh)
    if settings.epochs == 0:
        return params, statistics
    steps = steps_per_epoch(len(run.dataset.train), settings.batch_size)
    optimizer = make_optimizer(settings, steps)
    # A copy, because the step donates its state.
    params, statistics = jax.tree.map(lambda a: jax.numpy.array(a, copy=True), (params, statistics))
    state = replicate(init_state(params, statistics, optimizer), mesh)
    checkpoints = Checkpoints(run.directory / "checkpoints", keep=run.keep)
    try:
        restored = checkpoints.restore_latest(state)
        state = state if restored is None else restored
        _train_epochs(run, network, optimizer, state, checkpoints, steps)
        return checkpoints.restore_best_model(state.params, state.statistics)
    finally:
        checkpoints.close()


def _train_epochs(
    run: Run,
    network: Network,
    optimizer: Any,
    state: TrainState,
    checkpoints: Checkpoints,
    steps: int,
) -> None:
    settings = run.settings
    step_number = int(state.step)
    epoch = step_number // steps
    if epoch >= settings.epochs:
        return
    train_step = make_train_step(
        network,
        optimizer,
        run.preprocessing,
        label_smoothing=settings.label_smoothing,
    )
    key = jax.random.key(run.seed)
    eval_step = make_eval_step(network, run.preprocessing)
    log = MetricsLog(run.directory, tensorboard=run.log.tensorboard, from_step=step_number)
    images = steps * settings.batch_size
    progress = Progress(
        run.label,
        total=settings.epochs * images,
        done=epoch * images,
        show=run.log.progress and jax.process_index() == 0,
    )
    window = _ProfilerWindow(run)
    try:
        while epoch < settings.epochs:
            start = time.perf_counter()
            sums: list[Metrics] = []
            batches = train_batches(
                run.dataset.train, settings.batch_size, seed=run.seed, epoch=epoch
            )
            for batch in shard_batches(batches, run.mesh):
                window.before(step_number)
                state, metrics = train_step(state, batch, key)
                step_number += 1
                sums.append(metrics)
                progress.advance(settings.batch_size)
            jax.block_until_ready(state.step)
            seconds = time.perf_counter() - start
            epoch += 1
            values = {
                "loss": float(np.mean([m["loss"] for m in sums])),
                "accuracy": float(np.mean([m["accuracy"] for m in sums])),
                "images_per_s": images / seconds,
            }
            if run.dataset.validation is not None:
                result = evaluate(
                    eval_step,
                    state.params,
                    state.statistics,
                    run.dataset.validation,
                    batch_size=settings.eval_batch_size,
                    mesh=run.mesh,
                )
                values |= {"val_loss": result.loss, "val_accuracy": result.top1}
            if not np.isfinite(values["loss"]):
                raise FloatingPointError(
                    f"{run.label}: the loss is not finite in epoch {epoch}; the checkpoint of the "
                    "epoch before is kept. Try a lower learning rate or a warm-up"
                )
            # Before the checkpoint: a run that goes on drops later lines, but makes none up.
            log.write(step_number, {"epoch": epoch, **values})
            # Without a validation split the epoch's number is the score: the last is the best.
            score = values.get("val_accuracy", float(epoch))
            checkpoints.save(state, {"epoch": epoch, **run.meta}, score=score)
            progress.epoch(epoch, settings.epochs, values)
    finally:
        window.close()
        progress.close()
        log.close()


class _ProfilerWindow:
    """A trace of some steps, on request."""

    def __init__(self, run: Run):
        self._directory = str(run.directory / "profile")
        self._start = run.log.profile_start_step
        self._stop = self._start + run.log.profile_steps
        self._running = False

    def before(self, step: int) -> None:
        if not self._running and self._start <= step < self._stop:
            jax.profiler.start_trace(self._directory)
            self._running = True
        elif self._running and step >= self._stop:
            self.close()

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
