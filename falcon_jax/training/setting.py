"""What the stages of an experiment share: data, models, folders."""

import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import ShapeDtypeStruct
from jax.sharding import Mesh

from falcon_jax.compression import Plan
from falcon_jax.data.augmentation import normalize
from falcon_jax.data.batching import train_batches
from falcon_jax.data.dataset import Dataset
from falcon_jax.models import get_model
from falcon_jax.models.stored import (
    Description,
    ImagePreprocessing,
    Stored,
    load_stored,
    save_stored,
    uncompressed,
)
from falcon_jax.models.units import UnitFactory, standard_unit
from falcon_jax.report.experiment import checked_row, write_report
from falcon_jax.report.table import write_json
from falcon_jax.training.checkpoints import BestModel, Checkpoints
from falcon_jax.training.config import Experiment
from falcon_jax.training.evaluation import evaluate
from falcon_jax.training.interruption import Interruption
from falcon_jax.training.network import Arrays, Network
from falcon_jax.training.parallel import replicate
from falcon_jax.training.run import Run
from falcon_jax.training.settings import TrainSettings
from falcon_jax.training.step import Preprocessing, make_eval_step
from falcon_jax.training.variants import Variant

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What every stage of an experiment shares.

    Attributes:
        experiment: the checked config.
        workdir: a folder a stage is in it.
        config: the config as plain data, kept with every checkpoint.
        dataset: the data.
        preprocessing: of images, with augmentation.
        mesh: the devices.
        interruption: tells when to stop early.
    """

    experiment: Experiment
    workdir: pathlib.Path
    config: Mapping[str, Any]
    dataset: Dataset
    preprocessing: Preprocessing
    mesh: Mesh
    interruption: Interruption

    def model(
        self,
        settings: TrainSettings,
        *,
        seed: int,
        unit: UnitFactory | None = None,
        width: float = 1.0,
    ) -> nnx.Module:
        """Return the experiment's model with random weights, of other units or width if asked."""
        dtype = jax.numpy.dtype(settings.dtype) if settings.dtype != "float32" else None
        # A network of units keeps its first convolution, as the paper's do.
        units = {} if unit is None else {"unit": unit, "stem_unit": standard_unit}
        return get_model(
            self.experiment.model,
            num_classes=self.dataset.num_classes,
            in_features=self.dataset.train.image_shape[-1],
            dtype=dtype,
            rngs=nnx.Rngs(seed),
            **units,
            **({} if width == 1 else {"width": width}),
        )

    def sample(self, batch: int) -> ShapeDtypeStruct:
        """Return the shape of a batch of images."""
        return ShapeDtypeStruct((batch, *self.dataset.train.image_shape), np.float32)

    def run(self, label: str, settings: TrainSettings, plan: Plan | None = None) -> Run:
        """Return what `train` needs to train one network in a folder of its own."""
        return Run(
            label=label,
            directory=self.workdir / label,
            dataset=self.dataset,
            preprocessing=self.preprocessing,
            settings=settings,
            log=self.experiment.log,
            keep=self.experiment.keep,
            every_steps=self.experiment.every_steps,
            seed=self.experiment.seed,
            mesh=self.mesh,
            parallel=self.experiment.parallel,
            interruption=self.interruption,
            meta={
                "config": json.loads(json.dumps(self.config)),
                "plan": None if plan is None else plan.to_json(),
            },
        )

    def test_accuracy(
        self, network: Network, params: Arrays, statistics: Arrays, settings: TrainSettings
    ) -> float:
        """Return the share of test images that a network classifies correctly."""
        params, statistics = replicate((params, statistics), self.mesh)
        return evaluate(
            make_eval_step(network, self.preprocessing),
            params,
            statistics,
            self.dataset.test,
            batch_size=settings.eval_batch_size,
            mesh=self.mesh,
        ).top1

    def load(self, folder: pathlib.Path, params: Arrays, statistics: Arrays) -> BestModel:
        """Return the best parameters and statistics that a run left in a folder."""
        if not (folder / "checkpoints").is_dir():
            raise FileNotFoundError(
                f"{folder} holds no checkpoints; give config.compression.start the workdir of an "
                "experiment whose standard model was trained, or 'train' or 'scratch'"
            )
        checkpoints = Checkpoints(folder / "checkpoints")
        try:
            return checkpoints.restore_best_model(*replicate((params, statistics), self.mesh))
        finally:
            checkpoints.close()

    def finished(self, folder: pathlib.Path) -> Row | None:
        """Return the row of a stage that is finished, or None."""
        path = folder / "result.json"
        if not path.exists():
            return None
        if self.experiment.log.progress and jax.process_index() == 0:
            print(f"{folder.name}: finished already", file=sys.stderr)
        return checked_row(path)

    def write_plan(self, label: str, plan: Plan) -> None:
        """Write the plan of a stage, to be read and to be used."""
        if jax.process_index() == 0:
            directory = self.workdir / label
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "plan.txt").write_text(f"{plan}\n")
            plan.save(directory / "plan.json")

    def write_report(self, rows: list[Row]) -> str:
        """Write the report of the stages and return its table."""
        if jax.process_index() > 0:
            return ""
        return write_report(rows, self.workdir)

    def stored(self, path: str) -> tuple[Arrays, Arrays]:
        """Return parameters and statistics of a stored model that is not compressed."""
        stored = load_stored(path)
        found = stored.description
        if found.arch != self.experiment.model or found.width != 1 or found.unit is not None:
            raise ValueError(
                f"{path} holds a {found.arch} of width {found.width:g} and unit {found.unit}, but "
                f"config.model.name is {self.experiment.model!r}"
            )
        if stored.plan.replaced:
            raise ValueError(f"{path} is compressed already; give the model before compression")
        if found.classes != self.dataset.num_classes:
            raise ValueError(
                f"{path} has {found.classes} classes, but {self.dataset.name} has "
                f"{self.dataset.num_classes}; convert its weights with "
                f"--classes={self.dataset.num_classes} --head=new"
            )
        _, params, statistics = Network.split(stored.model)
        return params, statistics

    def finish(
        self, label: str, model: nnx.Module, plan: Plan | None, variant: Variant | None, row: Row
    ) -> None:
        """Store the model of a stage, and mark the stage as finished with its row of the report."""
        if jax.process_index() == 0:
            description = self._description(variant)
            stored = uncompressed(model, description)
            if plan is not None:
                stored = Stored(model=model, plan=plan, description=description)
            save_stored(self.workdir / label / "model", stored, overwrite=True)
            write_json(self.workdir / label / "result.json", row)

    def _description(self, variant: Variant | None) -> Description:
        unit = None
        if variant is not None:
            bases = {base.name: base for base in self.experiment.variants}
            unit = bases.get(variant.of, variant).unit_options
        return Description(
            arch=self.experiment.model,
            classes=self.dataset.num_classes,
            width=1.0 if variant is None else variant.width,
            unit=unit,
            preprocessing=ImagePreprocessing(
                image_size=self.dataset.train.image_shape[0],
                shorter_side=self.experiment.data["shorter_side"],
                interpolation=self.experiment.data["interpolation"],
                mean=self.preprocessing.mean,
                std=self.preprocessing.std,
            ),
            source={"data": self.dataset.name, "seed": self.experiment.seed},
        )

    def inputs(self, settings: TrainSettings, count: int) -> Iterator[jax.Array]:
        """Yield so many training batches as the network sees them, without augmentation."""
        batches = train_batches(
            self.dataset.train, settings.batch_size, seed=self.experiment.seed, epoch=0
        )
        for batch in itertools.islice(batches, count):
            images = jax.numpy.asarray(batch["image"])
            yield normalize(images, self.preprocessing.mean, self.preprocessing.std)


def on_one_device(arrays: tuple[Arrays, Arrays]) -> tuple[Arrays, Arrays]:
    """Return the arrays on the first device of this process."""
    return jax.device_put(jax.device_get(arrays), jax.local_devices()[0])
