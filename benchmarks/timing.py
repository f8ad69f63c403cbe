"""Times of several calls that take turns in one process, so that their ratios mean something."""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from falcon_jax.report.table import Column, describe_machine, format_ratio, format_table, write_json

_WARM_UPS = 2
_PAUSE_S = 0.003  # OpenMP's and XLA's idle threads spin for a while and would slow the next call
_TURN_S = 0.1  # a turn measures for about as long, unless one call takes longer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Times of one call, in milliseconds.

    Attributes:
        median: of all.
        least: of all; on a busy machine it says more than the median.
        low: the first quartile.
        high: the third quartile.
        calls: how many were timed.
    """

    median: float
    least: float
    low: float
    high: float
    calls: int


def synchronised(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """Return a call of a JAX function on given arguments that ends when its results are there."""
    return lambda: jax.block_until_ready(function(*args))


def take_turns(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int, burst: int = 5
) -> dict[str, Timing]:
    """Time several calls in turn.

    In every round each call has a pause, one unmeasured run, and a burst of measured runs; a slow
    second of the machine so hits all of them. The first run after others' finds nothing of its own
    in the caches and takes far longer.

    Args:
        calls: what is timed, by name; each returns when its work is done.
        rounds: how many turns each gets.
        burst: runs a turn, at most; fewer where they would take more than 0.1 s.

    Returns:
        The times by name.
    """
    lasts = {}
    for name, call in calls.items():
        for _ in range(_WARM_UPS):
            start = time.perf_counter()
            call()
            lasts[name] = time.perf_counter() - start
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(_PAUSE_S)
            call()
            for _ in range(min(burst, max(1, int(_TURN_S / lasts[name])))):
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
    return {name: _timing(values) for name, values in seconds.items()}


def _timing(seconds: list[float]) -> Timing:
    ms = sorted(1e3 * s for s in seconds)
    low, median, high = statistics.quantiles(ms, n=4) if len(ms) > 1 else ms * 3
    return Timing(median=median, least=ms[0], low=low, high=high, calls=len(ms))


def geometric_mean(ratios: Iterable[float]) -> float:
    """Return the geometric mean.

    >>> geometric_mean([2.0, 8.0])
    4.0
    """
    logs = [math.log(r) for r in ratios]
    return math.exp(sum(logs) / len(logs))


def ratios_and_times(
    times: Mapping[str, Timing], ratios: Mapping[str, tuple[str, str]]
) -> dict[str, Any]:
    """Return a row of a report: ratios of medians, milliseconds, and every time with its spread.

    Args:
        times: by name.
        ratios: by name, which time is divided by which; left out where one is missing.
    """
    ms = {name: timing.median for name, timing in times.items()}
    row = {name: ms[a] / ms[b] for name, (a, b) in ratios.items() if a in ms and b in ms}
    row |= {f"{name} ms": value for name, value in ms.items()}
    return {**row, "times": {name: dataclasses.asdict(timing) for name, timing in times.items()}}


def report(
    rows: list[dict[str, Any]], ratios: Iterable[str], *, module: str, out: str | None
) -> None:
    """Print the rows of whole models, ratios first, and write them with the command and machine.

    Args:
        rows: of `ratios_and_times`, each with its ``batch``.
        ratios: names of the ratios.
        module: the benchmark's, as ``python -m`` takes it.
        out: the JSON file; None for none.
    """
    shown = [n for n in rows[0] if n in ratios or n.endswith(" ms")]
    columns = [Column(name="batch", header="Images")] + [
        Column(name=n, header=n, format=format_ratio if n in ratios else "{:.2f}".format)
        for n in shown
    ]
    print(format_table(rows, columns))
    if out:
        command = shlex.join(["python", "-m", module, *sys.argv[1:]])
        write_json(out, {"command": command, **settings_of_run(), "rows": rows})


def settings_of_run() -> dict[str, Any]:
    """Return the machine, the version of PyTorch if it is there, and how glibc allocates."""
    try:
        import torch

        version = str(torch.__version__)
    except ImportError:
        version = None
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return {"machine": describe_machine(), "torch": version, "glibc_tunables": tunables}
