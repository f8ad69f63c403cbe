"""Time, memory and error of the exact and the AdamW fit on every kernel of a VGG19.

The exact fit is timed five times, median; AdamW, which takes minutes, once. Memory is what XLA sets
aside for the exact fit of one kernel beside the kernel, over the kernel's size.

Command: python -m benchmarks.fit --out results/fit.json [--steps 600]
"""

import argparse
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import falcon_jax as fj
from falcon_jax.report.table import Column, describe_machine, format_table, write_json

COLUMNS = (
    Column(name="kernel", header="Kernel"),
    Column(name="layers", header="Layers"),
    Column(name="optimum", header="SVD (float64)", format=lambda v: f"{v:.6f}"),
    Column(name="exact_error", header="Exact", format=lambda v: f"{v:.6f}"),
    Column(name="adamw_error", header="AdamW", format=lambda v: f"{v:.6f}"),
    Column(name="exact_s", header="Exact, s", format=lambda v: f"{v:.4f}"),
    Column(name="adamw_s", header="AdamW, s", format=lambda v: f"{v:.2f}"),
    Column(name="memory", header="Beside the kernel", format=lambda v: f"{v:.1f}x"),
)
EXACT_PASSES = 5


def kernels_of_vgg19() -> list[jax.Array]:
    """Return random kernels of the shapes of VGG19 with a spectrum like that of trained ones.

    Every filter gets singular values that fall as 1, 1/2, 1/3, ... over its D^2 directions.
    """
    model = fj.models.vgg19_cifar(rngs=nnx.Rngs(0))
    plan = fj.make_plan(model, solver="random")
    rng = np.random.default_rng(0)
    kernels = []
    for row in plan.rows:
        *size, m, n = row.spec.kernel_shape
        u, s, v = np.linalg.svd(rng.normal(size=(n, row.spec.taps, m)), full_matrices=False)
        falling = s[:, :1] / np.arange(1, s.shape[1] + 1)
        kernel = (u * falling[:, None, :]) @ v / np.sqrt(m * row.spec.taps)
        kernels.append(jnp.asarray(kernel.transpose(1, 2, 0).reshape(*size, m, n), jnp.float32))
    return kernels


def optimum(kernel: jax.Array, rank: int) -> float:
    """Return the smallest relative error that any rank can reach, by float64 SVD."""
    m, n = kernel.shape[-2:]
    matrices = np.asarray(kernel, np.float64).reshape(-1, m, n).transpose(2, 0, 1)
    squares = np.linalg.svd(matrices, compute_uv=False) ** 2
    return float(np.sqrt(squares[:, rank:].sum() / squares.sum()))


def timed(fit: Callable[[jax.Array], Any], kernels: Sequence[jax.Array]) -> tuple[float, list[Any]]:
    """Return the seconds for fitting all kernels one after the other, and the fits."""
    start = time.perf_counter()
    fitted = [jax.block_until_ready(fit(kernel)) for kernel in kernels]
    return time.perf_counter() - start, fitted


def memory(kernel: jax.Array, method: fj.Falcon) -> float:
    """Return the bytes of the exact fit's results and buffers over those of the kernel."""
    compiled = jax.jit(lambda kernel: fj.fit(kernel, method)).lower(kernel).compile()
    sizes: Any = compiled.memory_analysis()
    return (sizes.temp_size_in_bytes + sizes.output_size_in_bytes) / kernel.nbytes


def measure(kernels: Sequence[jax.Array], *, rank: int, steps: int, learning_rate: float) -> Any:
    """Fit every kernel by both solvers.

    Args:
        kernels: in the order of the network.
        rank: of FALCON.
        steps: of AdamW.
        learning_rate: of AdamW.

    Returns:
        One row for each shape of kernel, and totals.
    """
    method = fj.Falcon(rank=rank)
    settings = fj.AdamWSettings(steps=steps, learning_rate=learning_rate)
    adamw = jax.jit(lambda kernel: fj.fit(kernel, method, "adamw", settings=settings))
    shapes: dict[tuple[int, ...], list[jax.Array]] = {}
    for kernel in kernels:
        shapes.setdefault(kernel.shape, []).append(kernel)
    rows = []
    for shape, alike in shapes.items():
        spec = fj.ConvSpec.of_kernel(shape)
        jax.block_until_ready(fj.fit(alike[0], method))  # compile before timing
        passes = [timed(lambda kernel: fj.fit(kernel, method), alike) for _ in range(EXACT_PASSES)]
        exact_s, exact = statistics.median(seconds for seconds, _ in passes), passes[0][1]
        adamw_s, iterated = timed(adamw.lower(alike[0]).compile(), alike)

        def error(
            fits: list[Any], alike: list[jax.Array] = alike, spec: fj.ConvSpec = spec
        ) -> float:
            pairs = zip(alike, fits, strict=True)
            return max(float(fj.relative_error(k, method.kernel(p, spec))) for k, p in pairs)

        rows.append(
            {
                "kernel": "x".join(map(str, shape)),
                "layers": len(alike),
                "optimum": max(optimum(kernel, rank) for kernel in alike),
                "exact_error": error(exact),
                "adamw_error": error(iterated),
                "exact_s": exact_s,
                "adamw_s": adamw_s,
                "memory": memory(alike[0], method),
            }
        )
    exact_s, adamw_s = (sum(row[name] for row in rows) for name in ("exact_s", "adamw_s"))
    totals = {"exact_s": exact_s, "adamw_s": adamw_s, "times_faster": adamw_s / exact_s}
    sizes = {"x".join(map(str, shape)): alike[0].nbytes for shape, alike in shapes.items()}
    beside = max(row["memory"] * sizes[row["kernel"]] for row in rows)
    totals["peak_over_kernels"] = 1 + beside / sum(kernel.nbytes for kernel in kernels)
    return rows, totals


def main() -> None:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/fit.json"))
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--learning-rate", type=float, default=0.001)
    options = parser.parse_args()
    rows, totals = measure(
        kernels_of_vgg19(),
        rank=options.rank,
        steps=options.steps,
        learning_rate=options.learning_rate,
    )
    print(format_table(rows, COLUMNS))
    print(
        f"all kernels: exact {totals['exact_s']:.3f} s, AdamW {totals['adamw_s']:.1f} s, "
        f"{totals['times_faster']:.0f} times faster; peak memory {totals['peak_over_kernels']:.1f} "
        "times the kernels'"
    )
    write_json(
        options.out,
        {
            "command": f"python -m benchmarks.fit --rank {options.rank} --steps {options.steps} "
            f"--learning-rate {options.learning_rate}",
            "machine": describe_machine(),
            "rows": rows,
            "totals": totals,
        },
    )


if __name__ == "__main__":
    main()
