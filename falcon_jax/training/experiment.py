"""A whole experiment: train a network, compress it in several ways, fine-tune, report."""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import ShapeDtypeStruct
from jax.sharding import Mesh

from falcon_jax.compression import Profile, compress, make_plan, profile, reestimate_batchnorm
from falcon_jax.data.augmentation import normalize
from falcon_jax.data.batching import train_batches
from falcon_jax.data.dataset import Dataset
from falcon_jax.data.loading import load_dataset
from falcon_jax.models import get_model
from falcon_jax.report.experiment import write_report
from falcon_jax.report.table import write_json
from falcon_jax.training.checkpoints import Checkpoints
from falcon_jax.training.config import Experiment, Variant
from falcon_jax.training.evaluation import evaluate
from falcon_jax.training.loop import Run, train
from falcon_jax.training.network import Arrays, Network
from falcon_jax.training.optimizers import make_optimizer
from falcon_jax.training.parallel import data_mesh, replicate
from falcon_jax.training.settings import TrainSettings
from falcon_jax.training.step import Preprocessing, init_state, make_eval_step

STANDARD = "standard"
LATENCY_BATCH = 32

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Setting:
    """What every stage of an experiment shares."""

    experiment: Experiment
    workdir: pathlib.Path
    dataset: Dataset
    preprocessing: Preprocessing
    mesh: Mesh

    def model(self, settings: TrainSettings, *, seed: int) -> nnx.Module:
        dtype = jax.numpy.dtype(settings.dtype) if settings.dtype != "float32" else None
        return get_model(
            self.experiment.model,
            num_classes=self.dataset.num_classes,
            in_features=self.dataset.train.images.shape[-1],
            dtype=dtype,
            rngs=nnx.Rngs(seed),
        )

    def sample(self, batch: int) -> ShapeDtypeStruct:
        return ShapeDtypeStruct((batch, *self.dataset.train.images.shape[1:]), np.float32)

    def run(self, label: str, settings: TrainSettings, meta: dict[str, Any]) -> Run:
        return Run(
            label=label,
            directory=self.workdir / label,
            dataset=self.dataset,
            preprocessing=self.preprocessing,
            settings=settings,
            log=self.experiment.log,
            keep=self.experiment.keep,
            seed=self.experiment.seed,
            mesh=self.mesh,
            meta=meta,
        )

    def test_accuracy(
        self, network: Network, params: Arrays, statistics: Arrays, settings: TrainSettings
    ) -> float:
        return evaluate(
            make_eval_step(network, self.preprocessing),
            *replicate((params, statistics), self.mesh),
            self.dataset.test,
            batch_size=settings.eval_batch_size,
            mesh=self.mesh,
        ).top1


def run_experiment(experiment: Experiment, workdir: pathlib.Path) -> tuple[list[Row], str]:
    """Run an experiment, or what is left of it.

    The standard model is trained (or loaded), then every variant is planned, compressed, evaluated
    at once and fine-tuned, each in a folder of its own. A stage that has its ``result.json`` is not
    run again; one that was interrupted goes on from its last checkpoint.

    Args:
        experiment: what to do.
        workdir: where everything goes; made if missing.

    Returns:
        The rows of the report, and the table as text. Its files are in ``workdir``.

    Raises:
        ValueError: if the data, the devices or the folder to start from do not fit.
        OSError: if files are missing or cannot be written.
    """
    dataset = load_dataset(**experiment.data)
    setting = _Setting(
        experiment=experiment,
        workdir=workdir,
        dataset=dataset,
        preprocessing=Preprocessing(
            mean=dataset.mean, std=dataset.std, augmentation=experiment.augmentation
        ),
        mesh=data_mesh(),
    )
    standard, row = _standard(setting)
    rows = [row] if row is not None else []
    for variant in experiment.variants:
        rows.append(_stage(setting, variant.name) or _compressed(setting, variant, standard))
    before = standard_cost_of(setting)
    for row in rows:
        row["params_ratio"] = before.params / row["params"]
        row["mult_adds_ratio"] = before.mult_adds / row["mult_adds"]
    return rows, write_report(rows, workdir)


def standard_cost_of(setting: _Setting) -> Profile:
    """Return the cost of the standard model."""
    return profile(setting.model(setting.experiment.train, seed=0), setting.sample(1))


def _standard(setting: _Setting) -> tuple[nnx.Module, Row | None]:
    """Return the trained standard model and its row (None if it was not trained here)."""
    experiment = setting.experiment
    model = setting.model(experiment.train, seed=experiment.seed)
    if experiment.start == "scratch":
        return model, None
    network, params, statistics = Network.split(model)
    if experiment.start != "train":
        folder = pathlib.Path(experiment.start)
        folder = folder / STANDARD if (folder / STANDARD).is_dir() else folder
        params, statistics = _load(setting, folder, params, statistics)
        row = _read_result(folder)
        if row is None:
            accuracy = setting.test_accuracy(network, params, statistics, experiment.train)
            row = _row(setting, STANDARD, None, network.merge(params, statistics), None, accuracy)
        return network.merge(params, statistics), row
    row = _stage(setting, STANDARD)
    if row is not None:
        params, statistics = _load(setting, setting.workdir / STANDARD, params, statistics)
        return network.merge(params, statistics), row
    run = setting.run(STANDARD, experiment.train, {"model": experiment.model})
    params, statistics = train(run, network, params, statistics)
    accuracy = setting.test_accuracy(network, params, statistics, experiment.train)
    model = network.merge(*jax.device_get((params, statistics)))
    row = _row(setting, STANDARD, None, model, None, accuracy)
    _write_result(setting, STANDARD, row)
    return model, row


def _compressed(setting: _Setting, variant: Variant, standard: nnx.Module) -> Row:
    experiment = setting.experiment
    settings = experiment.finetune
    source = standard
    if variant.solver == "random":  # nothing of the trained network is to be used
        source = setting.model(settings, seed=experiment.seed + 1)
    plan = make_plan(source, variant.rules, setting.sample(1), solver=variant.solver)
    directory = setting.workdir / variant.name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "plan.txt").write_text(f"{plan}\n")
    plan.save(directory / "plan.json")
    model = compress(source, plan, key=jax.random.key(experiment.seed))
    if experiment.batchnorm_batches and variant.solver != "random":
        model = reestimate_batchnorm(model, _inputs(setting, settings))
    network, params, statistics = Network.split(model)
    before = setting.test_accuracy(network, params, statistics, settings)
    run = setting.run(variant.name, settings, {"model": experiment.model, "plan": plan.to_json()})
    params, statistics = train(run, network, params, statistics)
    after = setting.test_accuracy(network, params, statistics, settings)
    model = network.merge(*jax.device_get((params, statistics)))
    row = _row(setting, variant.name, variant, model, before, after)
    _write_result(setting, variant.name, row)
    return row


def _inputs(setting: _Setting, settings: TrainSettings) -> Iterator[jax.Array]:
    """Yield a few training batches as the network sees them, without augmentation."""
    batches = train_batches(
        setting.dataset.train, settings.batch_size, seed=setting.experiment.seed, epoch=0
    )
    for batch in itertools.islice(batches, setting.experiment.batchnorm_batches):
        images = jax.numpy.asarray(batch["image"])
        yield normalize(images, setting.preprocessing.mean, setting.preprocessing.std)


def _row(
    setting: _Setting,
    label: str,
    variant: Variant | None,
    model: nnx.Module,
    before: float | None,
    after: float,
) -> Row:
    batch = jax.numpy.zeros(setting.sample(LATENCY_BATCH).shape, np.float32)
    cost = profile(model, batch, latency=True)
    options = {} if variant is None else variant.method.options()
    return {
        "label": label,
        "method": STANDARD if variant is None else variant.method.name,
        "rank": options.get("rank"),
        "params": cost.params,
        "mult_adds": cost.mult_adds,
        "accuracy_before": before,
        "accuracy_after": after,
        "latency_ms": cost.latency_ms,
    }


def _load(
    setting: _Setting, folder: pathlib.Path, params: Arrays, statistics: Arrays
) -> tuple[Arrays, Arrays]:
    """Return the best parameters and statistics that a run left in a folder."""
    if not (folder / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"{folder} holds no checkpoints; give config.compression.start the workdir of an "
            "experiment whose standard model was trained, or 'train' or 'scratch'"
        )
    optimizer = make_optimizer(setting.experiment.train, 1)
    like = replicate(init_state(params, statistics, optimizer), setting.mesh)
    checkpoints = Checkpoints(folder / "checkpoints")
    try:
        restored = checkpoints.restore_best(like)
    finally:
        checkpoints.close()
    if restored is None:
        raise FileNotFoundError(f"{folder / 'checkpoints'} is empty")
    return jax.device_get((restored[0].params, restored[0].statistics))


def _stage(setting: _Setting, label: str) -> Row | None:
    return _read_result(setting.workdir / label)


def _read_result(folder: pathlib.Path) -> Row | None:
    path = folder / "result.json"
    return json.loads(path.read_text()) if path.exists() else None


def _write_result(setting: _Setting, label: str, row: Row) -> None:
    if jax.process_index() == 0:
        write_json(setting.workdir / label / "result.json", row)
