"""Kill a run again and again at random moments, and compare its end with that of an unbroken one.

    python -m benchmarks.torture --kills=100 --out=results/torture.json

Every run is the same small experiment (train, compress, fine-tune, report). Command, machine, and
for every kill: when, at which step, and how many steps were taken again. About 20 minutes on 2 CPU
cores.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import train
from falcon_jax.report.table import Column, describe_machine, format_table, write_json
from falcon_jax.training import monitoring as watch

CONFIG = pathlib.Path(__file__).parent.parent / "configs" / "torture.py"
TIMED = ("latency_ms", "images_per_s")  # what no two runs have in common


def main(arguments: Sequence[str]) -> int:
    """Torture runs until there were so many kills."""
    parser = argparse.ArgumentParser(description="Kill runs at random moments.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args(arguments[1:])
    with tempfile.TemporaryDirectory() as folder:
        report = torture(pathlib.Path(folder), kills=options.kills, seed=options.seed)
    report = {
        "command": " ".join(["python -m benchmarks.torture", *arguments[1:]]),
        "machine": describe_machine(),
        **report,
    }
    if options.out:
        write_json(options.out, report)
    columns = [Column(name=name, header=name.replace("_", " ")) for name in report["summary"]]
    print(format_table([report["summary"]], columns))
    return 0


def torture(folder: pathlib.Path, *, kills: int, seed: int) -> dict[str, Any]:
    """Run once without interruption, then over and over with kills.

    Args:
        folder: for workdirs.
        kills: how many.
        seed: of the moments.

    Returns:
        A summary, and a record of every kill.
    """
    generator = random.Random(seed)
    _require(_start(folder / "first").wait(), 0)  # compiles
    whole = folder / "whole"
    start = time.perf_counter()
    _require(_start(whole).wait(), 0)
    seconds = time.perf_counter() - start
    expected = end_of(whole)
    records: list[dict[str, Any]] = []
    differences = finished = 0
    while len(records) < kills:
        workdir = folder / f"run{finished}"
        start = time.perf_counter()
        found_kills = len(records)
        for record in _killed(workdir, seconds, generator, kills - len(records)):
            records.append(record)
        if len(records) == found_kills:
            # Ended before its kill: the machine is faster now than it was at first.
            seconds = min(seconds, time.perf_counter() - start)
        found = end_of(workdir)
        differences += sum(found.get(name) != value for name, value in expected.items())
        differences += len(found.keys() - expected.keys())
        finished += 1
    again = [record["steps_again"] for record in records]
    summary = {
        "kills": len(records),
        "continued": sum(record["continued"] for record in records),
        "runs_finished": finished,
        "steps_again_mean": sum(again) / len(again),
        "steps_again_most": max(again),
        "differences": differences,
    }
    stages = collections.Counter(record["stage"] for record in records)
    return {
        "summary": summary,
        "seconds_of_an_unbroken_run": seconds,
        "compared": len(expected),
        "kills_by_stage": dict(stages),
        "kills": records,
    }


def _killed(
    workdir: pathlib.Path, seconds: float, generator: random.Random, most: int
) -> Iterator[dict[str, Any]]:
    """Start a run again and again until it ends by itself; yield a record of every kill."""
    record: dict[str, Any] | None = None
    while True:
        before = len(_trace(workdir))
        process = _start(workdir)
        moment = generator.uniform(0, seconds)
        try:
            status = process.wait(moment if most > 0 else None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            status = None
        trace = _trace(workdir)
        if record is not None:
            record["continued"] = status in (0, None)
            record["steps_again"] = _steps_again(trace, before)
            yield record
        if status is not None:
            _require(status, 0)
            return
        most -= 1
        stage, step = trace[-1] if trace else ("before the first step", 0)
        record = {"seconds": round(moment, 2), "stage": stage, "step": step}


def _steps_again(trace: list[tuple[str, int]], before: int) -> int:
    """Return how many steps the last start took that had been taken already."""
    taken = set(trace[:before])
    return sum(entry in taken for entry in trace[before:])


def end_of(workdir: pathlib.Path) -> dict[str, Any]:
    """Return everything that the end of an experiment is, by name: digests and numbers."""
    found: dict[str, Any] = {}
    for result in sorted(workdir.glob("*/result.json")):
        row = json.loads(result.read_text())
        found |= {f"{result.parent.name}.{k}": v for k, v in row.items() if k not in TIMED}
    for log in sorted(workdir.glob("*/metrics.jsonl")):
        for line in map(json.loads, log.read_text().splitlines()):
            name = f"{log.parent.name}.epoch{line['epoch']}"
            found |= {f"{name}.{k}": v for k, v in line.items() if k not in TIMED}
    for model in sorted(workdir.glob("*/model")):
        arrays = model_digests(model)
        found |= {f"{model.parent.name}.{name}": digest for name, digest in arrays.items()}
    return found


def model_digests(model: pathlib.Path) -> dict[str, str]:
    """Return the digest of every array of a stored model."""
    content = json.loads((model / "plan" / "metadata").read_text())
    return {name: entry["sha256"] for name, entry in content["arrays"].items()}


def _start(workdir: pathlib.Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.torture", "--worker", str(workdir)]
    # What was compiled once need not be compiled again after every kill.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        command,
        cwd=CONFIG.parent.parent,
        env={**os.environ, **cache},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _trace(workdir: pathlib.Path) -> list[tuple[str, int]]:
    path = workdir.with_suffix(".trace")
    lines = path.read_text().splitlines() if path.exists() else []
    return [(stage, int(step)) for stage, step in map(str.split, lines)]


def _require(status: int, expected: int) -> None:
    if status != expected:
        raise RuntimeError(f"a run ended with status {status} instead of {expected}")


def _work(workdir: pathlib.Path) -> int:
    """Do what train.py does, and note every step."""
    see = watch.Watch.see

    def noting(self: watch.Watch, step: int, indices: Any, metrics: Any) -> None:
        with workdir.with_suffix(".trace").open("a") as file:
            file.write(f"{self.label} {step}\n")
        see(self, step, indices, metrics)

    watch.Watch.see = noting
    return train.main(["train.py", f"--config={CONFIG}", f"--workdir={workdir}"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(_work(pathlib.Path(sys.argv[2])))
    sys.exit(main(sys.argv))
