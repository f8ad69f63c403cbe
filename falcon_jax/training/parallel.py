"""A mesh of all devices, those of other processes included, and arrays on it."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from falcon_jax.training.replicas import AXIS


def data_mesh() -> Mesh:
    """Return a mesh of all devices of all processes along one axis, ``data``."""
    return jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Return a tree of arrays, each whole on every device.

    Args:
        tree: of arrays, the same in every process.
        mesh: the devices.
    """
    # From the host, as devices of other processes cannot be reached from ours.
    leaves, structure = jax.tree.flatten(tree)
    whole = jax.device_put(jax.device_get(leaves), NamedSharding(mesh, PartitionSpec()))
    return jax.tree.unflatten(structure, whole)


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
