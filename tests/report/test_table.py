import csv
import json

import jax.numpy as jnp
import numpy as np
import pytest

from falcon_jax.report.table import (
    Column,
    format_millions,
    format_percent,
    format_table,
    markdown_table,
    write_csv,
    write_json,
)

COLUMNS = (
    Column(name="method", header="Method"),
    Column(name="params", header="Params", format=format_millions),
    Column(name="accuracy", header="Accuracy", format=format_percent),
)
ROWS = (
    {"method": "standard", "params": 20_300_000, "accuracy": None, "unused": 1},
    {"method": "falcon, k=1", "params": 2_610_000, "accuracy": 0.975},
)


def test_format_table_aligns_text_left_and_numbers_right():
    assert format_table(ROWS, COLUMNS).splitlines() == [
        "Method       Params  Accuracy",
        "-----------  ------  --------",
        "standard     20.30M         -",
        "falcon, k=1   2.61M    97.50%",
    ]


def test_markdown_table():
    assert markdown_table(ROWS, COLUMNS).splitlines() == [
        "| Method      | Params | Accuracy |",
        "| ----------- | -----: | -------: |",
        "| standard    | 20.30M |        - |",
        "| falcon, k=1 |  2.61M |   97.50% |",
    ]


def test_markdown_escapes_bars():
    column = Column(name="a", header="|x|")
    assert markdown_table([{"a": "b|c"}], [column]).splitlines() == [
        r"| \|x\| |",
        "| ----- |",
        r"| b\|c  |",
    ]


def test_a_table_without_rows_is_a_header():
    assert format_table([], COLUMNS[:1]).splitlines() == ["Method", "------"]


def test_csv_keeps_the_values(tmp_path):
    path = tmp_path / "table.csv"
    write_csv(path, ROWS, COLUMNS)
    with path.open(newline="") as stream:
        assert list(csv.reader(stream)) == [
            ["method", "params", "accuracy"],
            ["standard", "20300000", ""],
            ["falcon, k=1", "2610000", "0.975"],
        ]


def test_json_is_stable_and_indented(tmp_path):
    path = tmp_path / "payload.json"
    payload = {"b": [np.float32(0.5), jnp.asarray(2)], "a": {"text": "é", "none": None}}
    write_json(path, payload)
    first = path.read_bytes()
    write_json(path, payload)
    assert path.read_bytes() == first
    assert first.decode().splitlines()[:2] == ["{", '  "b": [']
    assert json.loads(first) == {"b": [0.5, 2], "a": {"text": "é", "none": None}}


@pytest.mark.parametrize(
    ("payload", "error"), [({"a": float("nan")}, ValueError), ({"a": np.zeros(3)}, TypeError)]
)
def test_json_refuses_what_it_cannot_say_and_keeps_the_old_file(tmp_path, payload, error):
    path = tmp_path / "payload.json"
    write_json(path, 1)
    with pytest.raises(error):
        write_json(path, payload)
    assert path.read_text() == "1\n"
