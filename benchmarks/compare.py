"""Every method of the paper on one network: one recipe, several seeds, one table, the claims.

    python -m benchmarks.compare --config=configs/compare.py:digits --workdir=runs/compare \
        --seeds=2 --out=results/compare_digits

The standard model is trained once; every method starts from it where it can be fitted, from random
weights where it cannot. The same command again goes on where it was interrupted. OUT gets the table
(text, CSV, JSON), the plots (Figures 1 and 4) and the paper's claims with what was measured.
"""

import argparse
import csv
import dataclasses
import json
import math
import pathlib
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import train
from falcon_jax.report.plots import plot_tradeoff
from falcon_jax.report.table import (
    Column,
    describe_machine,
    format_millions,
    format_milliseconds,
    format_table,
    write_csv,
)
from falcon_jax.training.config import ExperimentConfig
from falcon_jax.training.experiment import run_experiment

PAPER = pathlib.Path(__file__).with_name("paper_tables.csv")
PAPER_MODEL = {"vgg19_cifar": "VGG19", "resnet34_cifar": "ResNet34"}
PAPER_DATA = {"cifar100": "CIFAR100", "svhn_cropped": "SVHN"}
PAPER_METHOD = {
    "standard": "StConv",
    "falcon_k1": "FALCON",
    "falcon_k2": "FALCON-k2",
    "falcon_k3": "FALCON-k3",
    "falcon_unfitted": "FALCON without fitting",
    "falcon_branch": "FALCON-branch",
    "gep_in": "GEP-in",
    "dpconv": "DPConv",
    "tucker": "Tucker",
    "cp": "CP",
    "pdp": "PDPConv-0.5",
    "gdg": "GDGConv",
    "pdp_split": "PDPConv-split",
}

# Of each claim: what should be at least as accurate as what.
CLAIMS = (
    ("fitting helps FALCON", "falcon_k1", "falcon_unfitted"),
    ("fitting helps the depthwise-first order (GEP-in against DPConv)", "gep_in", "dpconv"),
    ("pointwise first beats depthwise first, both fitted", "falcon_k1", "gep_in"),
    ("rank 2 at least matches the standard model", "falcon_k2", "standard"),
    ("rank 3 at least matches the standard model", "falcon_k3", "standard"),
    ("FALCON beats Tucker at about equal parameters", "falcon_k1", "tucker_equal"),
    ("FALCON beats CP at about equal parameters", "falcon_k1", "cp_equal"),
)


def _percent(value: float) -> str:
    return f"{100 * value:.2f}%"


COLUMNS = (
    Column(name="label", header="Model"),
    Column(name="params", header="Params", format=format_millions),
    Column(name="mult_adds", header="Mult-adds", format=format_millions),
    Column(name="before", header="Before tuning", format=_percent),
    Column(name="accuracy", header="Accuracy", format=_percent),
    Column(name="spread", header="Spread", format=_percent),
    Column(name="latency_ms", header="Latency", format=format_milliseconds),
    Column(name="paper_accuracy", header="Paper", format=lambda v: f"{v:.2f}%"),
    Column(name="paper_params", header="Params", format=lambda v: f"{v:.2f}M"),
    Column(name="paper_mult_adds", header="Mult-adds", format=lambda v: f"{v:.2f}M"),
)


def main(arguments: Sequence[str]) -> int:
    """Run the comparison, or what is left of it, and report."""
    parser = argparse.ArgumentParser(description="Compare every method of the paper.")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path)
    options, rest = parser.parse_known_args(arguments[1:])
    try:
        if options.seeds < 1:
            raise ValueError(f"--seeds is at least 1; got {options.seeds}")
        config, workdir, _ = train.read_flags([arguments[0], *rest])
        runs = [_run(config, workdir, seed) for seed in range(options.seeds)]
    except FloatingPointError as error:
        return train.fail(error, train.BAD_NUMBERS)
    except (ValueError, OSError, ImportError) as error:
        return train.fail(error, train.BAD_INPUT)
    rows = _summary(runs, config)
    text = "\n".join([format_table(rows, COLUMNS), "", *verdicts(rows)])
    command = " ".join(["python -m benchmarks.compare", *arguments[1:]])
    _write(options.out or workdir, rows, text, command, runs)
    print(text)
    return 0


def _run(config: ExperimentConfig, workdir: pathlib.Path, seed: int) -> list[dict[str, Any]]:
    """Return the rows of one seed; the first trains the standard model for all."""
    changed = dataclasses.replace(config, seed=config.seed + seed)
    if seed:
        start = dataclasses.replace(config.compression, start=str(workdir / "seed_0"))
        changed = dataclasses.replace(changed, compression=start)
    print(f"seed {seed}", file=sys.stderr)
    rows, _ = run_experiment(changed, workdir / f"seed_{seed}")
    return rows


def _summary(
    runs: Sequence[Sequence[Mapping[str, Any]]], config: ExperimentConfig
) -> list[dict[str, Any]]:
    """Return a row a model: mean and standard deviation over the seeds, and the paper's cells."""
    rows = []
    for first in runs[0]:
        label = first["label"]
        same = [next(row for row in run if row["label"] == label) for run in runs]
        if label == "standard":
            same = same[:1]
        accuracies = [row["accuracy_after"] for row in same]
        before = [row["accuracy_before"] for row in same if row["accuracy_before"] is not None]
        rows.append(
            {
                "label": label,
                "method": first["method"],
                "rank": first["rank"],
                "params": first["params"],
                "mult_adds": first["mult_adds"],
                "before": statistics.mean(before) if before else None,
                "accuracy": statistics.mean(accuracies),
                "spread": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
                "seeds": len(accuracies),
                "latency_ms": statistics.median(row["latency_ms"] for row in same),
                **_paper_cells(label, config),
            }
        )
    return rows


def _paper_cells(label: str, config: ExperimentConfig) -> dict[str, float | None]:
    model = PAPER_MODEL.get(config.model.name)
    data = PAPER_DATA.get(config.data.name)
    with PAPER.open(newline="") as file:
        for cell in csv.DictReader(file):
            if (cell["model"], cell["dataset"]) == (model, data) and _is(label, cell["method"]):
                return {
                    "paper_accuracy": float(cell["top1_percent"]),
                    "paper_params": float(cell["params_millions"]),
                    "paper_mult_adds": float(cell["mult_adds_millions"]),
                }
    return {"paper_accuracy": None, "paper_params": None, "paper_mult_adds": None}


def _is(label: str, method: str) -> bool:
    """Say whether a row of the paper is ours; some names end with a width (FALCON-branch 1.75x)."""
    name = PAPER_METHOD.get(label)
    return name is not None and re.fullmatch(rf"{name}( [\d.]+x.*)?", method) is not None


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the paper's claims with what was measured, whichever way they fall.

    A difference within two standard errors of the means is called undecided. The standard model
    has one run; its error is taken to be that of the other model.
    """
    found = {row["label"]: row for row in rows}
    lines = []
    for claim, better, worse in CLAIMS:
        if better not in found or worse not in found:
            continue
        a, b = found[better], found[worse]
        difference = a["accuracy"] - b["accuracy"]
        spreads = [row["spread"] for row in (a, b) if row["spread"] is not None]
        verdict = "holds" if difference >= 0 else "does not hold"
        if not spreads:
            verdict += ", by one run"
        else:
            error = math.sqrt(
                sum(
                    (row["spread"] if row["spread"] is not None else spreads[0]) ** 2 / row["seeds"]
                    for row in (a, b)
                )
            )
            if abs(difference) <= 2 * error:
                verdict = f"undecided (standard error {100 * error:.2f} points)"
        lines.append(
            f"{claim}: {verdict}; {better} {_percent(a['accuracy'])}, "
            f"{worse} {_percent(b['accuracy'])}"
        )
    return lines


def _write(
    out: pathlib.Path,
    rows: Sequence[Mapping[str, Any]],
    text: str,
    command: str,
    runs: Sequence[Sequence[Mapping[str, Any]]],
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "comparison.txt").write_text(text + "\n")
    write_csv(out / "comparison.csv", rows, COLUMNS)
    report = {
        "command": command,
        "machine": describe_machine(),
        "rows": rows,
        "verdicts": verdicts(rows),
        "accuracies": [{row["label"]: row["accuracy_after"] for row in run} for run in runs],
    }
    (out / "comparison.json").write_text(json.dumps(report, indent=1) + "\n")
    for x, label in (("params", "Parameters"), ("mult_adds", "Mult-adds")):
        path = out / f"accuracy_vs_{x}.png"
        plot_tradeoff(rows, x=x, x_label=f"{label} (millions)", path=path)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
