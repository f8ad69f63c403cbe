"""A training step on all devices."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import PRNGKeyArray

from falcon_jax.training.devices import AXIS, for_replicas, replicate, shard_batch
from falcon_jax.training.network import Arrays, Network
from falcon_jax.training.step import (
    Metrics,
    Preprocessing,
    Teacher,
    TeacherArrays,
    TrainState,
    TrainStep,
    make_train_step,
)

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ParallelStep:
    """A training step on the devices.

    Between steps the state has a form of its own: `place` and `gather` lead there and back.
    """

    mesh: Mesh
    mapped: bool
    _step: Any

    def place(self, state: TrainState) -> TrainState:
        """Return a state, whole on every device, in the form that a step takes."""
        return _spread(_local(state)) if self.mapped else state

    def gather(self, state: TrainState) -> TrainState:
        """Return a state of this form, whole on every device, for evaluation and checkpoints."""
        if not self.mapped:
            return state
        first = jax.tree.map(lambda array: array[0], _local(state))
        return replicate(first, self.mesh)

    def place_teacher(self, params: Arrays, statistics: Arrays) -> TeacherArrays:
        """Return a teacher's parameters and statistics in the form that a step takes."""
        whole = replicate({"params": params, "statistics": statistics}, self.mesh)
        return _spread(_local(whole)) if self.mapped else whole

    def __call__(
        self,
        state: TrainState,
        batch: Mapping[str, np.ndarray],
        key: PRNGKeyArray,
        teacher: TeacherArrays | None = None,
    ) -> tuple[TrainState, Metrics]:
        """Take a step with this process's rows of a batch; the old state is gone afterwards."""
        if not self.mapped:
            return self._step(state, shard_batch(batch, self.mesh), key, teacher or {})
        devices = jax.local_device_count()
        rows = {n: a.reshape(devices, len(a) // devices, *a.shape[1:]) for n, a in batch.items()}
        return self._step(state, rows, key, teacher or {})


@functools.lru_cache(maxsize=32)  # the networks of a comparison, which come again with every seed
def make_parallel_step(
    network: Network,
    optimizer: optax.GradientTransformation,
    preprocessing: Preprocessing,
    mesh: Mesh,
    *,
    parallel: str,
    batchnorm: str,
    label_smoothing: float,
    accumulate: int = 1,
    teacher: Teacher | None = None,
) -> ParallelStep:
    """Return the training step of a network, compiled for the devices.

    Args:
        network: structure of the model.
        optimizer: updates the parameters.
        preprocessing: of the images.
        mesh: the devices.
        parallel: ``jit`` or ``pmap``.
        batchnorm: ``synchronised`` or ``per_replica``.
        label_smoothing: as in `make_train_step`.
        accumulate: as in `make_train_step`.
        teacher: likewise.
    """
    whole_batch = parallel == "jit" and batchnorm == "synchronised"
    if not whole_batch:
        network = _for_replicas(network, synchronised=batchnorm == "synchronised")
    step: TrainStep = make_train_step(
        network,
        optimizer,
        preprocessing,
        label_smoothing=label_smoothing,
        accumulate=accumulate,
        replicated=not whole_batch,
        teacher=teacher,
    )
    if parallel == "pmap":
        mapped = jax.pmap(step, AXIS, in_axes=(0, 0, None, 0), out_axes=(0, None), donate_argnums=0)
        return ParallelStep(mesh, True, mapped)
    if not whole_batch:
        every, split = PartitionSpec(), PartitionSpec(AXIS)
        # Unchecked: else gradients of what every replica has are summed before we average them.
        step = jax.shard_map(
            step, mesh=mesh, in_specs=(every, split, every, every), out_specs=every, check_vma=False
        )
    return ParallelStep(mesh, False, jax.jit(step, donate_argnums=0))


def _for_replicas(network: Network, *, synchronised: bool) -> Network:
    return network.changed(lambda model: for_replicas(model, synchronised=synchronised))


def _local(state: T) -> T:
    return jax.tree.map(lambda array: array.addressable_shards[0].data, state)


def _spread(state: T) -> T:
    """Return arrays with one copy for every device, along a new leading axis."""
    # pmap wants something to map over.
    devices = np.arange(jax.local_device_count())
    return jax.pmap(lambda _, state: state, in_axes=(0, None))(devices, state)
