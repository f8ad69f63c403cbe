r"""Searched plans against the same rank everywhere, at equal mult-adds and at equal latency.

    python -m benchmarks.searched --network=recognizer --out=results/searched_recognizer
    python -m benchmarks.searched --network=recognizer --latency --out=results/searched_latency

Networks, images and scores are those of `benchmarks.training_free_ocr`; nothing has labels. FALCON
of ranks 1 to 3 everywhere, but for the first convolution; and for as many mult-adds, what `search`
finds among FALCON's ranks, and among all ``--candidates``. All are calibrated; with ``--distill``
the smallest of each kind is distilled, too. With ``--latency`` plans are searched for shares of the
original's latency instead, and the deployed models are timed. OUT gets a table (text, CSV, JSON)
and the front and the sensitivities as plots.
"""

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from flax import nnx

import falcon_jax as fj
from benchmarks.training_free_ocr import STUDIES, Study, jitted
from falcon_jax.compression.profile import median_ms
from falcon_jax.compression.sensitivity import CANDIDATES
from falcon_jax.report import plot_front, plot_sensitivity
from falcon_jax.report.table import (
    Column,
    describe_machine,
    format_millions,
    format_percent,
    format_ratio,
    format_table,
    write_csv,
)

RANKS = (1, 2, 3)
SHARES = (0.4, 0.6)  # of the original's latency
EXTRA_RATIOS = (5.5, 7.0)  # fewer mult-adds in the layers that may be replaced
REPEATS = 30


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _small(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


COLUMNS = (
    Column(name="plan", header="Plan"),
    Column(name="then", header="Then"),
    Column(name="params", header="Params", format=format_millions),
    Column(name="mult_adds", header="Mult-adds", format=format_millions),
    Column(name="fewer_mult_adds", header="Fewer", format=format_ratio),
    Column(name="predicted_loss", header="Predicted loss", format=_small),
    Column(name="accuracy", header="Accuracy", format=format_percent),
    Column(name="held_out", header="Other fonts", format=format_percent),
    Column(name="seconds", header="Seconds", format=_seconds),
    Column(name="predicted_ms", header="Predicted ms", format=_milliseconds),
    Column(name="measured_ms", header="Measured ms", format=_milliseconds),
)


class Run:
    """One network, its images and what was measured of it."""

    def __init__(
        self, study: Study, images: int, tests: int, latency: bool, candidates: Sequence[fj.Method]
    ):
        self.model = study.load()
        self.batches = study.batches(images)
        self.score = study.scores(tests)
        self.sample = study.batches(1)[0]
        self.stays = fj.Rule(path=study.first, method=None)
        self.latency = latency
        self.only_falcon = all(map(_is_falcon, candidates))
        self._known: dict[tuple[fj.Method | None, ...], tuple[nnx.Module, dict[str, Any]]] = {}
        begin = time.perf_counter()
        self.effects = fj.sensitivity(
            self.model,
            self.batches,
            candidates=candidates,
            rules=[self.stays],
            sample=self.sample,
            progress=True,
        )
        self.seconds = time.perf_counter() - begin
        paths = set(self.effects.effects)
        self.before = sum(
            row.before.mult_adds for row in self.effects.plan.rows if row.path in paths
        )
        self.fixed = self.effects.plan.before.mult_adds - self.before

    def row(
        self, name: str, plan: fj.Plan | None, small: nnx.Module, **more: Any
    ) -> dict[str, Any]:
        """Return a row of the table, with the scores of a model."""
        cost = fj.profile(small, self.sample)
        accuracy, held_out = self.score(jitted(small))
        measured = None
        if self.latency:
            serve = fj.deploy(small, self.sample)
            measured = median_ms(lambda: serve(self.sample), repeats=REPEATS)
        return {
            "plan": name,
            "then": "",
            "params": cost.params,
            "mult_adds": cost.mult_adds,
            "fewer_mult_adds": self.before / max(cost.mult_adds - self.fixed, 1),
            "accuracy": accuracy,
            "held_out": held_out,
            "seconds": None,
            "measured_ms": measured,
            **_predictions(plan),
            **more,
        }

    def calibrated(self, name: str, plan: fj.Plan) -> tuple[nnx.Module, dict[str, Any]]:
        """Return a calibrated model and its row; of the same methods, those there are already."""
        methods = tuple(row.method for row in plan.rows)
        if methods in self._known:
            small, row = self._known[methods]
            return small, row | {"plan": name, **_predictions(plan)}
        begin = time.perf_counter()
        compressed = fj.compress(self.model, plan)
        small = fj.calibrate(self.model, compressed, plan, self.batches)
        seconds = time.perf_counter() - begin
        row = self.row(name, plan, small, then="calibrated", seconds=seconds)
        self._known[methods] = small, row
        return small, row

    def distilled(self, name: str, plan: fj.Plan, small: nnx.Module, steps: int) -> dict[str, Any]:
        """Return the row of a model distilled on smaller batches of the same images."""
        begin = time.perf_counter()
        pieces = [part for batch in self.batches for part in _halves(batch)]
        small = fj.distill(self.model, small, pieces, steps=steps, progress=True)
        seconds = time.perf_counter() - begin
        return self.row(name, plan, small, then="distilled", seconds=seconds)

    def searched(self, target: fj.Target, only: Callable[[fj.Method], bool]) -> fj.SearchedPlan:
        """Return the plan of a target among some candidates, of the effects in hand."""
        kept = {
            path: tuple(effect for effect in each if only(effect.candidate))
            for path, each in self.effects.effects.items()
            if any(only(effect.candidate) for effect in each)
        }
        effects = fj.Sensitivity(plan=self.effects.plan, effects=kept)
        sample = self.sample
        return fj.search(self.model, [], target=target, effects=effects, sample=sample)


def _predictions(plan: fj.Plan | None) -> dict[str, float | None]:
    names = "predicted_loss", "predicted_ms"
    return {name: getattr(plan, name, None) for name in names}


def _halves(batch: jax.Array) -> list[jax.Array]:
    middle = -(-len(batch) // 2)
    return [part for part in (batch[:middle], batch[middle:]) if len(part)]


def _is_falcon(method: fj.Method) -> bool:
    return isinstance(method, fj.Falcon)


def _any(method: fj.Method) -> bool:
    return True


def by_mult_adds(
    run: Run, distill: int, ranks: Sequence[int], ratios: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """Yield a row for every rank, and for what is searched with as many mult-adds."""
    yield run.row("standard", None, run.model)
    targets = {}
    for rank in ranks:
        rules = [run.stays, fj.Rule(method=fj.Falcon(rank=rank))]
        plan = fj.make_plan(run.model, rules, run.sample)
        targets[f"as FALCON {rank}"] = plan.after.mult_adds
        small, row = run.calibrated(f"FALCON {rank}", plan)
        yield row
        if distill and rank == 1:
            yield run.distilled(f"FALCON {rank}", plan, small, distill)
    for ratio in ratios:
        targets[f"{ratio:g}x"] = run.fixed + int(run.before / ratio)
    for label, mult_adds in targets.items():
        kinds = [("FALCON's ranks", _is_falcon), ("all", _any)][: 1 if run.only_falcon else 2]
        for kind, only in kinds:
            try:
                plan = run.searched(fj.Target(mult_adds=mult_adds), only)
            except ValueError as error:
                print(error, file=sys.stderr)
                continue
            name = f"searched, {kind}, {label}"
            small, row = run.calibrated(name, plan)
            yield row
            if distill and kind == kinds[-1][0] and label == "as FALCON 1":
                yield run.distilled(name, plan, small, distill)


def by_latency(run: Run, ranks: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield a row for every rank, and for what is searched to be as fast, or for a share."""
    yield run.row("standard", None, run.model)
    for rank in ranks:
        rules = [run.stays, fj.Rule(method=fj.Falcon(rank=rank))]
        plan = fj.make_plan(run.model, rules, run.sample)
        _, row = run.calibrated(f"FALCON {rank}", plan)
        yield row
        if rank == 1:
            as_fast = row["measured_ms"]
            plan = run.searched(fj.Target(latency_ms=as_fast), _any)
            yield run.calibrated("searched, as fast as FALCON 1", plan)[1]
    for share in SHARES:
        try:
            plan = run.searched(fj.Target(latency=share), _any)
        except ValueError as error:
            print(error, file=sys.stderr)
            continue
        yield run.calibrated(f"searched, latency {share:g}", plan)[1]


def main(arguments: Sequence[str]) -> int:
    """Measure one network, and report."""
    parser = argparse.ArgumentParser(description="Searched plans against uniform ones.")
    parser.add_argument("--network", choices=tuple(STUDIES), default="recognizer")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--images", type=int, default=200, help="for search and calibration")
    parser.add_argument("--tests", type=int, help="images of each score")
    parser.add_argument("--distill", type=int, default=0, help="steps, of the smallest")
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="everywhere")
    parser.add_argument("--ratios", type=float, nargs="*", default=EXTRA_RATIOS, help="searched")
    kinds = sorted({type(method).__name__ for method in CANDIDATES})
    parser.add_argument("--candidates", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--highest", type=int, default=4, help="rank of FALCON as a candidate")
    options = parser.parse_args(arguments[1:])
    study = STUDIES[options.network]
    command = " ".join(["python -m benchmarks.searched", *arguments[1:]])
    candidates = [
        method
        for method in CANDIDATES
        if type(method).__name__ in options.candidates
        and not (isinstance(method, fj.Falcon) and method.rank > options.highest)
    ]
    tests = options.tests or study.tests
    run = Run(study, options.images, tests, options.latency, candidates)
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "sensitivity.txt").write_text(f"{run.effects}\n")
    (out / "sensitivity.png").write_bytes(plot_sensitivity(run.effects))
    if not options.latency:
        plan = run.searched(fj.Target(mult_adds=0.99), _any)
        (out / "front.png").write_bytes(plot_front(plan.front))
    rows = []
    if options.latency:
        found = by_latency(run, options.ranks)
    else:
        found = by_mult_adds(run, options.distill, options.ranks, options.ratios)
    for row in found:
        rows.append(row)
        print(format_table(rows[-1:], COLUMNS), flush=True)
        (out / "table.txt").write_text(format_table(rows, COLUMNS) + "\n")
        write_csv(out / "table.csv", rows, COLUMNS)
        report = {
            "command": command,
            "machine": describe_machine(),
            "sensitivity_seconds": run.seconds,
            "rows": rows,
        }
        (out / "table.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
