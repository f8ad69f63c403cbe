"""All devices at work on one batch: steps of training, and evaluation."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import PRNGKeyArray

from falcon_jax.data.batching import eval_batches
from falcon_jax.data.dataset import AnySplit
from falcon_jax.training.devices import (
    AXIS,
    for_replicas,
    process_shard,
    replicate,
    shard_batch,
    shared_batch_size,
)
from falcon_jax.training.network import Arrays, Network
from falcon_jax.training.run import ParallelSettings
from falcon_jax.training.step import (
    Batch,
    Metrics,
    Preprocessing,
    TrainState,
    TrainStep,
    make_train_step,
)


@dataclasses.dataclass(frozen=True)
class Execution:
    """A training step on the devices.

    Between steps the state has a form of its own: `place` and `gather` lead there and back.
    """

    mesh: Mesh
    mapped: bool
    _step: Any

    def place(self, state: TrainState) -> TrainState:
        """Return a state, whole on every device, in the form that `step` takes."""
        return _spread(_local(state)) if self.mapped else state

    def gather(self, state: TrainState) -> TrainState:
        """Return a state of `step`, whole on every device, for evaluation and checkpoints."""
        if not self.mapped:
            return state
        first = jax.tree.map(lambda array: array[0], _local(state))
        return replicate(first, self.mesh)

    def step(
        self, state: TrainState, batch: Mapping[str, np.ndarray], key: PRNGKeyArray
    ) -> tuple[TrainState, Metrics]:
        """Take a step with this process's rows of a batch; the old state is gone afterwards."""
        if not self.mapped:
            return self._step(state, shard_batch(batch, self.mesh), key)
        devices = jax.local_device_count()
        rows = {n: a.reshape(devices, len(a) // devices, *a.shape[1:]) for n, a in batch.items()}
        return self._step(state, rows, key)


@functools.lru_cache(maxsize=32)  # the networks of a comparison, which come again with every seed
def make_execution(
    network: Network,
    optimizer: optax.GradientTransformation,
    preprocessing: Preprocessing,
    settings: ParallelSettings,
    mesh: Mesh,
    *,
    label_smoothing: float,
    accumulate: int = 1,
) -> Execution:
    """Return the training step of a network, compiled for the devices.

    Args:
        network: structure of the model.
        optimizer: updates the parameters.
        preprocessing: of the images.
        settings: how the devices share a batch.
        mesh: the devices.
        label_smoothing: as in `make_train_step`.
        accumulate: as in `make_train_step`.
    """
    whole_batch = settings.parallel == "jit" and settings.batchnorm == "synchronised"
    if not whole_batch:
        network = _for_replicas(network, synchronised=settings.batchnorm == "synchronised")
    step: TrainStep = make_train_step(
        network,
        optimizer,
        preprocessing,
        label_smoothing=label_smoothing,
        accumulate=accumulate,
        replicated=not whole_batch,
    )
    if settings.parallel == "pmap":
        mapped = jax.pmap(step, AXIS, in_axes=(0, 0, None), out_axes=(0, None), donate_argnums=0)
        return Execution(mesh, True, mapped)
    if not whole_batch:
        every, split = PartitionSpec(), PartitionSpec(AXIS)
        # Unchecked: else gradients of what every replica has are summed before we average them.
        step = jax.shard_map(
            step, mesh=mesh, in_specs=(every, split, every), out_specs=every, check_vma=False
        )
    return Execution(mesh, False, jax.jit(step, donate_argnums=0))


def _for_replicas(network: Network, *, synchronised: bool) -> Network:
    return network.changed(lambda model: for_replicas(model, synchronised=synchronised))


def _local(state: TrainState) -> TrainState:
    return jax.tree.map(lambda array: array.addressable_shards[0].data, state)


def _spread(state: TrainState) -> TrainState:
    """Return a state with one copy for every device, along a new leading axis."""
    # pmap wants something to map over.
    devices = np.arange(jax.local_device_count())
    return jax.pmap(lambda _, state: state, in_axes=(0, None))(devices, state)


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
