"""What a training run is made of, beside the network."""

import dataclasses
import pathlib
from typing import Any

from jax.sharding import Mesh

from falcon_jax.data.dataset import Dataset
from falcon_jax.training.interruption import Interruption
from falcon_jax.training.settings import LogSettings, ParallelSettings, TrainSettings
from falcon_jax.training.step import Preprocessing


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
