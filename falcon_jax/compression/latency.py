"""Latency of a forward pass, measured."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn
from flax import nnx

from falcon_jax.compression.inputs import Inputs
from falcon_jax.compression.linen_layers import applied


def measure_latency(
    model: nnx.Module | nn.Module,
    sample: Any,
    variables: Mapping[str, Any] | None = None,
    *,
    repeats: int = 10,
) -> float:
    """Return the median time of a compiled forward pass.

    NNX models run in evaluation mode. Linen modules run as the sample says, for example
    ``Inputs(x, train=False)``.

    Args:
        model: any NNX model or Linen module; it is not changed.
        sample: input with a leading batch axis; a tuple is spread over the arguments.
        variables: of a Linen module.
        repeats: passes that are timed, after two that are not.

    Returns:
        Milliseconds for the whole batch.

    Raises:
        ValueError: if a Linen module comes without variables.
    """
    inputs = Inputs.of(sample)
    if isinstance(model, nnx.Module):
        model = nnx.clone(model)
        model.eval()
        graphdef, state = nnx.split(model)

        def forward(state: Any, arrays: list[Any]) -> Any:
            return inputs.with_arrays(arrays).call(nnx.merge(graphdef, state))  # type: ignore[arg-type]

    else:
        if variables is None:
            raise ValueError("the latency of a Linen module needs its variables.")
        module, state = model, variables

        def forward(state: Any, arrays: list[Any]) -> Any:
            return inputs.with_arrays(arrays).call(
                lambda *args, **kwargs: applied(module, state, *args, **kwargs)
            )

    compiled = jax.jit(forward)
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        jax.block_until_ready(compiled(state, inputs.arrays))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[2:])
