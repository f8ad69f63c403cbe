import itertools
import json
import shutil

import jax
import numpy as np
import pytest

from falcon_jax.compression.plan import Plan
from falcon_jax.methods import Falcon
from falcon_jax.models import vgg
from falcon_jax.storage.models import load_stored
from falcon_jax.training import experiment as rooms
from falcon_jax.training.checkpoints import BestModel
from falcon_jax.training.config import check_config, default_config
from falcon_jax.training.experiment import run_experiment
from falcon_jax.training.interruption import Stopped

FALCON = {"falcon_k1": {"method": "falcon", "rank": 1}}
CALIBRATED = {"compression__calibration_batches": 1}
UNFITTED = {"unfitted": {"method": "falcon", "rank": 1, "solver": "random"}}
COLUMNS = {
    "label",
    "method",
    "rank",
    "params",
    "mult_adds",
    "params_ratio",
    "mult_adds_ratio",
    "accuracy_before",
    "accuracy_after",
    "latency_ms",
}


def small(**fields):
    """Return the config of an experiment of seconds."""
    config = default_config()
    config.model.name = "vgg8_cifar"
    config.data.update({"source": "fake", "image_size": 8, "train_fraction": 0.2})
    for stage in (config.train, config.finetune):
        stage.update({"epochs": 1, "batch_size": 64, "learning_rate": 0.02, "schedule": "constant"})
    config.compression.update({"batchnorm_batches": 1, "calibration_batches": 0})
    config.compression.variants = FALCON | UNFITTED
    config.log.update({"tensorboard": False, "progress": False})
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return config


def run(config, workdir):
    return run_experiment(check_config(config), workdir)


@pytest.fixture(scope="module", autouse=True)
def _quickly():
    """Compile fewer layers, for one device; the step's own tests are for eight."""
    types = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((1,), ("data",), axis_types=types, devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rooms, "data_mesh", lambda: mesh)
        patched.setattr(vgg, "VGG8_STAGES", ((8,), (24,)))
        yield


@pytest.fixture
def trained(monkeypatch):
    """Record the labels of the stages that are trained, and train them."""
    labels = []
    train = rooms.train

    def recording(run, *arguments):
        labels.append(run.label)
        return train(run, *arguments)

    monkeypatch.setattr(rooms, "train", recording)
    return labels


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole experiment: its folder, rows and table."""
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, *run(small(), workdir)


@pytest.fixture
def copy(finished, tmp_path):
    """The folder of the whole experiment, to be spoilt."""
    return shutil.copytree(finished[0], tmp_path / "copy")


def test_the_report_has_every_row_and_every_column(finished):
    _, rows, table = finished
    assert [row["label"] for row in rows] == ["standard", "falcon_k1", "unfitted"]
    assert [row["method"] for row in rows] == ["standard", "falcon", "falcon"]
    assert [row["rank"] for row in rows] == [None, 1, 1]
    for row in rows:
        assert set(row) == COLUMNS
        assert 0 <= row["accuracy_after"] <= 1 and row["latency_ms"] > 0
        assert row["label"] in table
    assert rows[0]["accuracy_before"] is None
    assert all(0 <= row["accuracy_before"] <= 1 for row in rows[1:])


def test_accuracies_are_shares_of_the_test_split(finished):
    for row in finished[1]:
        for name in ("accuracy_before", "accuracy_after"):
            if row[name] is not None:
                assert row[name] * 500 == pytest.approx(round(row[name] * 500), abs=1e-3)


def test_costs_counted_by_hand(finished):
    standard, compressed, unfitted = finished[1]
    widths, sides = [3, 8, 24], [8, 4]
    pairs = list(itertools.pairwise(widths))
    dense = [(24, 128), (128, 10)]
    rest = sum(m * n + n for m, n in dense)
    norm = 2 * sum(widths[1:])
    bias = sum(widths[1:])
    kernels = sum(9 * m * n for m, n in pairs)
    factors = sum(m * n + 9 * n for m, n in pairs)
    assert standard["params"] == kernels + bias + norm + rest
    assert compressed["params"] == unfitted["params"] == factors + bias + norm + rest
    work = sum(s * s * (9 * m * n + n) for s, (m, n) in zip(sides, pairs, strict=True))
    less = sum(s * s * (m * n + 9 * n + n) for s, (m, n) in zip(sides, pairs, strict=True))
    assert standard["mult_adds"] == work + rest
    assert compressed["mult_adds"] == less + rest
    assert compressed["params_ratio"] == pytest.approx(standard["params"] / compressed["params"])
    assert compressed["mult_adds_ratio"] == pytest.approx((work + rest) / (less + rest))
    assert standard["params_ratio"] == standard["mult_adds_ratio"] == 1


def test_all_files_are_there(finished):
    workdir, rows, table = finished
    reports = {"report.txt", "report.csv", "report.json"}
    plots = {"accuracy_vs_params.png", "accuracy_vs_mult_adds.png"}
    stages = {"standard", "falcon_k1", "unfitted"}
    found = {path.name for path in workdir.iterdir()}
    assert found == reports | plots | stages | {"config.json", ".lock"}
    for stage in stages:
        names = {path.name for path in (workdir / stage).iterdir()}
        plan = set() if stage == "standard" else {"plan.txt", "plan.json"}
        assert names == {"checkpoints", "metrics.jsonl", "model", "result.json"} | plan
    assert (workdir / "report.txt").read_text() == table + "\n"
    report = json.loads((workdir / "report.json").read_text())
    assert [row["label"] for row in report] == [row["label"] for row in rows]
    assert all(set(row) == COLUMNS for row in report)


def test_the_plan_says_what_was_done(finished):
    fitted = json.loads((finished[0] / "falcon_k1" / "plan.json").read_text())
    unfitted = json.loads((finished[0] / "unfitted" / "plan.json").read_text())
    assert (fitted["solver"], unfitted["solver"]) == ("exact", "random")
    assert all(0 < row["error"] < 1 for row in fitted["rows"])
    assert all(row["error"] is None for row in unfitted["rows"])


def test_the_same_call_runs_nothing_again(finished, monkeypatch):
    def fail(*arguments):
        raise AssertionError("a stage was trained again")

    monkeypatch.setattr(rooms, "train", fail)
    rows, table = run(small(), finished[0])
    assert (rows, table) == finished[1:]


def test_a_variant_without_its_result_is_finished_and_nothing_else(copy, finished, trained):
    (copy / "unfitted" / "result.json").unlink()
    rows, _ = run(small(), copy)
    assert trained == ["unfitted"]
    timeless = [{k: v for k, v in row.items() if k != "latency_ms"} for row in rows]
    expected = [{k: v for k, v in row.items() if k != "latency_ms"} for row in finished[1]]
    assert timeless == expected


def test_a_variant_whose_folder_is_gone_comes_out_the_same(copy, finished, trained):
    shutil.rmtree(copy / "falcon_k1")
    rows, _ = run(small(), copy)
    assert trained == ["falcon_k1"]
    for name in ("accuracy_before", "accuracy_after"):
        assert rows[1][name] == finished[1][1][name]


def test_only_runs_what_is_chosen(copy, trained):
    rows, _ = run(small(compression__only="unfitted"), copy)
    assert [row["label"] for row in rows] == ["standard", "unfitted"]
    assert trained == []


def test_another_config_is_refused_and_spoils_nothing(copy, trained):
    before = (copy / "report.txt").read_bytes()
    with pytest.raises(ValueError, match=r"train\.learning_rate: 0\.02 there, 0\.5 given"):
        run(small(train__learning_rate=0.5), copy)
    assert trained == []
    assert (copy / "report.txt").read_bytes() == before


@pytest.mark.parametrize("folder", ["", pytest.param("standard", marks=pytest.mark.slow)])
def test_starting_from_the_standard_model_of_another_folder(finished, tmp_path, trained, folder):
    source = finished[0] / folder
    files = {path: path.stat().st_mtime_ns for path in finished[0].rglob("*") if path.is_file()}
    config = small(compression__start=str(source), compression__only="falcon_k1")
    rows, _ = run(config, tmp_path / "run")
    assert trained == ["falcon_k1"]
    assert [row["label"] for row in rows] == ["standard", "falcon_k1"]
    assert rows[0] == finished[1][0]
    assert rows[1]["accuracy_before"] == finished[1][1]["accuracy_before"]
    assert rows[1]["accuracy_after"] == finished[1][1]["accuracy_after"]
    now = {path: path.stat().st_mtime_ns for path in finished[0].rglob("*") if path.is_file()}
    assert now == files


def test_starting_from_a_folder_without_result_evaluates_it(copy, finished, tmp_path, trained):
    (copy / "standard" / "result.json").unlink()
    config = small(compression__start=str(copy), compression__variants={})
    rows, _ = run(config, tmp_path / "run")
    assert trained == []
    assert rows[0]["accuracy_after"] == finished[1][0]["accuracy_after"]


@pytest.mark.parametrize("start", ["nowhere", "."])
def test_a_folder_that_holds_no_model_is_told(tmp_path, monkeypatch, start):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoints; give config\.compression"):
        run(small(compression__start=start), tmp_path / "run")


def test_a_model_for_other_images_to_start_from_is_told(finished, tmp_path):
    config = small(compression__start=str(finished[0]), data__source="digits")
    with pytest.raises(ValueError, match="standard"):
        run(config, tmp_path / "run")


def test_from_scratch_there_is_no_standard_row_and_nothing_of_it_is_needed(tmp_path, trained):
    config = small(compression__start="scratch", compression__variants=UNFITTED)
    rows, _ = run(config, tmp_path)
    assert trained == ["unfitted"]
    assert [row["label"] for row in rows] == ["unfitted"]
    assert set(rows[0]) == COLUMNS and rows[0]["params_ratio"] > 1
    assert not (tmp_path / "standard").exists()


@pytest.mark.slow
def test_without_epochs_the_same_call_runs_nothing_again(finished, tmp_path):
    fields = {"train__epochs": 0, "finetune__epochs": 0}
    first, _ = run(small(compression__variants=FALCON, **fields), tmp_path)
    again, _ = run(small(compression__variants=FALCON, **fields), tmp_path)
    assert first == again


def test_fitting_needs_the_trained_kernels_and_random_does_not(finished, tmp_path, monkeypatch):
    models = {}
    compress = rooms.compress

    def recording(model, plan, **options):
        models[plan.solver] = np.asarray(model.stages[0][0].conv.kernel[...])
        return compress(model, plan, **options)

    monkeypatch.setattr(rooms, "compress", recording)
    monkeypatch.setattr(
        rooms, "train", lambda run, network, *arrays: BestModel(arrays=arrays, step=0)
    )
    run(small(compression__start=str(finished[0])), tmp_path)
    assert set(models) == {"exact", "random"}
    assert not np.allclose(models["exact"], models["random"])


def test_a_rule_that_matches_nothing_is_told(finished, tmp_path):
    config = small(compression__start=str(finished[0]), compression__rules=(("stem/conv", None),))
    with pytest.raises(ValueError, match="no convolution matches path='stem/conv'"):
        run(config, tmp_path)


@pytest.mark.slow
def test_fitted_to_training_batches_a_variant_has_the_same_size(finished, tmp_path):
    start = str(finished[0])
    config = small(compression__start=start, finetune__epochs=0, **CALIBRATED)
    config.compression.variants = FALCON
    fitted, kernels = run(config, tmp_path)[0][1], finished[1][1]
    assert (fitted["params"], fitted["rank"]) == (kernels["params"], kernels["rank"])
    assert fitted["accuracy_before"] != kernels["accuracy_before"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    [
        {"method": "spatial_decomposition", "budget": 2.0},
        {"method": "channel_decomposition", "rank": 3, "inner": "falcon"},
        {"method": "falcon", "rank": 1},
    ],
    ids=lambda variant: variant["method"],
)
def test_variants_are_fitted_to_training_batches(finished, tmp_path, variant):
    config = small(compression__start=str(finished[0]), finetune__epochs=0)
    config.compression.variants = {"fitted": variant}
    config.compression.rules = (("stages/0/0/conv", None),)
    rows = []
    for batches in (1, 0):
        config.compression.calibration_batches = batches
        rows.append(run(config, tmp_path / str(batches))[0][1])
    fitted, kernels = rows
    assert (fitted["params"], fitted["rank"]) == (kernels["params"], kernels["rank"])
    assert fitted["accuracy_after"] != kernels["accuracy_after"]


def test_models_are_exported_as_the_config_says(tmp_path):
    onnx = pytest.importorskip("onnx")
    formats = ("onnx", "int8", "safetensors")
    run(small(export=formats, compression__variants=FALCON, finetune__epochs=0), tmp_path)
    for label in ("standard", "falcon_k1"):
        names = {path.name for path in (tmp_path / label).iterdir()}
        assert {"model", "model.onnx", "model.int8.onnx", "model.safetensors"} <= names
        kinds = [n.op_type for n in onnx.load(tmp_path / label / "model.onnx").graph.node]
        assert kinds.count("Conv") == (2 if label == "standard" else 4)
    with pytest.raises(ValueError, match=r"config\.export: there is no 'onx'.*'onnx'"):
        check_config(small(export=("onx",)))


def test_a_plan_is_searched_for_a_target_and_kept_over_an_interruption(
    tmp_path, finished, monkeypatch
):
    config = small(
        compression__start=str(finished[0]),
        compression__calibration_batches=2,
        finetune__distillation__weight=0.5,
    )
    config.compression.variants = {}
    config.compression.target = {"mult_adds": 0.6}
    config.compression.candidates = ("falcon",)
    config.compression.rules = ((r".*/0/0/conv", None),)

    def stop(*_):
        raise Stopped("stopped")

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(rooms, "train", stop)
        run(config, tmp_path)
    text = (tmp_path / "searched/plan.json").read_text()
    monkeypatch.setattr(rooms, "search", stop)
    (standard, searched), _ = run(config, tmp_path)
    assert (tmp_path / "searched/plan.json").read_text() == text
    assert (searched["label"], searched["method"]) == ("searched", "search")
    assert searched["mult_adds"] <= 0.6 * standard["mult_adds"]
    plan = Plan.load(tmp_path / "searched/plan.json")
    assert plan.rows[0].method is None and plan.replaced
    assert {row.method for row in plan.replaced} == {Falcon(rank=1)}
    stored = load_stored(tmp_path / "searched/model")
    assert stored.plan.rows == plan.rows


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (
            {"compression__target": {"mult_adds": 2, "loss": 1}} | CALIBRATED,
            r"compression\.target: .*one of",
        ),
        ({"compression__target": {"size": 0.5}} | CALIBRATED, r"compression\.target: "),
        ({"compression__target": {"params": 0.5}}, "target needs calibration_batches"),
        ({"compression__candidates": ("falcon",)}, "candidates .* give its target"),
        (
            {"compression__target": {"params": 0.5}, "compression__candidates": ("pdp",)}
            | CALIBRATED,
            r"compression\.candidates: .*'pdp'",
        ),
        ({"train__distillation__weight": 0.5}, "the standard model has no teacher"),
        ({"finetune__distillation__weight": 2.0}, r"finetune\.distillation\.weight must be in"),
        (
            {"finetune__distillation__weight": 0.5, "compression__start": "scratch"},
            "no standard model is trained",
        ),
    ],
)
def test_targets_and_teachers_that_cannot_be(fields, told):
    config = small()
    target = fields.pop("compression__target", {})
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    config.compression.target = target
    with pytest.raises(ValueError, match=told):
        check_config(config)
