"""The training loop: epochs, checkpoints, the best of them, and going on after an interruption."""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from falcon_jax.data.batching import steps_per_epoch, train_batches
from falcon_jax.data.dataset import Dataset
from falcon_jax.training.checkpoints import BestModel, Checkpoints
from falcon_jax.training.config import ExperimentConfig, TrainConfig
from falcon_jax.training.devices import check_divides, process_shard, replicate
from falcon_jax.training.evaluation import evaluate, make_eval_step
from falcon_jax.training.interruption import Interruption, Stopped
from falcon_jax.training.monitoring import (
    EpochSums,
    MetricsLog,
    ProfilerWindow,
    Progress,
    Run,
    Watch,
)
from falcon_jax.training.network import Arrays, Network
from falcon_jax.training.optimizers import make_optimizer
from falcon_jax.training.parallel import ParallelStep, make_parallel_step
from falcon_jax.training.step import Preprocessing, Teacher, TeacherArrays, TrainState, init_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One network's training, beside the network.

    Attributes:
        label: shown with the progress.
        directory: of checkpoints and metrics.
        config: of the experiment: seed, checkpoints, devices and log.
        recipe: the config's ``train`` or ``finetune``.
        dataset: training, validation and test split.
        preprocessing: of images on the device.
        mesh: the devices.
        interruption: tells when to stop early.
        meta: plain data kept with every checkpoint.
        teacher: network, parameters and statistics whose answers count, too, where the recipe gives
            them a weight.
    """

    label: str
    directory: pathlib.Path
    config: ExperimentConfig
    recipe: TrainConfig
    dataset: Dataset
    preprocessing: Preprocessing
    mesh: Mesh
    interruption: Interruption
    meta: Mapping[str, Any]
    teacher: tuple[Network, Arrays, Arrays] | None = None


def train(job: Job, network: Network, params: Arrays, statistics: Arrays) -> BestModel:
    """Train a network, or go on where an earlier start of the same job stopped.

    After every epoch the network is evaluated on the validation split and saved. The result is
    that of the best epoch there, never chosen on the test split; without a validation split, that
    of the last epoch.

    Args:
        job: data, config and places.
        network: structure of the model.
        params: parameters to start from; they are copied.
        statistics: BatchNorm statistics to start from; they are copied.

    Returns:
        Parameters and statistics, and a note if they are not those of the best epoch.

    Raises:
        ValueError: if the devices cannot share a batch, a batch is larger than the split, or there
            are checkpoints but none is whole.
        FloatingPointError: if more steps were not finite than may be skipped.
        Stopped: if the run was asked to stop; it is saved and can go on.
    """
    recipe, mesh = job.recipe, job.mesh
    check_divides("batch_size", recipe.batch_size, mesh, accumulate=recipe.accumulate)
    if recipe.epochs == 0:
        return BestModel(arrays=(params, statistics), step=0)
    steps = steps_per_epoch(len(job.dataset.train), recipe.batch_size)
    optimizer = make_optimizer(recipe, steps)
    # A copy, because the step donates its state.
    params, statistics = jax.tree.map(lambda a: jax.numpy.array(a, copy=True), (params, statistics))
    state = replicate(init_state(params, statistics, optimizer), mesh)
    checkpoints = Checkpoints(job.directory / "checkpoints", keep=job.config.checkpoint.keep)
    try:
        restored = checkpoints.restore_latest(state)
        state, meta = (state, {}) if restored is None else restored
        position = _Position(
            step=int(state.step), epoch=meta.get("epoch", 0), sums=EpochSums(**meta.get("sums", {}))
        )
        if position.epoch < recipe.epochs:
            step = make_parallel_step(
                network,
                optimizer,
                job.preprocessing,
                mesh,
                parallel=job.config.parallel,
                batchnorm=job.config.batchnorm,
                label_smoothing=recipe.label_smoothing,
                accumulate=recipe.accumulate,
                teacher=_teacher(job),
            )
            state = _Training(job, network, step, checkpoints, position, steps).go_on(state)
        return checkpoints.restore_best_model(state.params, state.statistics)
    finally:
        checkpoints.close()


def _teacher(job: Job) -> Teacher | None:
    given = job.recipe.distillation
    if job.teacher is None or not given.weight:
        return None
    return Teacher(network=job.teacher[0], weight=given.weight, temperature=given.temperature)


@dataclasses.dataclass(kw_only=True)
class _Position:
    """Where a run is.

    Attributes:
        step: steps taken.
        epoch: epochs finished, evaluation and checkpoint included.
        sums: of the metrics of the epoch that has begun.
    """

    step: int
    epoch: int
    sums: EpochSums


class _Training:
    """The epochs of a run that are left."""

    def __init__(
        self,
        job: Job,
        network: Network,
        step: ParallelStep,
        checkpoints: Checkpoints,
        position: _Position,
        steps: int,
    ):
        self._job = job
        self._step = step
        self._taught: TeacherArrays = {}
        if _teacher(job) is not None and job.teacher is not None:
            self._taught = step.place_teacher(*job.teacher[1:])
        self._checkpoints = checkpoints
        self._at = position
        self._steps = steps
        self._key = jax.random.key(job.config.seed)
        self._eval_step = make_eval_step(network, job.preprocessing)

    def go_on(self, state: TrainState) -> TrainState:
        """Train to the end and return the state there."""
        job, at, log = self._job, self._at, self._job.config.log
        images = self._steps * job.recipe.batch_size
        self._progress = Progress(
            job.label,
            total=job.recipe.epochs * images,
            done=at.step * job.recipe.batch_size,
            show=log.progress and jax.process_index() == 0,
        )
        self._window = ProfilerWindow(
            job.directory / "profile", start_step=log.profile_start_step, steps=log.profile_steps
        )
        run = Run(
            directory=job.directory,
            label=job.label,
            project=log.project,
            config=job.meta.get("config", {}),
            from_step=at.epoch * self._steps,
        )
        self._log = MetricsLog(run, loggers=log.chosen)
        with contextlib.ExitStack() as stack:
            for part in (self._log, self._progress, self._window):
                stack.callback(part.close)
            while at.epoch < job.recipe.epochs:
                state = self._finish_epoch(*self._train_epoch(state))
        return state

    def _train_epoch(self, state: TrainState) -> tuple[TrainState, float]:
        """Take the steps of the epoch that are left; return images/s, too."""
        job, at = self._job, self._at
        first = at.step - at.epoch * self._steps
        every_steps = job.config.checkpoint.every_steps
        batches = train_batches(
            job.dataset.train,
            job.recipe.batch_size,
            seed=job.config.seed,
            epoch=at.epoch,
            start_step=first,
            shard=process_shard(),
        )
        watch = Watch(
            job.label,
            job.directory,
            epoch=at.epoch + 1,
            sums=at.sums,
            skipped=int(state.skipped),
            skip_nonfinite=job.recipe.skip_nonfinite,
            interruption=job.interruption,
        )
        state = self._step.place(state)
        start = time.perf_counter()
        with contextlib.closing(batches):
            for batch in batches:
                self._window.before(at.step)
                state, metrics = self._step(state, self._input(batch), self._key, self._taught)
                at.step += 1
                watch.see(at.step, batch["index"], metrics)
                self._progress.advance(job.recipe.batch_size)
                if watch.stop:
                    watch.see_rest()
                    self._stop(self._step.gather(state))
                within = at.step < (at.epoch + 1) * self._steps
                if within and every_steps and at.step % every_steps == 0:
                    watch.see_rest()
                    self._save(self._step.gather(state), score=None)
        watch.see_rest()
        seconds = time.perf_counter() - start
        images = (self._steps - first) * job.recipe.batch_size
        return self._step.gather(state), images / seconds

    def _input(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        stop = np.full(len(batch["label"]), self._job.interruption.requested, np.float32)
        return {"image": batch["image"], "label": batch["label"], "stop": stop}

    def _stop_evaluation(self, state: TrainState) -> None:
        # Several processes stop together, at a step; here they would not agree.
        if self._job.interruption.requested and jax.process_count() == 1:
            self._stop(state)

    def _stop(self, state: TrainState) -> None:
        self._save(state, score=None)
        raise Stopped(
            f"{self._job.label}: stopped and saved at step {self._at.step}; the same command goes "
            "on from there"
        )

    def _save(self, state: TrainState, *, score: float | None) -> None:
        meta = {"epoch": self._at.epoch, "sums": dataclasses.asdict(self._at.sums)}
        self._checkpoints.save(state, {**meta, **self._job.meta}, score=score)

    def _finish_epoch(self, state: TrainState, images_per_s: float) -> TrainState:
        """Evaluate, log, save."""
        job, at = self._job, self._at
        values: dict[str, Any] = {**at.sums.means(), "images_per_s": images_per_s}
        if job.dataset.validation is not None:
            result = evaluate(
                self._eval_step,
                state.params,
                state.statistics,
                job.dataset.validation,
                batch_size=job.recipe.eval_batch_size,
                mesh=job.mesh,
                advance=lambda images: self._stop_evaluation(state),
            )
            values |= {"val_loss": result.loss, "val_accuracy": result.top1}
        at.epoch += 1
        at.sums = EpochSums()
        # Before the checkpoint: a run that goes on drops later lines, but makes none up.
        self._log.write(at.step, {"epoch": at.epoch, **values})
        # Without a validation split the epoch's number is the score: the last is the best.
        self._save(state, score=values.get("val_accuracy", float(at.epoch)))
        self._progress.epoch(at.epoch, job.recipe.epochs, values)
        return state
