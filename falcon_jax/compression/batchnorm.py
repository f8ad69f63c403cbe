"""BatchNorm statistics estimated anew, for a network whose convolutions have just changed."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from falcon_jax.compression.nnx_tree import map_modules, named_modules


def reestimate_batchnorm(model: nnx.Module, batches: Iterable[Any]) -> nnx.Module:
    """Return a copy of a model with the BatchNorm statistics of the given batches.

    ``mean = average of the batches' means``, ``var = average of the batches' variances``. No labels
    are used, and nothing else changes. Dropout is off.

    Args:
        model: an NNX model; it is not changed.
        batches: model inputs of equal shape, a few hundred examples in all; a tuple is spread over
            the arguments.

    Returns:
        The copy, in evaluation mode.

    Raises:
        ValueError: if there is no batch.
    """
    copy = map_modules(lambda path, module: None, model)
    copy.eval()
    norms = {p: m for p, m in named_modules(copy) if isinstance(m, nnx.BatchNorm)}
    if not norms:
        return copy
    momenta = {path: norm.momentum for path, norm in norms.items()}
    for norm in norms.values():
        norm.use_running_average = False
        norm.momentum = 0.0  # statistics become those of the last batch
    graphdef, state = nnx.split(copy)

    @jax.jit
    def statistics(state: nnx.State, args: tuple[Any, ...]) -> nnx.State:
        merged = nnx.merge(graphdef, state)
        merged(*args)  # type: ignore[operator]
        return nnx.state(merged, nnx.BatchStat)

    total, count = None, 0
    for batch in batches:
        new = statistics(state, batch if isinstance(batch, tuple) else (batch,))
        total = new if total is None else jax.tree.map(jnp.add, total, new)
        count += 1
    if total is None:
        raise ValueError("BatchNorm statistics need at least one batch of inputs; got none.")
    nnx.update(copy, jax.tree.map(lambda s: s / count, total))
    for path, norm in norms.items():
        norm.momentum = momenta[path]
    copy.eval()
    return copy
