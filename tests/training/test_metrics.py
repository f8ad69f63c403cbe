import json

import pytest

from falcon_jax.training.monitoring import MetricsLog


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_line_a_call(tmp_path):
    log = MetricsLog(tmp_path / "new" / "run", tensorboard=False)
    log.write(10, {"epoch": 1, "loss": 0.5})
    log.write(20, {"epoch": 2, "loss": 0.25})
    log.close()
    assert lines(tmp_path / "new" / "run") == [
        {"step": 10, "epoch": 1, "loss": 0.5},
        {"step": 20, "epoch": 2, "loss": 0.25},
    ]


def test_what_will_be_written_again_is_dropped(tmp_path):
    for from_step, steps in ((0, [10, 20, 30]), (20, [30, 40])):
        log = MetricsLog(tmp_path, tensorboard=False, from_step=from_step)
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
    log = MetricsLog(tmp_path, tensorboard=False, from_step=20)
    log.write(30, {})
    log.close()
    assert lines(tmp_path) == [{"step": 10}, {"step": 30}]


def test_a_last_line_without_its_newline_does_not_swallow_the_next(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n{"step": 20}')
    log = MetricsLog(tmp_path, tensorboard=False, from_step=20)
    log.write(30, {})
    log.close()
    assert lines(tmp_path)[-1] == {"step": 30}


def test_event_files_on_request(tmp_path):
    log = MetricsLog(tmp_path, tensorboard=True)
    log.write(10, {"loss": 0.5})
    log.close()
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"loss" in events.read_bytes()
