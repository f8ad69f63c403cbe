"""How well a network does on a split: the evaluation step, and its sums over the split."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from falcon_jax.data.augmentation import normalize
from falcon_jax.data.batching import eval_batches
from falcon_jax.data.dataset import AnySplit
from falcon_jax.training.devices import process_shard, shard_batch, shared_batch_size
from falcon_jax.training.network import Arrays, Network
from falcon_jax.training.step import Batch, Metrics, Preprocessing, cross_entropy


@functools.lru_cache(maxsize=32)  # the networks of a comparison, which come again with every seed
def make_eval_step(
    network: Network, preprocessing: Preprocessing
) -> Callable[[Arrays, Arrays, Batch], Metrics]:
    """Return the jitted step ``(params, statistics, batch) -> sums``.

    Args:
        network: structure of the model.
        preprocessing: of the images; there is no augmentation.

    Returns:
        The jitted step. Its sums over the examples whose ``mask`` is 1: ``loss``, ``top1``,
        ``top5`` (correct among the five best, or among all classes if they are fewer), ``count``.
    """

    def eval_step(params: Arrays, statistics: Arrays, batch: Batch) -> Metrics:
        x = normalize(batch["image"], preprocessing.mean, preprocessing.std)
        logits = network.apply(params, statistics, x)
        labels, mask = batch["label"], batch["mask"]
        own = jnp.take_along_axis(logits, labels[:, None], axis=1)
        better = (logits > own).sum(axis=1)
        earlier = jnp.arange(logits.shape[1])[None, :] < labels[:, None]
        rank = better + ((logits == own) & earlier).sum(axis=1)
        # Comparisons with NaN are false; without this a diverged network would be perfect.
        rank = jnp.where(jnp.isfinite(logits).all(axis=1), rank, logits.shape[1] + 5)
        return {
            "loss": jnp.where(mask > 0, cross_entropy(logits, labels), 0).sum(),
            "top1": ((rank < 1) * mask).sum(),
            "top5": ((rank < 5) * mask).sum(),
            "count": mask.sum(),
        }

    return jax.jit(eval_step)


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
        batch_size: images per step, rounded up to what the devices can share; the last batch is
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
