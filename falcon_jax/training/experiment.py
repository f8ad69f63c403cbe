"""A whole experiment: train a network, compress it in several ways, fine-tune, report."""

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

from falcon_jax.compression import Plan, compress, make_plan, profile, reestimate_batchnorm
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
from falcon_jax.training.parallel import data_mesh, replicate
from falcon_jax.training.settings import TrainSettings
from falcon_jax.training.step import Preprocessing, make_eval_step
from falcon_jax.training.workdir import claim_workdir

STANDARD = "standard"
LATENCY_BATCH = 32

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Setting:
    """What every stage of an experiment shares."""

    experiment: Experiment
    workdir: pathlib.Path
    config: Mapping[str, Any]
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

    def run(self, label: str, settings: TrainSettings, plan: Plan | None = None) -> Run:
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
            meta={
                "config": json.loads(json.dumps(self.config)),
                "plan": None if plan is None else plan.to_json(),
            },
        )

    def test_accuracy(
        self, network: Network, params: Arrays, statistics: Arrays, settings: TrainSettings
    ) -> float:
        params, statistics = replicate((params, statistics), self.mesh)
        return evaluate(
            make_eval_step(network, self.preprocessing),
            params,
            statistics,
            self.dataset.test,
            batch_size=settings.eval_batch_size,
            mesh=self.mesh,
        ).top1


def run_experiment(
    experiment: Experiment, workdir: pathlib.Path, config: Mapping[str, Any]
) -> tuple[list[Row], str]:
    """Run an experiment, or what is left of it.

    The standard model is trained (or loaded), then every variant is planned, compressed, evaluated
    at once and fine-tuned, each in a folder of its own. A stage that has its ``result.json`` is not
    run again; one that was interrupted goes on from its last checkpoint.

    Args:
        experiment: what to do.
        workdir: where everything goes; made if missing.
        config: the config that ``experiment`` was made from, to be kept in ``workdir``.

    Returns:
        The rows of the report, and the table as text. Its files are in ``workdir``.

    Raises:
        ValueError: if the data, the devices or the folder to start from do not fit, or ``workdir``
            holds another experiment.
        OSError: if files are missing or cannot be written.
        FloatingPointError: if a loss is not finite.
    """
    dataset = load_dataset(**experiment.data)
    claim_workdir(workdir, config)
    setting = _Setting(
        experiment=experiment,
        workdir=workdir,
        config=config,
        dataset=dataset,
        preprocessing=Preprocessing(
            mean=dataset.mean, std=dataset.std, augmentation=experiment.augmentation
        ),
        mesh=data_mesh(),
    )
    trained, row = _standard(setting)
    rows = [] if row is None else [row]
    for variant in experiment.variants:
        row = _finished(setting, setting.workdir / variant.name)
        rows.append(_compressed(setting, variant, *trained) if row is None else row)
    standard = profile(setting.model(experiment.train, seed=0), setting.sample(1))
    for row in rows:
        row["params_ratio"] = standard.params / row["params"]
        row["mult_adds_ratio"] = standard.mult_adds / row["mult_adds"]
    return rows, write_report(rows, workdir)


def _standard(setting: _Setting) -> tuple[tuple[Arrays, Arrays], Row | None]:
    """Return the standard model's arrays, and its row unless it was never trained."""
    experiment = setting.experiment
    network, *arrays = Network.split(setting.model(experiment.train, seed=experiment.seed))
    params, statistics = arrays
    if experiment.start == "scratch":
        return (params, statistics), None
    folder = setting.workdir / STANDARD
    if experiment.start != "train":
        folder = pathlib.Path(experiment.start)
        folder = folder / STANDARD if (folder / STANDARD).is_dir() else folder
    row = _finished(setting, folder)
    trained_elsewhere = experiment.start != "train"
    if trained_elsewhere or (row is not None and experiment.train.epochs > 0):
        params, statistics = _load(setting, folder, params, statistics)
    elif row is None:
        run = setting.run(STANDARD, experiment.train)
        params, statistics = train(run, network, params, statistics)
    params, statistics = _on_one_device((params, statistics))
    if row is None:
        accuracy = setting.test_accuracy(network, params, statistics, experiment.train)
        row = _row(setting, STANDARD, None, network.merge(params, statistics), None, accuracy)
        _write_result(setting, STANDARD, row)
    return (params, statistics), row


def _compressed(setting: _Setting, variant: Variant, params: Arrays, statistics: Arrays) -> Row:
    experiment = setting.experiment
    settings = experiment.finetune
    source = setting.model(settings, seed=experiment.seed + 1)
    if variant.solver != "random":  # which uses nothing of the trained network
        source = Network.split(source)[0].merge(params, statistics)
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
    trained = train(setting.run(variant.name, settings, plan), network, params, statistics)
    params, statistics = _on_one_device(trained)
    after = setting.test_accuracy(network, params, statistics, settings)
    row = _row(setting, variant.name, variant, network.merge(params, statistics), before, after)
    _write_result(setting, variant.name, row)
    return row


def _on_one_device(arrays: tuple[Arrays, Arrays]) -> tuple[Arrays, Arrays]:
    return jax.device_put(jax.device_get(arrays), jax.devices()[0])


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
    checkpoints = Checkpoints(folder / "checkpoints")
    try:
        return checkpoints.restore_best_model(*replicate((params, statistics), setting.mesh))
    finally:
        checkpoints.close()


def _finished(setting: _Setting, folder: pathlib.Path) -> Row | None:
    """Return the row of a stage that is finished, or None."""
    path = folder / "result.json"
    if not path.exists():
        return None
    if setting.experiment.log.progress and jax.process_index() == 0:
        print(f"{folder.name}: finished already", file=sys.stderr)
    return json.loads(path.read_text())


def _write_result(setting: _Setting, label: str, row: Row) -> None:
    if jax.process_index() == 0:
        write_json(setting.workdir / label / "result.json", row)
