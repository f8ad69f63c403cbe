"""All devices at work on one batch, those of other processes included.

``jit``: one global-view step; the batch is split over a ``data`` axis, the state is on every
device, XLA inserts the all-reduce of the gradients. ``pmap``: the step written for one replica,
mapped over the devices, with the all-reduces spelled out.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray

from falcon_jax.training.network import Network
from falcon_jax.training.replicas import AXIS, for_replicas
from falcon_jax.training.step import Metrics, Preprocessing, TrainState, TrainStep, make_train_step

Parallel = Literal["jit", "pmap"]
BatchNormScope = Literal["synchronised", "per_replica"]
PARALLEL: tuple[Parallel, ...] = ("jit", "pmap")
BATCHNORM: tuple[BatchNormScope, ...] = ("synchronised", "per_replica")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    """How the devices share a batch.

    Attributes:
        parallel: ``jit`` or ``pmap``.
        batchnorm: ``synchronised``, over the whole batch; or ``per_replica`` (ghost), over the rows
            of each device, whose running statistics are averaged.
    """

    parallel: Parallel = "jit"
    batchnorm: BatchNormScope = "synchronised"


def data_mesh() -> Mesh:
    """Return a mesh of all devices of all processes along one axis, ``data``."""
    return jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Return a tree of arrays, each whole on every device.

    Args:
        tree: of arrays, the same in every process.
        mesh: the devices.
    """
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Return a batch split over the devices along its leading axis.

    Args:
        batch: the rows of this process: all of them, or the share that its place among the
            processes gives it.
        mesh: the devices.
    """
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    return {n: jax.make_array_from_process_local_data(sharding, a) for n, a in batch.items()}


def process_shard() -> tuple[int, int]:
    """Return this process's place among all, and how many there are."""
    return jax.process_index(), jax.process_count()


def shared_batch_size(batch_size: int, mesh: Mesh) -> int:
    """Return the next batch size that the devices can share evenly, for padded batches."""
    return -(-batch_size // mesh.size) * mesh.size


def check_divides(name: str, batch_size: int, mesh: Mesh, *, accumulate: int = 1) -> None:
    """Raise unless the devices can share a batch, in so many parts, evenly.

    Raises:
        ValueError: naming the setting, and the nearest batch sizes that can be shared.
    """
    parts = mesh.size * accumulate
    if batch_size % parts:
        low = batch_size // parts * parts
        fits = f"{low + parts}" if low == 0 else f"{low} or {low + parts}"
        in_parts = f" in {accumulate} parts" if accumulate > 1 else ""
        raise ValueError(
            f"{name} {batch_size} cannot be shared evenly by {mesh.size} devices{in_parts}; use "
            f"{fits}"
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
        return _spread()(_local(state)) if self.mapped else state

    def gather(self, state: TrainState) -> TrainState:
        """Return a state of `step`, whole on every device, for evaluation and checkpoints."""
        if not self.mapped:
            return state
        first = jax.tree.map(lambda array: np.asarray(array.addressable_shards[0].data)[0], state)
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
    return jax.tree.map(lambda array: np.asarray(array.addressable_shards[0].data), state)


@functools.cache
def _spread() -> Any:
    return jax.pmap(lambda state: state, in_axes=None, axis_size=jax.local_device_count())
