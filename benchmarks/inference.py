"""Inference of VGG19 on 32x32 images: FALCON, its grouped form, the standard model and PyTorch.

float32, evaluation mode; all JAX models go through `deploy`, so the baselines have folded
BatchNorms and chunks, too. "Tuned" is the standard model with im2col on small maps, "lax" the one
with XLA's convolutions only (left out at 128 images: it takes seconds). About three minutes.

python -m benchmarks.inference --out results/inference.json [--compiled]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import falcon_jax as fj
from benchmarks.timing import ratios_and_times, report, synchronised, take_turns
from benchmarks.vgg19 import images, models, torch_images, torch_model

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
        if name != "flax" and (slow or name not in SLOW)
    }
    calls |= torch_calls(batch, compiled=compiled)
    times = take_turns(calls, rounds=rounds)
    measured = [times[name] for name in TORCH_FALCON if name in times]
    if measured:
        times["torch best"] = min(measured, key=lambda timing: timing.median)
    return {"batch": batch, **ratios_and_times(times, RATIOS)}


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
    report(rows, RATIOS, module="benchmarks.inference", out=options.out)


if __name__ == "__main__":
    main()
