"""Accuracy without any training after compression: every method, at several sizes.

    python -m benchmarks.training_free --config=configs/demo.py --workdir=runs/training_free \
        --out=results/training_free_digits

The standard model of the config is trained (or taken from the workdir), its BatchNorm folded into
the convolutions, and then compressed by each method. FALCON alone keeps BatchNorm and estimates its
statistics anew. OUT gets one table (text, CSV, JSON) and two plots.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from flax import nnx

import falcon_jax as fj
import train
from falcon_jax.report.machine import describe_machine
from falcon_jax.report.plots import plot_tradeoff
from falcon_jax.report.table import Column, format_millions, format_percent, format_table, write_csv
from falcon_jax.training.experiment import Workspace, begin, trained_model
from falcon_jax.training.network import Network

COLUMNS = (
    Column(name="method", header="Method"),
    Column(name="setting", header="Setting"),
    Column(name="params", header="Params", format=format_millions),
    Column(name="mult_adds", header="Mult-adds", format=format_millions),
    Column(name="accuracy", header="Accuracy", format=format_percent),
)

RATIOS = (1.25, 1.5, 2.0, 3.0, 5.0)
TERMS = (1, 2, 3, 4, 6)


def _budgets(method: Callable[..., fj.Method], **options: Any) -> tuple[tuple[str, fj.Method], ...]:
    return tuple((f"ratio {ratio:g}", method(rank=fj.Budget(ratio), **options)) for ratio in RATIOS)


def _terms(order: Any) -> tuple[tuple[str, fj.Method], ...]:
    return tuple((f"{t} terms", fj.Decoupled(order=order, terms=t)) for t in TERMS)


SPATIAL, CHANNELS = fj.SpatialDecomposition, fj.ChannelDecomposition

# By name: settings on the network with BatchNorm folded.
FOLDED: Mapping[str, tuple[tuple[str, fj.Method], ...]] = {
    "ND, pw-dw": _terms("pw-dw"),
    "ND, dw-pw": _terms("dw-pw"),
    "SD": _budgets(SPATIAL),
    "CD, kernels": _budgets(CHANNELS),
    "CD": _budgets(CHANNELS, relu=True),
    "SD+ND": _budgets(SPATIAL, inner=fj.Decoupled(terms=2)),
    "CD+ND": _budgets(CHANNELS, relu=True, inner=fj.Decoupled(terms=4)),
    "Tucker": _budgets(fj.Tucker),
    "CP": _budgets(fj.CP),
    "FSNet": tuple(
        (f"ratio {ratio:g}", fj.FilterSummary(ratio=ratio, reorder=True)) for ratio in RATIOS
    ),
}
# Fitted to responses, not only to kernels.
CALIBRATED = ("CD", "CD+ND")


def main(arguments: Sequence[str]) -> int:
    """Train or load the standard model, compress it in every way, and report."""
    parser = argparse.ArgumentParser(description="Accuracy without training after compression.")
    parser.add_argument("--out", type=pathlib.Path)
    options, rest = parser.parse_known_args(arguments[1:])
    try:
        config, workdir, _ = train.read_flags([arguments[0], *rest])
        nothing = dataclasses.replace(config.compression, variants={})
        alone = dataclasses.replace(config, compression=nothing)
        with begin(alone, workdir) as workspace:
            rows = list(measured(workspace))
    except FloatingPointError as error:
        return train.fail(error, train.BAD_NUMBERS)
    except (ValueError, OSError, ImportError) as error:
        return train.fail(error, train.BAD_INPUT)
    command = " ".join(["python -m benchmarks.training_free", *arguments[1:]])
    _write(options.out or workdir, rows, command)
    print(format_table(rows, COLUMNS))
    return 0


def measured(workspace: Workspace) -> Iterator[dict[str, Any]]:
    """Yield a row for the standard model and for every method and workspace."""
    model = trained_model(workspace)
    model.eval()
    sample = workspace.sample(1)
    config = workspace.config
    batches = list(workspace.inputs(config.finetune, config.compression.calibration_batches))
    stays = _rules_of(workspace)
    yield _row(workspace, "standard", "", model)
    for rank in TERMS:
        plan = fj.make_plan(model, [*stays, fj.Rule(method=fj.Falcon(rank=rank))], sample)
        small = fj.reestimate_batchnorm(fj.compress(model, plan), batches)
        yield _row(workspace, "FALCON", f"rank {rank}", small)
    folded = fj.fold_batchnorm(model, sample)
    for name, methods in FOLDED.items():
        for label, method in methods:
            plan = fj.make_plan(folded, [*stays, fj.Rule(method=method)], sample)
            small = fj.compress(folded, plan)
            if name in CALIBRATED:
                small = fj.calibrate(folded, small, plan, batches)
            yield _row(workspace, name, label, small)


def _rules_of(workspace: Workspace) -> list[fj.Rule]:
    return [
        fj.Rule(path=path, method=None)
        for path, other in workspace.config.compression.rules
        if other is None
    ]


def _row(workspace: Workspace, method: str, label: str, model: nnx.Module) -> dict[str, Any]:
    network, params, statistics = Network.split(model)
    cost = fj.profile(model, workspace.sample(1))
    recipe = workspace.config.finetune
    return {
        "method": method,
        "setting": label,
        "params": cost.params,
        "mult_adds": cost.mult_adds,
        "accuracy": workspace.test_accuracy(network, params, statistics, recipe),
    }


def _write(out: pathlib.Path, rows: Sequence[Mapping[str, Any]], command: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.txt").write_text(format_table(rows, COLUMNS) + "\n")
    write_csv(out / "table.csv", rows, COLUMNS)
    report = {"command": command, "machine": describe_machine(), "rows": rows}
    (out / "table.json").write_text(json.dumps(report, indent=1) + "\n")
    points = _points(rows)
    for x, label in (("params", "Parameters"), ("mult_adds", "Mult-adds")):
        path = out / f"accuracy_vs_{x}.png"
        plot_tradeoff(points, x=x, x_label=f"{label} (millions)", path=path)


def _points(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the points of the plots; the smallest model of each method carries its name."""
    points = []
    for row in rows:
        least = min(other["params"] for other in rows if other["method"] == row["method"])
        name = row["method"] if row["params"] == least else ""
        points.append({**row, "label": name, "rank": row["params"]})
    return points


if __name__ == "__main__":
    sys.exit(main(sys.argv))
