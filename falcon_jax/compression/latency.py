"""Latency of a forward pass, measured."""

import statistics
import time
from typing import Any

import jax
from flax import nnx


def measure_latency(model: nnx.Module, sample: Any, *, repeats: int = 10) -> float:
    """Return the median time of a compiled forward pass in evaluation mode.

    Args:
        model: any NNX model; it is not changed.
        sample: input with a leading batch axis; a tuple is spread over the arguments.
        repeats: passes that are timed, after two that are not.

    Returns:
        Milliseconds for the whole batch.
    """
    model = nnx.clone(model)
    model.eval()
    graphdef, state = nnx.split(model)
    args = sample if isinstance(sample, tuple) else (sample,)

    @jax.jit
    def forward(state: nnx.State, args: tuple[Any, ...]) -> Any:
        return nnx.merge(graphdef, state)(*args)  # type: ignore[operator]

    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        jax.block_until_ready(forward(state, args))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[2:])
