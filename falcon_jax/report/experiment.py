"""The report of a compression experiment: one table, its files and two plots."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from falcon_jax.report.formats import (
    format_millions,
    format_milliseconds,
    format_percent,
    format_ratio,
)
from falcon_jax.report.plots import plot_tradeoff
from falcon_jax.report.table import Column, Row, format_table, write_csv, write_json
from falcon_jax.report.writing import write_whole

COLUMNS = (
    Column(name="label", header="Model"),
    Column(name="method", header="Method"),
    Column(name="rank", header="Rank"),
    Column(name="params", header="Params", format=format_millions),
    Column(name="mult_adds", header="Mult-adds", format=format_millions),
    Column(name="params_ratio", header="Fewer params", format=format_ratio),
    Column(name="mult_adds_ratio", header="Fewer mult-adds", format=format_ratio),
    Column(name="accuracy_before", header="Before tuning", format=format_percent),
    Column(name="accuracy_after", header="After tuning", format=format_percent),
    Column(name="latency_ms", header="Latency", format=format_milliseconds),
)


def write_report(rows: Sequence[Row], directory: str | os.PathLike[str]) -> str:
    """Writes the table of an experiment as text, CSV and JSON, and its two plots.

    The files are report.txt, report.csv, report.json, accuracy_vs_params.png and
    accuracy_vs_mult_adds.png. The plots show the accuracy after fine-tuning, or before where a
    model was not fine-tuned.

    Args:
        rows: one mapping a model: "label", "method", "rank" (or None), "params", "mult_adds",
            "params_ratio", "mult_adds_ratio", "accuracy_before", "accuracy_after" (fractions),
            "latency_ms". A value that was not measured is None.
        directory: where the files go; made if missing.

    Returns:
        the table as text.

    Raises:
        ValueError: if no row has an accuracy, or a number is not finite.
        OSError: if a file cannot be written.
    """
    directory = Path(directory)
    text = format_table(rows, COLUMNS)
    write_whole(directory / "report.txt", (text + "\n").encode())
    write_csv(directory / "report.csv", rows, COLUMNS)
    write_json(
        directory / "report.json",
        [{column.name: row.get(column.name) for column in COLUMNS} for row in rows],
    )
    points = [{**row, "accuracy": _last_accuracy(row)} for row in rows]
    points = [point for point in points if point["accuracy"] is not None]
    plot_tradeoff(
        points,
        x="params",
        x_label="Parameters (millions)",
        path=directory / "accuracy_vs_params.png",
    )
    plot_tradeoff(
        points,
        x="mult_adds",
        x_label="Mult-adds (millions)",
        path=directory / "accuracy_vs_mult_adds.png",
    )
    return text


def _last_accuracy(row: Row) -> float | None:
    after = row.get("accuracy_after")
    return row.get("accuracy_before") if after is None else after
