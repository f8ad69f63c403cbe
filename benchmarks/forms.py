"""Every form of FALCON and of the depthwise convolution by shape, batch and rank: the choice table.

What `falcon_jax.ops.choice` holds for a backend comes from this run on it, with JAX's default
device being of that backend; a GPU's row is to be measured and put in there. Each line names the
fastest form and the one that ``impl="auto"`` takes, and by how much that is slower. About five
minutes on two cores.

python -m benchmarks.forms --out results/forms.json
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from typing import Any

import jax

import falcon_jax as fj
from benchmarks.layer_calls import LAYERS, Layer
from benchmarks.timing import geometric_mean, settings_of_run, synchronised, take_turns
from falcon_jax.ops.choice import depthwise_form, falcon_form
from falcon_jax.report.table import Column, format_ratio, format_table, write_json

FEW_CHANNELS = (Layer("few channels", 32, 3), Layer("few channels", 32, 16))
TINY = tuple(Layer("tiny", size, 512) for size in (1, 2, 3, 4))
COLUMNS = (
    Column(name="what", header="What"),
    Column(name="layer", header="Layer"),
    Column(name="batch", header="Images"),
    Column(name="rank", header="Rank"),
    Column(name="fastest", header="Fastest"),
    Column(name="auto", header="Auto"),
    Column(name="auto_over_fastest", header="Auto / fastest", format=format_ratio),
    Column(name="ms", header="Fastest, ms", format="{:.3f}".format),
)


def falcon_row(layer: Layer, batch: int, rank: int, rounds: int) -> dict[str, Any]:
    """Return the forward times of FALCON's forms; few input channels lead to 64 outputs."""
    spec = layer.spec
    if layer in FEW_CHANNELS:
        spec = dataclasses.replace(spec, out_features=64)
    method = fj.Falcon(rank=rank)
    x = jax.random.normal(jax.random.key(0), (batch, layer.size, layer.size, layer.channels))
    params = method.init(jax.random.key(1), spec)
    calls = {
        form.impl: synchronised(jax.jit(lambda x, p, form=form: form.apply(p, x, spec)), x, params)
        for form in method.forms()
        if form.impl != "grouped" or jax.default_backend() != "cpu"  # never, and it takes seconds
    }
    auto = falcon_form(
        points=x.size // layer.channels,
        taps=spec.taps,
        in_features=spec.in_features,
        out_features=spec.out_features,
        rank=rank,
    )
    return _row("falcon", layer, batch, rank, calls, auto, rounds)


def depthwise_row(layer: Layer, batch: int, rounds: int) -> dict[str, Any]:
    """Return the times, forward and backward, of the depthwise convolution's forms."""
    x = jax.random.normal(jax.random.key(0), (batch, layer.size, layer.size, layer.channels))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, layer.channels))

    def both(impl: Any) -> Any:
        def run(x: jax.Array, kernel: jax.Array) -> Any:
            y, gradients = jax.vjp(lambda *a: fj.depthwise_conv(*a, impl=impl), x, kernel)
            return y, gradients(y)

        return run

    names = ("shifted", "per_pixel", "grouped") if layer in TINY else ("shifted", "grouped")
    calls = {name: synchronised(jax.jit(both(name)), x, kernel) for name in names}
    auto = depthwise_form(points=layer.size**2, taps=9)
    return _row("depthwise", layer, batch, None, calls, auto, rounds)


def _row(
    what: str, layer: Layer, batch: int, rank: int | None, calls: Any, auto: str, rounds: int
) -> dict[str, Any]:
    times = take_turns(calls, rounds=rounds, burst=3)
    ms = {name: timing.median for name, timing in times.items()}
    fastest = min(ms, key=lambda name: ms[name])
    return {
        "what": what,
        "layer": str(layer),
        "batch": batch,
        "rank": rank,
        "fastest": fastest,
        "auto": auto,
        "auto_over_fastest": ms[auto] / ms[fastest],
        "ms": ms[fastest],
        "times": {name: dataclasses.asdict(timing) for name, timing in times.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 6])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rows = []
    for batch in options.batches:
        for layer in (*TINY, LAYERS[0], LAYERS[2]):
            rows.append(depthwise_row(layer, batch, options.rounds))
        for rank in options.ranks:
            for layer in (*FEW_CHANNELS, *LAYERS):
                rows.append(falcon_row(layer, batch, rank, options.rounds))
    print(format_table(rows, COLUMNS))
    mean = geometric_mean(row["auto_over_fastest"] for row in rows)
    print(f"auto / fastest, geometric mean: {mean:.2f}")
    if options.out:
        command = shlex.join(["python", "-m", "benchmarks.forms", *sys.argv[1:]])
        payload = {"command": command, "backend": jax.default_backend(), **settings_of_run()}
        write_json(options.out, {**payload, "auto_over_fastest": mean, "rows": rows})


if __name__ == "__main__":
    main()
