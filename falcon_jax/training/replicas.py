"""A training step seen from one of several replicas, each with its own rows of a batch.

Under ``jax.pmap`` or ``jax.shard_map`` a network sees only its replica's rows. What is random is
drawn for the whole batch, of which a replica takes its part, so that the result does not depend
on the number of replicas.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Shaped

from falcon_jax.compression.nnx_tree import map_modules

AXIS = "data"


def own_rows(whole: Shaped[Array, "batch *rest"]) -> Shaped[Array, "rows *rest"]:
    """Return this replica's rows of an array for the whole batch; inside a mapped step only.

    Args:
        whole: one row for every example of the batch, the same on every replica.
    """
    rows = len(whole) // lax.axis_size(AXIS)
    return lax.dynamic_slice_in_dim(whole, lax.axis_index(AXIS) * rows, rows)


def for_replicas(model: nnx.Module, *, synchronised: bool) -> nnx.Module:
    """Return a copy of a model that may be called inside a mapped step.

    Args:
        model: an NNX model; it is not changed.
        synchronised: whether BatchNorm normalises by the statistics of the whole batch; if not, by
            those of the replica's rows.
    """

    def visit(path: str, module: nnx.Module) -> nnx.Module | None:
        if isinstance(module, nnx.BatchNorm) and synchronised:
            module.axis_name = AXIS
        if type(module) is nnx.Dropout:
            return ReplicaDropout(module)
        return None

    return map_modules(visit, model)


class ReplicaDropout(nnx.Dropout):
    """Dropout whose mask is this replica's part of the mask of the whole batch.

    Args:
        dropout: its rate, streams and the rest are taken over.
    """

    def __init__(self, dropout: nnx.Dropout):
        super().__init__(
            dropout.rate,
            broadcast_dims=dropout.broadcast_dims,
            deterministic=dropout.deterministic,
            rng_collection=dropout.rng_collection,
        )
        self.rngs = dropout.rngs

    def __call__(self, inputs: Float[Array, "rows *rest"]) -> Float[Array, "rows *rest"]:
        """Return the inputs, some of them 0 and the others scaled up."""
        if self.deterministic or self.rate == 0:
            return inputs
        whole = (inputs.shape[0] * lax.axis_size(AXIS), *inputs.shape[1:])
        factors = super().__call__(jnp.ones(whole, inputs.dtype))
        return inputs * own_rows(factors)


def mean_over_replicas(tree: Any) -> Any:
    """Return the mean of every array over the replicas; inside a mapped step only."""
    return jax.tree.map(lambda array: lax.pmean(array, AXIS), tree)
