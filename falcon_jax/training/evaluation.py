"""Evaluation that counts every example exactly once."""

import dataclasses
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from falcon_jax.data.batching import eval_batches
from falcon_jax.data.dataset import AnySplit
from falcon_jax.training.network import Arrays
from falcon_jax.training.parallel import shard_batches, shared_batch_size
from falcon_jax.training.step import Batch, Metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How well a network does on a split.

    Attributes:
        loss: mean cross entropy.
        top1: share of examples whose class is the best guess.
        top5: share of examples whose class is among the five best guesses.
        count: number of examples.
    """

    loss: float
    top1: float
    top5: float
    count: int


def evaluate(
    eval_step: Callable[[Arrays, Arrays, Batch], Metrics],
    params: Arrays,
    statistics: Arrays,
    split: AnySplit,
    *,
    batch_size: int,
    mesh: Mesh,
) -> Evaluation:
    """Evaluate a network on a whole split.

    Args:
        eval_step: of the network.
        params: parameters by path.
        statistics: BatchNorm statistics by path.
        split: images and labels.
        batch_size: images a step, rounded up to what the devices can share; the last batch is
            padded and masked.
        mesh: the devices.

    Returns:
        Means over the split.
    """
    total = None
    batches = eval_batches(split, shared_batch_size(batch_size, mesh))
    for batch in shard_batches(batches, mesh):
        sums = eval_step(params, statistics, batch)
        total = sums if total is None else jax.tree.map(lambda a, b: a + b, total, sums)
    assert total is not None
    count = float(total["count"])
    return Evaluation(
        loss=float(total["loss"]) / count,
        top1=float(total["top1"]) / count,
        top5=float(total["top5"]) / count,
        count=round(count),
    )
