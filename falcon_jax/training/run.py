"""What a training run is made of: its settings, its data, the devices."""

import dataclasses
import math
import pathlib
from typing import Any

from jax.sharding import Mesh

from falcon_jax.data.dataset import Dataset
from falcon_jax.training.interruption import Interruption
from falcon_jax.training.step import Preprocessing

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("step", "cosine", "constant")
DTYPES = ("float32", "bfloat16")
PARALLEL = ("jit", "pmap")
BATCHNORM = ("synchronised", "per_replica")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a network is trained or fine-tuned. The defaults are the paper's (Section 4.1.3).

    Attributes:
        epochs: passes over the training split.
        batch_size: images a step, over all devices.
        accumulate: parts that a batch is worked on in, one after another, to save memory; their
            gradients are averaged, and BatchNorm sees one part at a time.
        eval_batch_size: images a step of evaluation, over all devices.
        optimizer: ``sgd`` or ``adamw``.
        learning_rate: at its highest.
        momentum: of sgd.
        nesterov: whether sgd looks ahead.
        weight_decay: of every parameter; added to the gradient for sgd, decoupled for adamw.
        schedule: ``step``, ``cosine`` or ``constant``.
        boundaries: epochs at which ``step`` multiplies the learning rate by ``factor``.
        factor: see ``boundaries``.
        warmup_epochs: epochs of linear warm-up, before the schedule proper.
        label_smoothing: share of the target spread evenly over all classes.
        skip_nonfinite: steps whose loss or gradient is not finite that are skipped before the run
            stops.
        dtype: of the computation, ``float32`` or ``bfloat16``; parameters and statistics stay
            float32.
    """

    epochs: int = 350
    batch_size: int = 128
    accumulate: int = 1
    eval_batch_size: int = 256
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    schedule: str = "step"
    boundaries: tuple[float, ...] = (150.0, 250.0)
    factor: float = 0.1
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    skip_nonfinite: int = 0
    dtype: str = "float32"

    def __post_init__(self):
        for name, good, need in self._checks():
            if not good:
                raise ValueError(f"{name} must be {need}, but is {getattr(self, name)!r}")

    def _checks(self) -> list[tuple[str, bool, str]]:
        numbers = all(isinstance(b, (int, float)) and math.isfinite(b) for b in self.boundaries)
        positive = numbers and min(self.boundaries, default=0) >= 0
        rising = positive and list(self.boundaries) == sorted(set(self.boundaries))
        return [
            ("epochs", self.epochs >= 0, "0 or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
            ("accumulate", 1 <= self.accumulate <= self.batch_size, "in [1, batch_size]"),
            ("eval_batch_size", self.eval_batch_size >= 1, "1 or more"),
            ("optimizer", self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "positive and finite"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more, and finite"),
            ("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            ("boundaries", rising, "rising epochs, 0 or more"),
            ("factor", 0 < self.factor <= 1, "in (0, 1]"),
            ("warmup_epochs", 0 <= self.warmup_epochs <= self.epochs, "in [0, epochs]"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)"),
            ("skip_nonfinite", self.skip_nonfinite >= 0, "0 or more"),
            ("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    """How the devices share a batch.

    Attributes:
        parallel: ``jit`` or ``pmap``.
        batchnorm: ``synchronised``, over the whole batch; or ``per_replica`` (ghost), over the rows
            of each device, whose running statistics are averaged.
    """

    parallel: str = "jit"
    batchnorm: str = "synchronised"

    def __post_init__(self):
        for name, known in (("parallel", PARALLEL), ("batchnorm", BATCHNORM)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, but is {getattr(self, name)!r}"
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

    def __post_init__(self):
        for name in ("profile_start_step", "profile_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, but is {getattr(self, name)!r}")


def defaults() -> dict[str, Any]:
    """Return the fields of `TrainSettings` and their defaults, for a config."""
    return dataclasses.asdict(TrainSettings())


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
        every_steps: steps between two checkpoints within an epoch; 0 for none there.
        seed: of the order of examples, augmentation and dropout.
        mesh: the devices.
        parallel: how they share a batch.
        interruption: tells when to stop early.
        meta: plain data kept with every checkpoint.
    """

    label: str
    directory: pathlib.Path
    dataset: Dataset
    preprocessing: Preprocessing
    settings: TrainSettings
    log: LogSettings
    keep: int
    every_steps: int = 0
    seed: int
    mesh: Mesh
    parallel: ParallelSettings = dataclasses.field(default_factory=ParallelSettings)
    interruption: Interruption = dataclasses.field(default_factory=Interruption)
    meta: dict[str, Any]
