"""How many epochs of fine-tuning bring a compressed network back to the standard one's accuracy.

    python -m benchmarks.epochs --config=configs/demo.py --workdir=runs/epochs \
        --out=results/epochs_digits [--config.FIELD=VALUE ...]

The standard model is trained once. Every variant of the config starts from it three times, by the
same recipe: fitted to data without labels, fitted to kernels, and from random weights. After every
epoch the accuracy on the validation split is taken; OUT gets the first epoch that reaches the
standard model's best, and one point less (text, CSV, JSON with all epochs, a plot). Before and
after tuning, accuracy is that on the test split.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import train
from falcon_jax.paths import write_whole
from falcon_jax.report.plots import new_figure, plain_axes, png_of
from falcon_jax.report.table import (
    Column,
    describe_machine,
    format_percent,
    format_table,
    write_csv,
    write_json,
)
from falcon_jax.training.config import ExperimentConfig
from falcon_jax.training.experiment import run_experiment

# How kernels come about: batches of training images without labels, and the solver.
STARTS: Mapping[str, Mapping[str, Any]] = {
    "data": {},
    "kernel": {"calibration_batches": 0},
    "random": {"calibration_batches": 0, "batchnorm_batches": 0, "solver": "random"},
}
NEAR = 0.01
COLUMNS = (
    Column(name="variant", header="Variant"),
    Column(name="fit", header="Fit"),
    Column(name="before", header="Before tuning", format=format_percent),
    Column(name="after", header="After tuning", format=format_percent),
    Column(name="first", header="Validation, epoch 1", format=format_percent),
    Column(name="best", header="Best", format=format_percent),
    Column(name="epochs_near", header="Epochs to within 1 point"),
    Column(name="epochs", header="Epochs to the standard's"),
)


def main(arguments: Sequence[str]) -> int:
    """Run what is left of the experiments, and report."""
    parser = argparse.ArgumentParser(description="Count epochs to the standard's accuracy.")
    parser.add_argument("--out", type=pathlib.Path)
    options, rest = parser.parse_known_args(arguments[1:])
    try:
        config, workdir, _ = train.read_flags([arguments[0], *rest])
        reports = {}
        for fit in STARTS:
            print(fit, file=sys.stderr)
            rows, _ = run_experiment(_config(config, fit, workdir), workdir / fit)
            reports[fit] = {row["label"]: row for row in rows}
    except FloatingPointError as error:
        return train.fail(error, train.BAD_NUMBERS)
    except (ValueError, OSError, ImportError) as error:
        return train.fail(error, train.BAD_INPUT)
    standard = accuracies(workdir / "data" / "standard")
    rows = [
        _row(fit, reports[fit][v.name], accuracies(workdir / fit / v.name), max(standard))
        for v in config.compression.chosen
        for fit in STARTS
    ]
    text = (
        f"Standard: {max(standard):.2%}, the best of {len(standard)} epochs.\n\n"
        f"{format_table(rows, COLUMNS)}"
    )
    print(text)
    out = options.out or workdir
    out.mkdir(parents=True, exist_ok=True)
    (out / "epochs.txt").write_text(text + "\n")
    write_csv(out / "epochs.csv", rows, COLUMNS)
    command = " ".join(["python -m benchmarks.epochs", *arguments[1:]])
    content = {"command": command, "machine": describe_machine(), "standard": standard}
    write_json(out / "epochs.json", {**content, "rows": rows})
    write_whole(out / "epochs.png", _plot(rows, max(standard)))
    return 0


def _config(config: ExperimentConfig, fit: str, workdir: pathlib.Path) -> ExperimentConfig:
    """Return the config of one kind of start; the first trains the standard model for all."""
    changes = dict(STARTS[fit])
    if fit != "data":
        changes["start"] = str(workdir / "data")
    return dataclasses.replace(
        config, compression=dataclasses.replace(config.compression, **changes)
    )


def accuracies(folder: pathlib.Path) -> list[float]:
    """Return the accuracy on the validation split after every epoch of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["val_accuracy"] for line in lines if "val_accuracy" in line]


def _row(
    fit: str, reported: Mapping[str, Any], found: list[float], standard: float
) -> dict[str, Any]:
    def first(level: float) -> int | None:
        return next((n for n, share in enumerate(found, start=1) if share >= level), None)

    return {
        "variant": reported["label"],
        "fit": fit,
        "before": reported["accuracy_before"],
        "after": reported["accuracy_after"],
        "first": found[0],
        "best": max(found),
        "epochs_near": first(standard - NEAR),
        "epochs": first(standard),
        "accuracies": found,
    }


def _plot(rows: Sequence[Mapping[str, Any]], standard: float) -> bytes:
    figure = new_figure()
    axes = plain_axes(figure, xlabel="Epochs of fine-tuning", ylabel="Accuracy on validation (%)")
    styles = dict(zip(STARTS, ("-", "--", ":"), strict=True))
    names = list(dict.fromkeys(row["variant"] for row in rows))
    for row in rows:
        shares = [100 * share for share in row["accuracies"]]
        axes.plot(
            range(1, len(shares) + 1),
            shares,
            styles[row["fit"]],
            color=f"C{names.index(row['variant'])}",
            label=f"{row['variant']}, {row['fit']}",
        )
    axes.axhline(100 * standard, color="gray", linewidth=1, label="standard, best")
    axes.legend(fontsize=8)
    return png_of(figure)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
