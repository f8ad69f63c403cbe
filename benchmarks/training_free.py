r"""Accuracy without any training after compression: every method, at several sizes.

    python -m benchmarks.training_free --network=digits --config=configs/demo.py \
        --workdir=runs/training_free --out=results/training_free_digits
    python -m benchmarks.training_free --network=recognizer --out=results/training_free_recognizer
    python -m benchmarks.training_free --network=detector --methods=FALCON --settings="rank 1"

``digits``: the standard model of the config is trained (or taken from the workdir), and its
BatchNorm folded into the convolutions. ``recognizer`` and ``detector`` are trained networks that
read text (`benchmarks.training_free_ocr`). Each is compressed by each method, fitted to kernels
alone and to data. OUT gets one table (text, CSV, JSON) and two plots.
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from flax import nnx

import falcon_jax as fj
import train
from benchmarks.training_free_ocr import METHODS, SIZES, STUDIES
from benchmarks.training_free_ocr import measured as on_text
from falcon_jax.report.plots import plot_tradeoff
from falcon_jax.report.table import (
    Column,
    describe_machine,
    format_millions,
    format_percent,
    format_ratio,
    format_table,
    write_csv,
)
from falcon_jax.training.experiment import Workspace, begin, trained_model
from falcon_jax.training.network import Network

COLUMNS = (
    Column(name="method", header="Method"),
    Column(name="setting", header="Setting"),
    Column(name="fit", header="Fit"),
    Column(name="params", header="Params", format=format_millions),
    Column(name="mult_adds", header="Mult-adds", format=format_millions),
    Column(name="accuracy", header="Accuracy", format=format_percent),
)
OCR_COLUMNS = (
    *COLUMNS[:3],
    Column(name="images", header="Images"),
    Column(name="params", header="Params", format=format_millions),
    Column(name="mult_adds", header="Mult-adds", format=format_millions),
    Column(name="fewer_mult_adds", header="Fewer", format=format_ratio),
    Column(name="accuracy", header="Accuracy", format=format_percent),
    Column(name="held_out", header="Other fonts", format=format_percent),
    Column(name="seconds", header="Seconds", format=lambda s: "" if s is None else f"{s:.0f}"),
    Column(name="peak_mb", header="Peak MiB", format=lambda size: f"{size:.0f}"),
)

RATIOS = (1.25, 1.5, 2.0, 3.0, 5.0)
TERMS = (1, 2, 3, 4, 6)


def _budgets(method: Callable[..., fj.Method], **options: Any) -> tuple[tuple[str, fj.Method], ...]:
    return tuple((f"ratio {ratio:g}", method(rank=fj.Budget(ratio), **options)) for ratio in RATIOS)


def _terms(order: Any) -> tuple[tuple[str, fj.Method], ...]:
    return tuple((f"{t} terms", fj.Decoupled(order=order, terms=t)) for t in TERMS)


FALCON = tuple((f"rank {rank}", fj.Falcon(rank=rank)) for rank in TERMS)
SPATIAL, CHANNELS = fj.SpatialDecomposition, fj.ChannelDecomposition

# By name: settings on the network with BatchNorm folded.
FOLDED: Mapping[str, tuple[tuple[str, fj.Method], ...]] = {
    "ND, pw-dw": _terms("pw-dw"),
    "ND, dw-pw": _terms("dw-pw"),
    "SD": _budgets(SPATIAL),
    "CD": _budgets(CHANNELS),
    "SD+ND": _budgets(SPATIAL, inner=fj.Decoupled(terms=2)),
    "CD+ND": _budgets(CHANNELS, inner=fj.Decoupled(terms=4)),
    "Tucker": _budgets(fj.Tucker),
    "CP": _budgets(fj.CP),
    "FSNet": tuple(
        (f"ratio {ratio:g}", fj.FilterSummary(ratio=ratio, reorder=True)) for ratio in RATIOS
    ),
}


def main(arguments: Sequence[str]) -> int:
    """Train or load the standard model, compress it in every way, and report."""
    parser = argparse.ArgumentParser(
        description="Accuracy without training after compression.", allow_abbrev=False
    )
    parser.add_argument("--network", choices=("digits", *STUDIES), default="digits")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--methods", default=",".join(METHODS), help="names, with commas")
    parser.add_argument("--settings", default="", help="such as 'rank 1,rank 2'; all if empty")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="calibration images")
    parser.add_argument("--tests", type=int, help="images of each score")
    options, rest = parser.parse_known_args(arguments[1:])
    command = " ".join(["python -m benchmarks.training_free", *arguments[1:]])
    if options.network != "digits":
        if rest:
            parser.error(f"{rest[0]} is for --network=digits")
        return _read_text(parser, options, command)
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
    _write(options.out or workdir, rows, COLUMNS, command)
    print(format_table(rows, COLUMNS))
    return 0


def _read_text(parser: argparse.ArgumentParser, options: argparse.Namespace, command: str) -> int:
    """Report on a network that reads text."""
    study = STUDIES[options.network]
    names, settings = (
        [name.strip() for name in given.split(",") if name.strip()]
        for given in (options.methods, options.settings)
    )
    for name in names:
        if name not in METHODS:
            parser.error(f"--methods are of {', '.join(METHODS)}; got {name!r}")
    try:
        sizes = [int(size) for size in options.sizes.split(",")]
    except ValueError:
        parser.error(f"--sizes are whole numbers with commas; got {options.sizes!r}")
    tests = options.tests or study.tests
    out = options.out or pathlib.Path("results") / f"training_free_{options.network}"
    rows: list[dict[str, Any]] = []
    try:
        for row in on_text(study, methods=names, settings=settings, sizes=sizes, tests=tests):
            rows.append(row)
            print(format_table(rows[-1:], OCR_COLUMNS), flush=True)
            _write(out, rows, OCR_COLUMNS, command)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return train.BAD_INPUT
    print(format_table(rows, OCR_COLUMNS))
    return 0


def measured(workspace: Workspace) -> Iterator[dict[str, Any]]:
    """Yield a row for the standard model and for every method and setting."""
    model = trained_model(workspace)
    model.eval()
    sample = workspace.sample(1)
    config = workspace.config
    batches = list(workspace.inputs(config.finetune, config.compression.calibration_batches))
    stays = _rules_of(workspace)
    yield _row(workspace, "standard", "", "", model)
    folded = fj.fold_batchnorm(model, sample)
    for name, methods in {"FALCON": FALCON, **FOLDED}.items():
        for label, method in methods:
            plan = fj.make_plan(folded, [*stays, fj.Rule(method=method)], sample)
            small = fj.compress(folded, plan)
            yield _row(workspace, name, label, "kernel", small)
            yield _row(workspace, name, label, "data", fj.calibrate(folded, small, plan, batches))


def _rules_of(workspace: Workspace) -> list[fj.Rule]:
    return [
        fj.Rule(path=path, method=None)
        for path, other in workspace.config.compression.rules
        if other is None
    ]


def _row(
    workspace: Workspace, method: str, label: str, fit: str, model: nnx.Module
) -> dict[str, Any]:
    network, params, statistics = Network.split(model)
    cost = fj.profile(model, workspace.sample(1))
    recipe = workspace.config.finetune
    return {
        "method": method,
        "setting": label,
        "fit": fit,
        "params": cost.params,
        "mult_adds": cost.mult_adds,
        "accuracy": workspace.test_accuracy(network, params, statistics, recipe),
    }


def _write(
    out: pathlib.Path,
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[Column],
    command: str,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.txt").write_text(format_table(rows, columns) + "\n")
    write_csv(out / "table.csv", rows, columns)
    report = {"command": command, "machine": describe_machine(), "rows": rows}
    (out / "table.json").write_text(json.dumps(report, indent=1) + "\n")
    points = _points(rows)
    for x, label in (("params", "Parameters"), ("mult_adds", "Mult-adds")):
        path = out / f"accuracy_vs_{x}.png"
        plot_tradeoff(points, x=x, x_label=f"{label} (millions)", path=path)


def _points(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the points of the plots; the smallest model of each method and fit carries a name."""
    points = []
    for row in rows:
        if row.get("images") and row["images"] != _most_common(rows):
            continue
        name = ", ".join(filter(None, (row["method"], row["fit"])))
        alike = [r for r in rows if (r["method"], r["fit"]) == (row["method"], row["fit"])]
        label = name if row["params"] == min(r["params"] for r in alike) else ""
        points.append({**row, "method": name, "label": label, "rank": row["params"]})
    return points


def _most_common(rows: Sequence[Mapping[str, Any]]) -> int:
    counts = collections.Counter(row["images"] for row in rows if row["images"])
    return counts.most_common(1)[0][0]


if __name__ == "__main__":
    sys.exit(main(sys.argv))
