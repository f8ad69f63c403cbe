"""All devices of the machine at work on one batch.

One global-view jitted step: the batch is split over a ``data`` axis, the state is on every device.
XLA inserts the all-reduce of the gradients, and BatchNorm statistics are those of the whole batch.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def data_mesh() -> Mesh:
    """Return a mesh of all devices along one axis, ``data``."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Return a tree of arrays, each whole on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Return a batch split over the devices along its leading axis."""
    return jax.device_put(dict(batch), NamedSharding(mesh, PartitionSpec("data")))


def shard_batches(
    batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh
) -> Iterator[dict[str, jax.Array]]:
    """Yield batches split over the devices."""
    return (shard_batch(batch, mesh) for batch in batches)


def shared_batch_size(batch_size: int, mesh: Mesh) -> int:
    """Return the next batch size that the devices can share evenly, for padded batches."""
    return -(-batch_size // mesh.size) * mesh.size


def check_divides(name: str, batch_size: int, mesh: Mesh) -> None:
    """Raise unless the devices can share a batch evenly.

    Raises:
        ValueError: naming the setting, and the nearest batch sizes that can be shared.
    """
    devices = mesh.size
    if batch_size % devices:
        low = batch_size // devices * devices
        fits = f"{low + devices}" if low == 0 else f"{low} or {low + devices}"
        raise ValueError(
            f"{name} {batch_size} cannot be shared evenly by {devices} devices; use {fits}"
        )
