"""The report of a compression experiment: one table, its files and two plots."""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from falcon_jax.paths import read_json, user_path, write_whole
from falcon_jax.report.plots import plot_tradeoff
from falcon_jax.report.table import (
    Column,
    Row,
    format_millions,
    format_milliseconds,
    format_percent,
    format_ratio,
    table_of,
    write_csv,
    write_json,
)
from falcon_jax.settings import is_number, is_whole
from falcon_jax.terminal import Printable, Table
from falcon_jax.wording import shown

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
# If there are any: a column of the files, a line each under the text.
NOTE = Column(name="note", header="Note")
_COUNTS = ("params", "mult_adds")
_SHARES = ("accuracy_before", "accuracy_after")


def write_report(rows: Sequence[Row], directory: str | os.PathLike[str]) -> str:
    """Write the table of an experiment as text, CSV and JSON, and its two plots.

    The files are report.txt, report.csv, report.json, accuracy_vs_params.png and
    accuracy_vs_mult_adds.png. The plots show the accuracy after fine-tuning, or before where a
    model was not fine-tuned.

    Args:
        rows: one mapping a model: "label", "method", "rank" (or None), "params", "mult_adds",
            "params_ratio", "mult_adds_ratio", "accuracy_before", "accuracy_after" (fractions),
            "latency_ms"; "note", if its numbers are not those of the best checkpoint. A value that
            was not measured is None.
        directory: where the files go; made if missing.

    Returns:
        the table as text.

    Raises:
        ValueError: if no row has an accuracy, or a number is not finite.
        OSError: if a file cannot be written.
    """
    directory, text = user_path(directory), str(Report(rows=rows))
    columns = (*COLUMNS, NOTE) if any(row.get("note") for row in rows) else COLUMNS
    write_whole(directory / "report.txt", (text + "\n").encode())
    write_csv(directory / "report.csv", rows, columns)
    write_json(
        directory / "report.json",
        [{column.name: row.get(column.name) for column in columns} for row in rows],
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report(Printable):
    """The table of an experiment.

    Attributes:
        rows: as `write_report` takes them.
    """

    rows: Sequence[Row]

    def parts(self) -> list[Table | str]:
        """Return the table and the notes on its rows."""
        notes = [f"{row['label']}: {row['note']}." for row in self.rows if row.get("note")]
        return [table_of(self.rows, COLUMNS), *[""][: len(notes)], *notes]


def checked_row(path: Path) -> dict[str, Any]:
    """Return the row of a report that a ``result.json`` holds.

    Raises:
        ValueError: if it holds none, naming it and what is wrong.
        OSError: if it cannot be read.
    """
    row = read_json(path)
    wrong = None
    if not isinstance(row, dict):
        wrong = "not a group of names and values"
    else:
        checks = [
            *((name, isinstance(row.get(name), str)) for name in ("label", "method")),
            *((name, is_whole(row.get(name)) and row[name] > 0) for name in _COUNTS),
            *((name, _absent_or(row, name, 1)) for name in _SHARES),
            ("latency_ms", _absent_or(row, "latency_ms", math.inf)),
            ("rank", isinstance(row.get("rank"), str | int | None)),
            ("note", isinstance(row.get("note"), str | None)),
        ]
        wrong = next(
            (f"{name} is {shown(repr(row.get(name)), 60)}" for name, ok in checks if not ok), None
        )
    if wrong is not None:
        raise ValueError(
            f"{path} is no row of a report ({wrong}); delete it, and the same command makes it anew"
        )
    return row


def _absent_or(row: Row, name: str, most: int | float) -> bool:
    value = row.get(name)
    return value is None or (is_number(value) and 0 <= value <= most)


def _last_accuracy(row: Row) -> float | None:
    after = row.get("accuracy_after")
    return row.get("accuracy_before") if after is None else after
