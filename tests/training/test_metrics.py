import json
import sqlite3
import subprocess
import sys
import types

import jax
import pytest

from falcon_jax.training.monitoring import MetricsLog, Run, require_loggers


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_line_a_call(tmp_path):
    log = MetricsLog(Run(directory=tmp_path / "new" / "run"))
    log.write(10, {"epoch": 1, "loss": 0.5})
    log.write(20, {"epoch": 2, "loss": 0.25})
    log.close()
    assert lines(tmp_path / "new" / "run") == [
        {"step": 10, "epoch": 1, "loss": 0.5},
        {"step": 20, "epoch": 2, "loss": 0.25},
    ]


def test_what_will_be_written_again_is_dropped(tmp_path):
    for from_step, steps in ((0, [10, 20, 30]), (20, [30, 40])):
        log = MetricsLog(Run(directory=tmp_path, from_step=from_step))
        for step in steps:
            log.write(step, {"start": from_step})
        log.close()
    assert [(line["step"], line["start"]) for line in lines(tmp_path)] == [
        (10, 0),
        (20, 0),
        (30, 20),
        (40, 20),
    ]


@pytest.mark.parametrize("torn", ['{"step": 20, "lo', "", "null", "{}", "[1]"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n' + torn)
    log = MetricsLog(Run(directory=tmp_path, from_step=20))
    log.write(30, {})
    log.close()
    assert lines(tmp_path) == [{"step": 10}, {"step": 30}]


def test_a_last_line_without_its_newline_does_not_swallow_the_next(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n{"step": 20}')
    log = MetricsLog(Run(directory=tmp_path, from_step=20))
    log.write(30, {})
    log.close()
    assert lines(tmp_path)[-1] == {"step": 30}


def test_event_files_on_request(tmp_path):
    log = MetricsLog(Run(directory=tmp_path), loggers=["tensorboard"])
    log.write(10, {"loss": 0.5})
    log.close()
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"loss" in events.read_bytes()


class Tracker(types.ModuleType):
    """What wandb and trackio have in common; it notes what it is asked for."""

    def __init__(self, name, fails=()):
        super().__init__(name)
        self.calls = []
        self._fails = fails

    def _noted(self, name, /, *args, **options):
        self.calls.append((name, *args, options))
        if name in self._fails:
            raise ConnectionError(f"no {name} today")

    def init(self, **options):
        self._noted("init", **options)
        return types.SimpleNamespace(
            log=lambda metrics, step: self._noted("log", metrics, step=step),
            finish=self.finish,
        )

    def finish(self):
        self._noted("finish")


def tracker(monkeypatch, name, **options):
    made = Tracker(name, **options)
    monkeypatch.setitem(sys.modules, name, made)
    return made


def written(directory, loggers):
    run = Run(directory=directory, label="falcon_k1", project="digits", config={"seed": 3})
    log = MetricsLog(run, loggers=loggers)
    for step in (10, 20):
        log.write(step, {"loss": 1 / step})
    log.close()
    return lines(directory)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_are_told_of_the_run_and_its_metrics(name, tmp_path, monkeypatch):
    made = tracker(monkeypatch, name)
    directory = tmp_path / "demo" / "falcon_k1"
    assert len(written(directory, [name])) == 2
    init, first, second, finish = made.calls
    assert init[1]["project"] == "digits" and init[1]["name"] == "demo/falcon_k1"
    assert init[1]["config"] == {"seed": 3} and init[1]["resume"] == "allow"
    assert (first, second) == (
        ("log", {"loss": 0.1}, {"step": 10}),
        ("log", {"loss": 0.05}, {"step": 20}),
    )
    assert finish[0] == "finish"


def test_a_run_that_goes_on_is_the_same_one_in_wandb(tmp_path, monkeypatch):
    made = tracker(monkeypatch, "wandb")
    written(tmp_path / "a", ["wandb"])
    written(tmp_path / "a", ["wandb"])
    written(tmp_path / "b", ["wandb"])
    first, again, other = (call[1]["id"] for call in made.calls if call[0] == "init")
    assert first == again != other


@pytest.mark.parametrize(
    ("fails", "calls"),
    [("init", ["init"]), ("log", ["init", "log"]), ("finish", ["init", "log", "log", "finish"])],
)
def test_a_logger_that_fails_is_warned_of_once_and_the_rest_goes_on(
    fails, calls, tmp_path, monkeypatch
):
    broken, good = tracker(monkeypatch, "wandb", fails=[fails]), tracker(monkeypatch, "trackio")
    with pytest.warns(match=rf"logger 'wandb' failed .*metrics.jsonl goes on: no {fails}") as told:
        found = written(tmp_path, ["wandb", "trackio"])
    assert len(told) == 1 and len(found) == 2
    assert [call[0] for call in broken.calls] == calls
    assert [call[0] for call in good.calls] == ["init", "log", "log", "finish"]


def test_only_the_first_process_logs(tmp_path, monkeypatch):
    made = tracker(monkeypatch, "wandb")
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    log = MetricsLog(Run(directory=tmp_path / "run"), loggers=["wandb"])
    log.write(10, {"loss": 0.5})
    log.close()
    assert made.calls == [] and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("tensorboard", "tensorboardX", "train"),
        ("wandb", "wandb", "wandb"),
        ("trackio", "trackio", "trackio"),
    ],
)
def test_a_missing_package_names_its_extra(name, module, extra, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    message = rf"the logger '{name}' needs {module} .*: pip install \"falcon-jax\[{extra}\]\""
    with pytest.raises(ImportError, match=message):
        require_loggers([name])
    with pytest.raises(ImportError, match=message):
        MetricsLog(Run(directory=tmp_path), loggers=[name])


REAL = """
import pathlib, sys
from falcon_jax.training.monitoring import MetricsLog, Run
run = Run(directory=pathlib.Path(sys.argv[1]) / "demo" / "standard", config={"seed": 3})
log = MetricsLog(run, loggers=[sys.argv[2]])
log.write(10, {"loss": 0.5})
log.write(20, {"loss": 0.25})
log.close()
"""


def in_a_process(directory, name, monkeypatch):
    """Log by the real package, which has threads and processes of its own, and no network."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(directory / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = [sys.executable, "-c", REAL, str(directory), name]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and "failed" not in run.stderr, run.stderr


@pytest.mark.slow
def test_wandb_itself_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", exc_type=ImportError)
    in_a_process(tmp_path, "wandb", monkeypatch)
    (stored,) = (tmp_path / "demo" / "standard").glob("wandb/offline-run-*/run-*.wandb")
    assert b"loss" in stored.read_bytes() and b"0.25" in stored.read_bytes()


@pytest.mark.slow
def test_trackio_itself(tmp_path, monkeypatch):
    pytest.importorskip("trackio", exc_type=ImportError)
    in_a_process(tmp_path, "trackio", monkeypatch)
    (stored,) = (tmp_path / "trackio").glob("falcon_jax*.db")
    with sqlite3.connect(stored) as database:
        rows = database.execute("select step, metrics from metrics order by step").fetchall()
    assert [(step, json.loads(text)["loss"]) for step, text in rows] == [(10, 0.5), (20, 0.25)]
