"""Evaluation that counts every example exactly once."""

import contextlib
import dataclasses
from collections.abc import Callable

from jax.sharding import Mesh

from falcon_jax.data.batching import eval_batches
from falcon_jax.data.dataset import AnySplit
from falcon_jax.training.network import Arrays
from falcon_jax.training.parallel import process_shard, shard_batch, shared_batch_size
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
    advance: Callable[[int], None] = lambda images: None,
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
        advance: called with the number of this process's images of every step.

    Returns:
        Means over the split.
    """
    steps = []
    size = shared_batch_size(batch_size, mesh)
    with contextlib.closing(eval_batches(split, size, shard=process_shard())) as batches:
        for batch in batches:
            steps.append(eval_step(params, statistics, shard_batch(batch, mesh)))
            advance(int(batch["mask"].sum()))
    # Summed in float64, so that counts stay exact.
    total = {name: sum(float(sums[name]) for sums in steps) for name in steps[0]}
    count = total["count"]
    return Evaluation(
        loss=total["loss"] / count,
        top1=total["top1"] / count,
        top5=total["top5"] / count,
        count=round(count),
    )
