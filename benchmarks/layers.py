"""A 3x3 FALCON layer against the standard convolution, lax's grouped form and PyTorch.

Shapes: VGG19's five at 32x32 and ResNet18's four at 224x224, float32, channels last. "Tuned" is the
faster of lax's standard convolution and im2col, shape by shape. About five minutes.

python -m benchmarks.layers --out results/layers.json
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from typing import Any

from benchmarks.layer_calls import LAYERS, jax_calls, torch_calls
from benchmarks.timing import geometric_mean, settings_of_run, take_turns
from falcon_jax.report.table import Column, format_ratio, format_table, write_json

RATIOS = {
    "tuned / ours": ("tuned", "ours"),
    "lax / ours": ("standard", "ours"),
    "grouped / ours": ("grouped", "ours"),
    "ours / torch": ("ours", "torch"),
    "ours / compiled": ("ours", "torch compiled"),
    "torch standard / torch": ("torch standard", "torch"),
}


def measure(batch: int, *, backward: bool, rounds: int, compiled: bool) -> list[dict[str, Any]]:
    """Return one row for each layer: ratios, milliseconds and their spread.

    Args:
        batch: images.
        backward: whether gradients are computed, too.
        rounds: turns that each form gets.
        compiled: whether ``torch.compile`` is measured, too.
    """
    rows = []
    for layer in LAYERS:
        calls = jax_calls(layer, batch, backward=backward)
        calls |= torch_calls(layer, batch, backward=backward, compiled=compiled)
        times = take_turns(calls, rounds=rounds)
        ms = {name: timing.median for name, timing in times.items()}
        ms["tuned"] = min(ms["standard"], ms["im2col"])
        row: dict[str, Any] = {"layer": str(layer), "network": layer.network}
        row |= {r: ms[a] / ms[b] for r, (a, b) in RATIOS.items() if a in ms and b in ms}
        row |= {f"{name} ms": value for name, value in ms.items()}
        row["times"] = {name: dataclasses.asdict(timing) for name, timing in times.items()}
        rows.append(row)
        print(".", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    return rows


def means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the geometric mean of every ratio over the layers."""
    return {r: geometric_mean(row[r] for row in rows) for r in RATIOS if r in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--compiled", action="store_true", help="torch.compile too: minutes more")
    options = parser.parse_args()
    results = []
    for backward in (False, True):
        for batch in options.batches:
            rows = measure(
                batch, backward=backward, rounds=options.rounds, compiled=options.compiled
            )
            what = "forward + backward" if backward else "forward"
            mean = {"layer": "geometric mean", **means(rows)}
            shown = [n for n in rows[0] if n in RATIOS or n.endswith(" ms")]
            columns = [Column(name="layer", header="Layer")] + [
                Column(name=n, header=n, format=format_ratio if n in RATIOS else "{:.2f}".format)
                for n in shown
            ]
            print(f"\n{what}, {batch} images")
            print(format_table([*rows, mean], columns))
            results.append({"what": what, "batch": batch, "means": means(rows), "rows": rows})
    if options.out:
        command = shlex.join(["python", "-m", "benchmarks.layers", *sys.argv[1:]])
        write_json(options.out, {"command": command, **settings_of_run(), "results": results})


if __name__ == "__main__":
    main()
