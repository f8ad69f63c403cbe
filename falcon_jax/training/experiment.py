"""A whole experiment: train a network, compress it in several ways, fine-tune, report."""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import ShapeDtypeStruct
from jax.sharding import Mesh

from falcon_jax.compression.batchnorm import reestimate_batchnorm
from falcon_jax.compression.calibration import calibrate
from falcon_jax.compression.compress import compress, narrow
from falcon_jax.compression.plan import Plan, make_plan
from falcon_jax.compression.profile import profile
from falcon_jax.compression.search import search
from falcon_jax.data.augmentation import normalize
from falcon_jax.data.batching import train_batches
from falcon_jax.data.dataset import Dataset
from falcon_jax.data.loading import load_dataset
from falcon_jax.export.files import FORMATS, require_packages
from falcon_jax.export.stored import export_stored
from falcon_jax.models.registry import get_model
from falcon_jax.models.units import UnitFactory, standard_unit
from falcon_jax.paths import user_path
from falcon_jax.report.experiment import checked_row, write_report
from falcon_jax.report.table import write_json
from falcon_jax.storage.models import (
    Description,
    ImagePreprocessing,
    Stored,
    is_stored,
    load_stored,
    read_description,
    save_stored,
    uncompressed,
)
from falcon_jax.training.checkpoints import BestModel, Checkpoints
from falcon_jax.training.config import ExperimentConfig, TrainConfig
from falcon_jax.training.devices import data_mesh, replicate
from falcon_jax.training.evaluation import evaluate, make_eval_step
from falcon_jax.training.interruption import Interruption
from falcon_jax.training.loop import Job, train
from falcon_jax.training.monitoring import require_loggers
from falcon_jax.training.network import Arrays, Network
from falcon_jax.training.step import Preprocessing
from falcon_jax.training.variants import Variant
from falcon_jax.training.workdir import claim_workdir, locked

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workspace:
    """What every stage of an experiment shares.

    Attributes:
        config: of the experiment.
        workdir: every stage has a folder in it.
        dataset: the data.
        preprocessing: of images, with augmentation.
        mesh: the devices.
        interruption: tells when to stop early.
    """

    config: ExperimentConfig
    workdir: pathlib.Path
    dataset: Dataset
    preprocessing: Preprocessing
    mesh: Mesh
    interruption: Interruption

    def model(
        self,
        recipe: TrainConfig,
        *,
        seed: int,
        unit: UnitFactory | None = None,
        width: float = 1.0,
    ) -> nnx.Module:
        """Return the experiment's model with random weights, of other units or width if asked."""
        dtype = jax.numpy.dtype(recipe.dtype) if recipe.dtype != "float32" else None
        # A network of units keeps its first convolution, as the paper's do.
        units = {} if unit is None else {"unit": unit, "stem_unit": standard_unit}
        return get_model(
            self.config.model.name,
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

    def job(
        self,
        label: str,
        recipe: TrainConfig,
        plan: Plan | None = None,
        teacher: tuple[Network, Arrays, Arrays] | None = None,
    ) -> Job:
        """Return what `train` needs to train one network in a folder of its own."""
        return Job(
            label=label,
            directory=self.workdir / label,
            config=self.config,
            recipe=recipe,
            dataset=self.dataset,
            preprocessing=self.preprocessing,
            mesh=self.mesh,
            interruption=self.interruption,
            meta={
                "config": json.loads(json.dumps(dataclasses.asdict(self.config))),
                "plan": None if plan is None else plan.to_json(),
            },
            teacher=teacher,
        )

    def test_accuracy(
        self, network: Network, params: Arrays, statistics: Arrays, recipe: TrainConfig
    ) -> float:
        """Return the share of test images that a network classifies correctly."""
        params, statistics = replicate((params, statistics), self.mesh)
        return evaluate(
            make_eval_step(network, self.preprocessing),
            params,
            statistics,
            self.dataset.test,
            batch_size=recipe.eval_batch_size,
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
        if self.config.log.progress and jax.process_index() == 0:
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
        if found.arch != self.config.model.name or found.width != 1 or found.unit is not None:
            raise ValueError(
                f"{path} holds a {found.arch} of width {found.width:g} and unit {found.unit}, but "
                f"config.model.name is {self.config.model.name!r}"
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
            for name in self.config.export:
                count = max(self.config.compression.calibration_batches, 1)
                batches = self.inputs(self.config.finetune, count)
                export_stored(stored, name, self.workdir / label / FORMATS[name], batches=batches)
            write_json(self.workdir / label / "result.json", row)

    def _description(self, variant: Variant | None) -> Description:
        unit = None
        if variant is not None:
            bases = {base.name: base for base in self.config.compression.chosen}
            unit = bases.get(variant.of, variant).unit_options
        return Description(
            arch=self.config.model.name,
            classes=self.dataset.num_classes,
            width=1.0 if variant is None else variant.width,
            unit=unit,
            preprocessing=ImagePreprocessing(
                image_size=self.dataset.train.image_shape[0],
                shorter_side=self.config.data.shorter_side,
                interpolation=self.config.data.interpolation,
                mean=self.preprocessing.mean,
                std=self.preprocessing.std,
            ),
            source={"data": self.dataset.name, "seed": self.config.seed},
        )

    def inputs(self, recipe: TrainConfig, count: int) -> Iterator[jax.Array]:
        """Yield so many training batches as the network sees them, without augmentation."""
        batches = train_batches(
            self.dataset.train, recipe.batch_size, seed=self.config.seed, epoch=0
        )
        for batch in itertools.islice(batches, count):
            images = jax.numpy.asarray(batch["image"])
            yield normalize(images, self.preprocessing.mean, self.preprocessing.std)


def on_one_device(arrays: tuple[Arrays, Arrays]) -> tuple[Arrays, Arrays]:
    """Return the arrays on the first device of this process."""
    return jax.device_put(jax.device_get(arrays), jax.local_devices()[0])


STANDARD = "standard"
LATENCY_BATCH = 32


def run_experiment(
    config: ExperimentConfig,
    workdir: pathlib.Path,
    interruption: Interruption | None = None,
) -> tuple[list[Row], str]:
    """Run an experiment, or what is left of it.

    The standard model is trained (or loaded), then every variant is planned, compressed, evaluated
    at once and fine-tuned, each in a folder of its own. A stage that has its ``result.json`` is not
    run again; one that was interrupted goes on from its last checkpoint.

    Args:
        config: what to do; it is kept in ``workdir``.
        workdir: where everything goes; made if missing.
        interruption: tells when to stop early; None for never.

    Returns:
        The rows of the report, and the table as text. Its files are in ``workdir``.

    Raises:
        ValueError: if the data, the devices or the folder to start from do not fit, or ``workdir``
            holds another experiment.
        OSError: if files are missing or cannot be written.
        FloatingPointError: if losses or gradients are not finite.
        Stopped: if the run was asked to stop, or a checkpoint could not be saved.
    """
    with begin(config, workdir, interruption) as workspace:
        return _all_stages(workspace)


def _all_stages(workspace: Workspace) -> tuple[list[Row], str]:
    config = workspace.config
    trained, row, note = _standard(workspace)
    rows = [] if row is None else [row]
    for variant in config.compression.chosen:
        workspace.interruption.check()
        row = workspace.finished(workspace.workdir / variant.name)
        if row is None and variant.unit is not None:
            row = _built(workspace, variant, trained)
        elif row is None:
            row = _compressed(workspace, variant, trained, note)
        rows.append(row)
    standard = profile(workspace.model(config.train, seed=0), workspace.sample(1))
    for row in rows:
        row["params_ratio"] = standard.params / row["params"]
        row["mult_adds_ratio"] = standard.mult_adds / row["mult_adds"]
    return rows, workspace.write_report(rows)


@contextlib.contextmanager
def begin(
    config: ExperimentConfig,
    workdir: pathlib.Path,
    interruption: Interruption | None = None,
) -> Iterator[Workspace]:
    """Load the data of an experiment and claim its folder, for as long as the context lasts.

    Args:
        config: what to do.
        workdir: where everything goes; made if missing.
        interruption: tells when to stop early; None for never.

    Yields:
        What the stages share.

    Raises:
        ValueError: if the data or the devices do not fit, or ``workdir`` holds another experiment.
        OSError: if files are missing or cannot be written.
    """
    workdir = user_path(workdir)
    require_packages(config.export)
    require_loggers(config.log.chosen)
    dataset = load_dataset(config.data, seed=config.seed)
    mean, std = dataset.mean, dataset.std
    if is_stored(config.compression.start):
        # A network goes on with images as it knows them.
        known = read_description(config.compression.start).preprocessing
        mean, std = known.mean, known.std
    with locked(workdir):
        claim_workdir(workdir, dataclasses.asdict(config))
        yield Workspace(
            config=config,
            workdir=workdir,
            dataset=dataset,
            preprocessing=Preprocessing(mean=mean, std=std, augmentation=config.data.augmentation),
            mesh=data_mesh(),
            interruption=interruption or Interruption(),
        )


def trained_model(workspace: Workspace) -> nnx.Module:
    """Return the standard model of an experiment, trained now unless it was before."""
    (params, statistics), _, _ = _standard(workspace)
    network, _, _ = Network.split(workspace.model(workspace.config.train, seed=0))
    return network.merge(params, statistics)


def _standard(workspace: Workspace) -> tuple[tuple[Arrays, Arrays], Row | None, str | None]:
    """Return the standard model's arrays, its row unless it was never trained, and a note.

    The note says so if the arrays are not those of the best checkpoint.
    """
    config, start = workspace.config, workspace.config.compression.start
    network, *arrays = Network.split(workspace.model(config.train, seed=config.seed))
    params, statistics = arrays
    if start == "scratch":
        return (params, statistics), None, None
    folder = workspace.workdir / STANDARD
    stored = is_stored(start)
    if start != "train" and not stored:
        folder = user_path(start)
        folder = folder / STANDARD if (folder / STANDARD).is_dir() else folder
    row = workspace.finished(folder)
    trained_elsewhere = start != "train"
    best = None
    if stored:
        params, statistics = workspace.stored(start)
    elif trained_elsewhere or (row is not None and config.train.epochs > 0):
        best = workspace.load(folder, params, statistics)
    elif row is None:
        best = train(workspace.job(STANDARD, config.train), network, params, statistics)
    note = None
    if best is not None:
        (params, statistics), note = best.arrays, best.note
    params, statistics = on_one_device((params, statistics))
    if row is None:
        accuracy = workspace.test_accuracy(network, params, statistics, config.train)
        model = network.merge(params, statistics)
        row = _row(workspace, STANDARD, None, model, None, accuracy, note)
        workspace.finish(STANDARD, model, None, None, row)
    return (params, statistics), row, note and f"compressed from {STANDARD}: {note}"


def _built(workspace: Workspace, variant: Variant, trained: tuple[Arrays, Arrays]) -> Row:
    """Train a network of other units from random weights."""
    network, params, statistics = Network.split(_unit_model(workspace, variant))
    return _finetuned(workspace, variant, None, network, params, statistics, trained, None)


def _unit_model(workspace: Workspace, variant: Variant) -> nnx.Module:
    seed = workspace.config.seed + 1
    recipe = workspace.config.finetune
    return workspace.model(recipe, seed=seed, unit=variant.unit, width=variant.width)


def _compressed(
    workspace: Workspace,
    variant: Variant,
    trained: tuple[Arrays, Arrays],
    note: str | None,
) -> Row:
    config = workspace.config
    source, note = _source(workspace, variant, *trained, note)
    plan = _plan(workspace, variant, source)
    workspace.write_plan(variant.name, plan)
    model = compress(source, plan, key=jax.random.key(config.seed))
    if variant.solver != "random":
        model = _fitted_to_data(workspace, source, model, plan)
    return _finetuned(workspace, variant, plan, *Network.split(model), trained, note)


def _plan(workspace: Workspace, variant: Variant, source: nnx.Module) -> Plan:
    """Return the plan of a variant; one that was searched before an interruption is the same."""
    sample = workspace.sample(1)
    if variant.target is None:
        return make_plan(source, variant.rules, sample, solver=variant.solver)
    known = workspace.workdir / variant.name / "plan.json"
    if known.is_file():
        return Plan.load(known)
    if variant.target.quantity == "latency_ms" and jax.process_count() > 1:
        raise ValueError(
            "config.compression.target: a latency is measured by one process; give mult_adds or "
            "params, or search with `python -m falcon_jax shrink` first"
        )
    config = workspace.config
    return search(
        source,
        list(workspace.inputs(config.finetune, config.compression.calibration_batches)),
        target=variant.target,
        candidates=variant.candidates or None,
        rules=variant.rules,
        sample=jax.numpy.zeros(sample.shape, sample.dtype),
    )


def _fitted_to_data(
    workspace: Workspace, source: nnx.Module, model: nnx.Module, plan: Plan
) -> nnx.Module:
    """Return a compressed model after a look at a few training batches, without labels.

    Layers that answer as the original ones did go with the BatchNorm statistics that these had.
    """
    compression, recipe = workspace.config.compression, workspace.config.finetune
    if compression.calibration_batches and plan.replaced:
        batches = list(workspace.inputs(recipe, compression.calibration_batches))
        model = calibrate(source, model, plan, batches)
    elif compression.batchnorm_batches:
        batches = workspace.inputs(recipe, compression.batchnorm_batches)
        model = reestimate_batchnorm(model, batches)
    return model


def _source(
    workspace: Workspace,
    variant: Variant,
    params: Arrays,
    statistics: Arrays,
    note: str | None,
) -> tuple[nnx.Module, str | None]:
    """Return the network that a variant compresses, trained unless the solver is ``random``.

    A note says so if it is not that of the best checkpoint.
    """
    config = workspace.config
    recipe, seed = config.finetune, config.seed + 1
    bases = {base.name: base for base in config.compression.chosen}
    source = workspace.model(recipe, seed=seed)
    if variant.of:
        source = _unit_model(workspace, bases[variant.of])
    if variant.solver == "random":
        note = None
    else:
        network, *blank = Network.split(source)
        if variant.of:
            best = workspace.load(workspace.workdir / variant.of, *blank)
            params, statistics = on_one_device(best.arrays)
            note = best.note and f"compressed from {variant.of}: {best.note}"
        source = network.merge(params, statistics)
    if variant.width == 1:
        return source, note
    return narrow(source, workspace.model(recipe, seed=seed, width=variant.width)), note


def _finetuned(
    workspace: Workspace,
    variant: Variant,
    plan: Plan | None,
    network: Network,
    params: Arrays,
    statistics: Arrays,
    standard: tuple[Arrays, Arrays],
    note: str | None,
) -> Row:
    recipe = workspace.config.finetune
    before = None
    if plan is not None:
        before = workspace.test_accuracy(network, params, statistics, recipe)
    teacher = None
    if recipe.distillation.weight:
        teacher = (Network.split(workspace.model(recipe, seed=0))[0], *standard)
    job = workspace.job(variant.name, recipe, plan, teacher)
    trained = train(job, network, params, statistics)
    params, statistics = on_one_device(trained.arrays)
    note = "; ".join(filter(None, (note, trained.note))) or None
    after = workspace.test_accuracy(network, params, statistics, recipe)
    model = network.merge(params, statistics)
    row = _row(workspace, variant.name, variant, model, before, after, note)
    workspace.finish(variant.name, model, plan, variant, row)
    return row


def _row(
    workspace: Workspace,
    label: str,
    variant: Variant | None,
    model: nnx.Module,
    before: float | None,
    after: float,
    note: str | None,
) -> Row:
    batch = jax.numpy.zeros(workspace.sample(LATENCY_BATCH).shape, np.float32)
    cost = profile(model, batch, latency=True)
    row = {
        "label": label,
        "method": STANDARD if variant is None else variant.kind,
        "rank": None if variant is None else variant.rank,
        "params": cost.params,
        "mult_adds": cost.mult_adds,
        "accuracy_before": before,
        "accuracy_after": after,
        "latency_ms": cost.latency_ms,
    }
    return row if note is None else {**row, "note": note}
