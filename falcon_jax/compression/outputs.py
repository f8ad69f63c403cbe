"""How far a model's outputs are from those of another."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from falcon_jax.frameworks.layers import Inputs
from falcon_jax.frameworks.program import Network, Program


class OutputLoss:
    """``E ||f - f'||^2 / E ||f - E f||^2`` of outputs f' for f, the mean of several outputs.

    Args:
        wanted: outputs f, batch by batch.

    Raises:
        ValueError: if there are no floating-point outputs.
    """

    def __init__(self, wanted: Iterable[Sequence[Array]]):
        self._wanted = [list(outputs) for outputs in wanted]
        self._spread = [_spread(batches) for batches in zip(*self._wanted, strict=True)]
        if not self._spread:
            raise ValueError("the model gives no floating-point output to compare.")

    def __call__(self, given: Iterable[Sequence[Array]]) -> float:
        """Return the loss of outputs f', batch by batch."""
        far = [0.0] * len(self._spread)
        for wanted, found in zip(self._wanted, given, strict=True):
            for i, (y, z) in enumerate(zip(wanted, found, strict=True)):
                far[i] += float(_squares(y, z))
        return sum(a / (b or 1.0) for a, b in zip(far, self._spread, strict=True)) / len(far)


def floating_outputs(program: Program) -> list[Any]:
    """Return the variables of a program's floating-point outputs."""
    return [v for v in program.outputs if jnp.issubdtype(v.aval.dtype, jnp.floating)]


def outputs_of(
    network: Network, batches: Iterable[Inputs], values: Mapping[str, Array] | None = None
) -> Iterator[list[Array]]:
    """Yield a model's floating-point outputs in evaluation mode, batch by batch.

    Args:
        network: the model, taken apart.
        batches: its inputs.
        values: of its variables, in place of its own.
    """
    programs: list[tuple[Inputs, Program]] = []
    for batch in batches:
        shapes = batch.shapes
        program = next((known for like, known in programs if like == shapes), None)
        if program is None:
            program = network.program(shapes, ())
            programs.append((shapes, program))
        yield program.compute(floating_outputs(program), program.start(batch.arrays), values)


@jax.jit
def _squares(wanted: Array, given: Array) -> Array:
    return jnp.sum(jnp.square((given - wanted).astype(jnp.float32)))


def _spread(batches: Sequence[Array]) -> float:
    """Return ``sum ||f - E f||^2`` of an output, E over all axes but the last."""
    flat = [y.astype(jnp.float32).reshape(-1, y.shape[-1] if y.ndim else 1) for y in batches]
    mean = sum(y.sum(0) for y in flat) / sum(y.shape[0] for y in flat)
    return float(sum(_squares(y, jnp.broadcast_to(mean, y.shape)) for y in flat))
