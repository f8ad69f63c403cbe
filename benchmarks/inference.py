"""Inference of VGG19 on 32x32 images: FALCON, its grouped form, the standard model and PyTorch.

float32, evaluation mode; all JAX models go through `deploy`, so the baselines have folded
BatchNorms and chunks, too. "Tuned" is the standard model with im2col on small maps, "lax" the one
with XLA's convolutions only (left out at 128 images: it takes seconds). About three minutes.

python -m benchmarks.inference --out results/inference.json [--compiled]
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Callable
from typing import Any

import falcon_jax as fj
from benchmarks.timing import settings_of_run, synchronised, take_turns
from benchmarks.vgg19 import images, models, torch_images, torch_model
from falcon_jax.report.formats import format_ratio
from falcon_jax.report.table import Column, format_table, write_json

RATIOS = {
    "tuned / ours": ("tuned", "ours"),
    "lax / ours": ("lax", "ours"),
    "grouped / ours": ("grouped", "ours"),
    "torch best / ours": ("torch best", "ours"),
    "torch standard / torch best": ("torch standard", "torch best"),
}
TORCH_FALCON = ("torch", "torch frozen", "torch compiled")
SLOW = ("lax", "grouped")


def torch_calls(batch: int, *, compiled: bool) -> dict[str, Callable[[], Any]]:
    """Return calls of the PyTorch models, channels last; none where it is not installed.

    ``torch frozen`` is the traced FALCON model with BatchNorms folded by ``torch.jit.freeze``.

    Args:
        batch: images.
        compiled: whether ``torch.compile`` is measured, too.
    """
    falcon, standard = torch_model(falcon=True), torch_model(falcon=False)
    if falcon is None:
        return {}
    import torch

    x = torch_images(batch)

    def call(model: Any) -> Callable[[], Any]:
        def run() -> Any:
            with torch.inference_mode():
                return model(x)

        return run

    calls = {"torch": call(falcon.eval()), "torch standard": call(standard.eval())}
    with torch.no_grad():
        frozen = torch.jit.optimize_for_inference(
            torch.jit.freeze(torch.jit.trace(falcon, x))  # type: ignore[arg-type]
        )
    calls["torch frozen"] = call(frozen)
    if compiled:
        calls["torch compiled"] = call(torch.compile(falcon))
    return calls


def measure(batch: int, *, rounds: int, compiled: bool, slow: bool) -> dict[str, Any]:
    """Return ratios, milliseconds and spread for one batch size.

    Args:
        batch: images.
        rounds: turns that each model gets.
        compiled: whether ``torch.compile`` is measured, too.
        slow: whether the forms that take seconds are measured.
    """
    x = images(batch)
    calls = {
        name: synchronised(fj.deploy(make(), x[:1]), x)
        for name, make in models().items()
        if slow or name not in SLOW
    }
    calls |= torch_calls(batch, compiled=compiled)
    times = take_turns(calls, rounds=rounds)
    ms = {name: timing.median for name, timing in times.items()}
    measured = [ms[name] for name in TORCH_FALCON if name in ms]
    if measured:
        ms["torch best"] = min(measured)
    row: dict[str, Any] = {"batch": batch}
    row |= {r: ms[a] / ms[b] for r, (a, b) in RATIOS.items() if a in ms and b in ms}
    row |= {f"{name} ms": value for name, value in ms.items()}
    row["times"] = {name: dataclasses.asdict(timing) for name, timing in times.items()}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--compiled", action="store_true", help="torch.compile too: minutes more")
    options = parser.parse_args()
    rows = [
        measure(b, rounds=options.rounds, compiled=options.compiled, slow=b < 128)
        for b in options.batches
    ]
    columns = [Column(name="batch", header="Images")] + [
        Column(name=n, header=n, format=format_ratio if n in RATIOS else "{:.2f}".format)
        for n in rows[0]
        if n in RATIOS or n.endswith(" ms")
    ]
    print(format_table(rows, columns))
    if options.out:
        command = shlex.join(["python", "-m", "benchmarks.inference", *sys.argv[1:]])
        write_json(options.out, {"command": command, **settings_of_run(), "rows": rows})


if __name__ == "__main__":
    main()
