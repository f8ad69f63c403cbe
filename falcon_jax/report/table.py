"""Tables of rows as text, Markdown, CSV and JSON, numbers as people read them, and the machine."""

import csv
import dataclasses
import io
import json
import numbers
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsFloat

import jax
import numpy as np

from falcon_jax.paths import write_whole
from falcon_jax.terminal import Table


def format_millions(value: SupportsFloat) -> str:
    """A count in millions, two decimals, or three digits below 0.1M.

    >>> format_millions(2_610_000), format_millions(4_210)
    ('2.61M', '0.00421M')

    Args:
        value: the count, in units.

    Returns:
        the text.
    """
    millions = float(value) / 1e6
    return f"{millions:.2f}M" if abs(millions) >= 0.1 or millions == 0 else f"{millions:.3g}M"


def format_ratio(value: SupportsFloat) -> str:
    """A ratio with one decimal.

    >>> format_ratio(7.8)
    '7.8x'

    Args:
        value: the ratio.

    Returns:
        the text.
    """
    return f"{float(value):.1f}x"


def format_percent(value: SupportsFloat) -> str:
    """A fraction as a percentage with two decimals.

    >>> format_percent(0.975)
    '97.50%'

    Args:
        value: the fraction.

    Returns:
        the text.
    """
    return f"{float(value):.2%}"


def format_milliseconds(value: SupportsFloat) -> str:
    """A time in milliseconds with two decimals.

    >>> format_milliseconds(3.14159)
    '3.14 ms'

    Args:
        value: the time, milliseconds.

    Returns:
        the text.
    """
    return f"{float(value):.2f} ms"


Row = Mapping[str, Any]

_MISSING = "-"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a table.

    Args:
        name: key of the value in a row, and the column's name in CSV.
        header: what stands above the column in text.
        format: from a value to its text; a value that is absent or None is shown as "-".
    """

    name: str
    header: str
    format: Callable[[Any], str] = str


def format_table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Aligned text: numbers to the right, text to the left.

    Args:
        rows: one mapping a line, from column names to values.
        columns: the columns, in order; keys of a row that no column names are left out.

    Returns:
        header, rule and rows, without a line break at the end.
    """
    return str(table_of(rows, columns))


def table_of(rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    """Rows as a table that terminals and plain text show each in their way.

    Args:
        rows: one mapping a line, from column names to values.
        columns: the columns, in order.

    Returns:
        the table.
    """
    right = [i for i, column in enumerate(columns) if _is_numeric(rows, column)]
    return Table(_texts(rows, columns), right=right, rule=True)


def markdown_table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """A Markdown table, readable as text too.

    Args:
        rows: one mapping a line, from column names to values.
        columns: the columns, in order.

    Returns:
        header, rule and rows, without a line break at the end.
    """
    escaped = [
        dataclasses.replace(
            column,
            header=column.header.replace("|", r"\|"),
            format=lambda value, column=column: column.format(value).replace("|", r"\|"),
        )
        for column in columns
    ]
    lines = _texts(rows, escaped)
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    cells = [
        [
            text.rjust(width) if _is_numeric(rows, column) else text.ljust(width)
            for text, width, column in zip(line, widths, columns, strict=True)
        ]
        for line in lines
    ]
    rule = [
        "-" * (width - 1) + ":" if _is_numeric(rows, column) else "-" * width
        for width, column in zip(widths, columns, strict=True)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [cells[0], rule, *cells[1:]])


def write_csv(path: str | os.PathLike[str], rows: Sequence[Row], columns: Sequence[Column]) -> None:
    """Write the values themselves, unformatted, under the columns' names.

    Args:
        path: the file.
        rows: one mapping a line; a value that is absent or None is left empty.
        columns: the columns, in order.

    Raises:
        OSError: if the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([column.name for column in columns])
    writer.writerows([[row.get(column.name) for column in columns] for row in rows])
    write_whole(path, text.getvalue().encode())


def write_json(path: str | os.PathLike[str], payload: Any) -> None:
    """Write JSON, indented; the same payload gives the same bytes.

    Args:
        path: the file.
        payload: dicts, lists, strings, numbers and None; NumPy and JAX scalars are written as
            numbers.

    Raises:
        ValueError: if a number is not finite, since JSON has no such numbers.
        TypeError: if a value has no form in JSON.
        OSError: if the file cannot be written.
    """
    text = json.dumps(payload, indent=2, ensure_ascii=False, allow_nan=False, default=_as_number)
    write_whole(path, (text + "\n").encode())


def _texts(rows: Sequence[Row], columns: Sequence[Column]) -> list[list[str]]:
    """Return the headers, and below them the cells of every row."""
    values = [[(row.get(column.name), column.format) for column in columns] for row in rows]
    texts = [[_MISSING if v is None else format(v) for v, format in line] for line in values]
    return [[column.header for column in columns], *texts]


def _is_numeric(rows: Sequence[Row], column: Column) -> bool:
    values = [row.get(column.name) for row in rows]
    return all(value is None or isinstance(value, numbers.Number) for value in values)


def _as_number(value: Any) -> Any:
    if getattr(value, "shape", None) == ():
        return value.item()
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def describe_machine() -> dict[str, str | int]:
    """Say what a measurement ran on: processor, cores, devices, versions.

    Returns:
        "cpu", "cores" (those this process may use), "devices" (JAX's), "python", "jax" and
        "numpy" (versions).
    """
    devices = jax.devices()
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
