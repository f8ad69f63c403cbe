"""How many epochs of fine-tuning bring a compressed network back to the standard one's accuracy.

    python -m benchmarks.epochs --config=configs/demo.py --workdir=runs/epochs \
        --out=results/epochs_digits [--rates 0.01 0.003 0.001] [--config.FIELD=VALUE ...]

The standard model is trained once. Every variant of the config starts from it three times: fitted
to data without labels, fitted to kernels, and from random weights; each is tuned at every learning
rate. After every epoch the accuracy on the validation split is taken; OUT gets the first epoch that
reaches the standard model's best, and one point less (text, CSV, JSON with all epochs, a plot of
the rates that get there first). Epoch 0 is before tuning. Before and after tuning, accuracy is that
on the test split; epoch 0 is compared there.
"""

import argparse
import dataclasses
import itertools
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
    Column(name="rate", header="Rate", format="{:g}".format),
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
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01])
    options, rest = parser.parse_known_args(arguments[1:])
    try:
        config, workdir, _ = train.read_flags([arguments[0], *rest])
        rows, standard = _all(config, workdir, options.rates)
    except FloatingPointError as error:
        return train.fail(error, train.BAD_NUMBERS)
    except (ValueError, OSError, ImportError) as error:
        return train.fail(error, train.BAD_INPUT)
    text = (
        f"Standard: {max(standard):.2%} on validation, the best of {len(standard)} epochs.\n\n"
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


def _all(
    config: ExperimentConfig, workdir: pathlib.Path, rates: Sequence[float]
) -> tuple[list[dict[str, Any]], list[float]]:
    """Return a row of every run, and the standard model's accuracies."""
    first = workdir / f"data_{rates[0]:g}"
    found = []
    for fit, rate in itertools.product(STARTS, rates):
        folder = workdir / f"{fit}_{rate:g}"
        print(folder.name, file=sys.stderr)
        changes = dict(STARTS[fit])
        if folder != first:
            changes["start"] = str(first)
        compression = dataclasses.replace(config.compression, **changes)
        finetune = dataclasses.replace(config.finetune, learning_rate=rate)
        changed = dataclasses.replace(config, compression=compression, finetune=finetune)
        reported, _ = run_experiment(changed, folder)
        found.append((fit, rate, folder, {row["label"]: row for row in reported}))
    standard = accuracies(first / "standard")
    tested = found[0][3]["standard"]["accuracy_after"]
    rows = [
        {"fit": fit, "rate": rate}
        | _row(rows[v.name], accuracies(folder / v.name), max(standard), tested)
        for v in config.compression.chosen
        for fit, rate, folder, rows in found
    ]
    return rows, standard


def accuracies(folder: pathlib.Path) -> list[float]:
    """Return the accuracy on the validation split after every epoch of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["val_accuracy"] for line in lines if "val_accuracy" in line]


def _row(
    reported: Mapping[str, Any], found: list[float], standard: float, tested: float
) -> dict[str, Any]:
    before = reported["accuracy_before"]

    def first(less: float) -> int | None:
        if before >= tested - less:
            return 0
        return next((n for n, share in enumerate(found, 1) if share >= standard - less), None)

    return {
        "variant": reported["label"],
        "before": before,
        "after": reported["accuracy_after"],
        "first": found[0],
        "best": max(found),
        "epochs_near": first(NEAR),
        "epochs": first(0.0),
        "accuracies": found,
    }


def _plot(rows: Sequence[Mapping[str, Any]], standard: float) -> bytes:
    figure = new_figure()
    axes = plain_axes(figure, xlabel="Epochs of fine-tuning", ylabel="Accuracy on validation (%)")
    styles = dict(zip(STARTS, ("-", "--", ":"), strict=True))
    names = list(dict.fromkeys(row["variant"] for row in rows))
    late = len(rows[0]["accuracies"]) + 1
    for name, fit in itertools.product(names, STARTS):
        same = [row for row in rows if (row["variant"], row["fit"]) == (name, fit)]
        row = min(same, key=lambda r: (late if r["epochs"] is None else r["epochs"], -r["best"]))
        shares = [100 * share for share in row["accuracies"]]
        axes.plot(
            range(1, len(shares) + 1),
            shares,
            styles[fit],
            color=f"C{names.index(name)}",
            label=f"{name}, {fit}, {row['rate']:g}",
        )
    axes.axhline(100 * standard, color="gray", linewidth=1, label="standard, best")
    axes.legend(fontsize=8)
    return png_of(figure)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
