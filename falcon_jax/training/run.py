"""What a training run is made of, beside the network."""

import dataclasses
import pathlib
from typing import Any

from jax.sharding import Mesh

from falcon_jax.data.dataset import Dataset
from falcon_jax.training.execution import ParallelSettings
from falcon_jax.training.interruption import Interruption
from falcon_jax.training.settings import TrainSettings
from falcon_jax.training.step import Preprocessing


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
