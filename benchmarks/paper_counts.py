"""Parameters and mult-adds of the paper's Tables 4 and 5: ours, the paper's, the difference.

    python -m benchmarks.paper_counts [--out=results/paper_counts.json]

Every cell but those of Tucker and CP, whose ranks come from the authors' trained weights. Counted
on our models as shapes, so nothing is computed; under the paper's conventions (`Profile`). The
paper's figures are in paper_tables.csv beside this file. Ends with an error if a cell is off and no
reason is written down here, or a reason stands for a cell that is not off.
"""

import argparse
import csv
import dataclasses
import functools
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

import falcon_jax as fj
from falcon_jax.models import (
    branch_unit,
    gdg_unit,
    method_unit,
    model_shapes,
    pdp_split_unit,
    pdp_unit,
    standard_unit,
)
from falcon_jax.report.table import Column, format_table, write_json

TABLES = pathlib.Path(__file__).with_name("paper_tables.csv")
BUILDERS = MappingProxyType(
    {
        "VGG19": "vgg19_cifar",
        "ResNet34": "resnet34_cifar",
        "VGG16_BN": "vgg16_bn",
        "ResNet18": "resnet18",
    }
)
CLASSES = MappingProxyType({"CIFAR100": 100, "SVHN": 10, "ImageNet": 1000})
BY_TRAINED_WEIGHTS = ("Tucker", "CP")
RANK_ONE = ("FALCON", "FALCON without fitting")  # as large as FALCON-k1
EQUAL, EXPLAINED = "equal", "off for a reason"

# (model, method, column) of cells that are off, and why.
REASONS: Mapping[tuple[str, str, str], str] = MappingProxyType(
    {
        ("VGG16_BN", "StConv", "mult_adds"): (
            "The paper prints 1.00M more. By hand: 15346.63M in the convolutions, 13.55M for their "
            "biases, 123.64M in the fully connected layers, together 15483.82M; the other cells of "
            "this model (FALCON, GEP-in, DPConv, ...) agree with ours. A digit misprinted."
        ),
        ("VGG16_BN", "PDPConv-0.5", "mult_adds"): (
            "The paper prints 0.02M less. Mult-adds of this model's convolutions come in multiples "
            "of 50,176 = 14 x 14 x 256, so that no other choice of convolutions or biases explains "
            "it; the parameters agree, and so do both figures of this unit in the other models."
        ),
    }
)

COLUMNS = (
    Column(name="table", header="Table"),
    Column(name="model", header="Model"),
    Column(name="dataset", header="Dataset"),
    Column(name="method", header="Method"),
    Column(name="column", header="Column"),
    Column(name="ours", header="Ours, M"),
    Column(name="paper", header="Paper, M"),
    Column(name="difference", header="Difference"),
    Column(name="verdict", header=""),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaperRow:
    """One line of a table of the paper, figures as printed.

    Attributes:
        table: 4 or 5.
        model: VGG19, ResNet34, VGG16_BN or ResNet18.
        dataset: CIFAR100, SVHN or ImageNet.
        method: as the paper calls it.
        params: in millions.
        mult_adds: in millions.
    """

    table: int
    model: str
    dataset: str
    method: str
    params: str
    mult_adds: str


def paper_rows(path: pathlib.Path = TABLES) -> list[PaperRow]:
    """Return the lines of Tables 4 and 5 that can be counted."""
    with path.open(newline="") as file:
        return [
            PaperRow(
                table=int(line["table"]),
                model=line["model"],
                dataset=line["dataset"],
                method=line["method"],
                params=line["params_millions"],
                mult_adds=line["mult_adds_millions"],
            )
            for line in csv.DictReader(file)
            if line["method"] not in BY_TRAINED_WEIGHTS
        ]


def model_options(model: str, method: str) -> dict[str, Any]:
    """Return the options of our model builder for a method of the paper.

    Args:
        model: as in `PaperRow`.
        method: as in `PaperRow`, with its width multiplier, rank, expansion and groups.

    Raises:
        ValueError: if there is no such method.
    """
    vgg = model.startswith("VGG")
    # The first convolution of VGG: FALCON and GEP-in replace it, the others do not.
    standard_stem: dict[str, Any] = {"stem_unit": standard_unit} if vgg else {}
    name = re.sub(r"[ -]([\d.]+x?( \(g=\d+\))?|k\d)$", "", method)
    width = float(_number(r" ([\d.]+)x", method) or 1)
    if name == "StConv":
        return {}
    if name == "FALCON" or method in RANK_ONE:
        return {"unit": method_unit(fj.Falcon(rank=int(_number(r"-k(\d)", method) or 1)))}
    if name == "GEP-in":
        return {"unit": method_unit(fj.DepthwiseSeparable())}
    if name == "DPConv":
        return {"unit": method_unit(fj.DepthwiseSeparable()), **standard_stem}
    if name == "FALCON-branch":
        return {"unit": branch_unit(fj.Falcon()), "width": width, **standard_stem}
    if name == "PDPConv":
        return {"unit": pdp_unit(float(_number(r"-([\d.]+)", method) or 1)), **standard_stem}
    if name == "PDPConv-split":
        return {"unit": pdp_split_unit, "width": width, **standard_stem}
    if name == "GDGConv":
        options = {"unit": gdg_unit(int(_number(r"g=(\d+)", method) or 1)), "width": width}
        # The paper leaves the shortcuts out for GDGConv; its figures for ResNet34 contain them.
        return {**options, **standard_stem, **({"shortcut": False} if model == "ResNet18" else {})}
    raise ValueError(f"the paper's tables have no method {method!r} that can be counted.")


@functools.cache
def our_counts(model: str, dataset: str, method: str) -> tuple[int, int]:
    """Return parameters and mult-adds of our model under the paper's conventions.

    Args:
        model: as in `PaperRow`.
        dataset: as in `PaperRow`.
        method: as in `PaperRow`.
    """
    options = model_options(model, method)
    side = 224 if dataset == "ImageNet" else 32
    shapes = model_shapes(BUILDERS[model], num_classes=CLASSES[dataset], **options)
    return fj.profile(shapes, jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)).as_paper_counts


def compare(rows: Sequence[PaperRow]) -> list[dict[str, Any]]:
    """Compare every cell.

    Args:
        rows: lines of the paper's tables.

    Returns:
        One row a cell: ours and the paper's in millions, as text with two decimals, the difference,
        and a verdict: ``EQUAL``, ``EXPLAINED`` or what is wrong.
    """
    cells = []
    for row in rows:
        method = "FALCON-k1" if row.method in RANK_ONE else row.method
        counts = our_counts(row.model, row.dataset, method)
        for column, count in zip(("params", "mult_adds"), counts, strict=True):
            paper = getattr(row, column)
            ours = f"{count / 1e6:.2f}"
            reason = REASONS.get((row.model, row.method, column))
            cells.append(
                {
                    "table": row.table,
                    "model": row.model,
                    "dataset": row.dataset,
                    "method": row.method,
                    "column": column,
                    "ours": ours,
                    "ours_exact": count,
                    "paper": paper,
                    "difference": f"{float(ours) - float(paper):+.2f}",
                    "verdict": _verdict(ours == paper, reason),
                    "reason": reason if ours != paper else None,
                }
            )
    return cells


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args(arguments)
    cells = compare(paper_rows())
    print(format_table(cells, COLUMNS))
    explained = [cell for cell in cells if cell["verdict"] == EXPLAINED]
    equal = sum(cell["verdict"] == EQUAL for cell in cells)
    failed = len(cells) - equal - len(explained)
    print(f"{len(cells)} cells: {equal} equal, {len(explained)} {EXPLAINED}, {failed} failed")
    for cell in {cell["reason"]: cell for cell in explained}.values():
        print(f"{cell['model']}, {cell['method']}, {cell['column']}: {cell['reason']}")
    if options.out is not None:
        write_json(options.out, {"cells": cells, "equal": equal, "off": len(cells) - equal})
    return 1 if failed else 0


def _number(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match[1] if match else None


def _verdict(equal: bool, reason: str | None) -> str:
    if equal:
        return EQUAL if reason is None else "REASON WITHOUT NEED"
    return "OFF" if reason is None else EXPLAINED


if __name__ == "__main__":
    sys.exit(main())
