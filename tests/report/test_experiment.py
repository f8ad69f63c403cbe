import csv
import json

import pytest

from falcon_jax.report.experiment import COLUMNS, checked_row, write_report

ROWS = [
    {
        "label": "StConv",
        "method": "standard",
        "rank": None,
        "params": 20_300_000,
        "mult_adds": 398_750_000,
        "params_ratio": 1.0,
        "mult_adds_ratio": 1.0,
        "accuracy_before": 0.9861,
        "accuracy_after": None,
        "latency_ms": 12.345,
    },
    {
        "label": "FALCON k=1",
        "method": "falcon",
        "rank": 1,
        "params": 2_610_000,
        "mult_adds": 47_230_000,
        "params_ratio": 7.78,
        "mult_adds_ratio": 8.44,
        "accuracy_before": 0.8911,
        "accuracy_after": 0.975,
        "latency_ms": None,
    },
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiment") / "report"
    return write_report(ROWS, folder), folder


def test_writes_all_files_and_returns_the_table(report):
    text, folder = report
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        "accuracy_vs_mult_adds.png",
        "accuracy_vs_params.png",
        "report.csv",
        "report.json",
        "report.txt",
    ]
    assert (folder / "report.txt").read_text() == text + "\n"
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[2] == "StConv standard - 20.30M 398.75M 1.0x 1.0x 98.61% - 12.35 ms"
    assert lines[3] == "FALCON k=1 falcon 1 2.61M 47.23M 7.8x 8.4x 89.11% 97.50% -"


def test_files_hold_the_values(report):
    folder = report[1]
    assert json.loads((folder / "report.json").read_text()) == ROWS
    with (folder / "report.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["params"] for row in rows] == ["20300000", "2610000"]
    assert list(rows[0]) == [column.name for column in COLUMNS]


def test_no_accuracy_at_all_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no row has an accuracy"):
        write_report([{**ROWS[0], "accuracy_before": None}], tmp_path)


def test_a_note_stands_below_the_table_and_in_the_files(tmp_path):
    rows = [ROWS[0], {**ROWS[1], "note": "checkpoint of step 2 used"}]
    text = write_report(rows, tmp_path)
    assert text.splitlines()[-2:] == ["", f"{ROWS[1]['label']}: checkpoint of step 2 used."]
    assert (tmp_path / "report.txt").read_text() == text + "\n"
    notes = [row["note"] for row in json.loads((tmp_path / "report.json").read_text())]
    assert notes == [None, "checkpoint of step 2 used"]
    assert (
        (tmp_path / "report.csv").read_text().splitlines()[2].endswith("checkpoint of step 2 used")
    )


def test_results_of_another_form_are_named(tmp_path):
    file = tmp_path / "result.json"
    file.write_text(json.dumps(ROWS[0]))
    assert checked_row(file) == ROWS[0]
    for changes in (
        {"label": 3},
        {"params": "many"},
        {"params": float("nan")},
        {"mult_adds": 0},
        {"params": True},
        {"accuracy_after": float("inf")},
        {"accuracy_before": 1.5},
        {"latency_ms": [1]},
        {"rank": {}},
        {"note": 3},
    ):
        file.write_text(json.dumps({**ROWS[0], **changes}))
        with pytest.raises(
            ValueError, match=f"result.json is no row of a report .{next(iter(changes))}"
        ):
            checked_row(file)
    for text in (b"", b"[]", b"null", b"{}", b"\xff\xfe", b'{"label": "' + b"x" * 10**6):
        file.write_bytes(text)
        with pytest.raises(ValueError, match=r"result\.json is") as caught:
            checked_row(file)
        assert len(str(caught.value)) < 600
    file.unlink()
    file.mkdir()
    with pytest.raises(ValueError, match="is no file"):
        checked_row(file)
