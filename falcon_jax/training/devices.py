"""All devices at work: processes, a mesh, and a step seen from one of several replicas."""

import dataclasses
import os
import socket
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Shaped

from falcon_jax.frameworks.nnx_tree import map_modules
from falcon_jax.wording import reason, shown

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


_HEARTBEAT = 60  # seconds without one after which a process counts as dead
MODES = ("auto", "on", "off")
# How many processes a launcher has started, as it tells each of them.
_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "JAX_NUM_PROCESSES")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peers:
    """The processes of a run, as the command line and the launcher have them.

    Attributes:
        mode: ``off``; ``on``; or ``auto``: on if a coordinator is given, or the environment is that
            of several processes that Slurm or Open MPI started.
        coordinator: address of process 0, ``host:port``; found by JAX itself on clusters that it
            knows (Slurm, Open MPI, Kubernetes, Cloud TPU) if empty.
        processes: how many there are; with ``coordinator``.
        process: number of this one, from 0; with ``coordinator``.
        launched: whether a launcher has started several.

    Raises:
        ValueError: if only some of the three are given, or they do not fit together.
    """

    mode: str = "auto"
    coordinator: str = ""
    processes: int = 0
    process: int = -1
    launched: bool = False

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(
                f"--distributed must be one of {', '.join(MODES)}, but is {self.mode!r}"
            )
        given = (bool(self.coordinator), self.processes > 0, self.process >= 0)
        if any(given) and not all(given):
            raise ValueError("give --coordinator, --processes and --process together")
        if all(given) and self.process >= self.processes:
            raise ValueError(
                f"--process runs from 0 to {self.processes - 1}, but is {self.process}"
            )
        if self.coordinator:
            _host_and_port(self.coordinator)

    @property
    def several(self) -> bool:
        """Whether this process is to join others."""
        return self.mode == "on" or (
            self.mode == "auto" and (bool(self.coordinator) or self.launched)
        )


def launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether a launcher has started several processes.

    Raises:
        ValueError: if what it says of their number is no number.
    """
    for name in _COUNTS:
        count = environment.get(name) or "1"
        if not count.isdecimal():
            raise ValueError(
                f"the environment's {name} must be a number, but is {shown(count, 40)}"
            )
        if int(count) > 1:
            return True
    return False


def start_distributed(peers: Peers) -> None:
    """Join the other processes, if there are any, before anything asks JAX for its devices.

    The coordinator listens at the address that it was given, and at no other.

    Args:
        peers: who they are.

    Raises:
        ValueError: if they cannot find each other, or the coordinator's port is taken.
    """
    if not peers.several:
        return
    if peers.process == 0:
        _check_free(peers.coordinator)
    given: dict[str, Any] = {}
    if peers.coordinator:
        given = {
            "coordinator_address": peers.coordinator,
            "coordinator_bind_address": peers.coordinator,
            "num_processes": peers.processes,
            "process_id": peers.process,
        }
    try:
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=_HEARTBEAT)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the processes of this run could not find each other ({reason(error)}); give "
            "--coordinator, --processes and --process to each, or --distributed=off to train with "
            "this one alone"
        ) from None


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(
            f"--coordinator is host:port, such as localhost:12345, but is {shown(address, 80)}"
        )
    return host.strip("[]"), int(port)


def _check_free(coordinator: str) -> None:
    """Raise unless this machine can listen at an address; C++ would end the process."""
    host, port = _host_and_port(coordinator)
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(kind, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ValueError(
            f"process 0 cannot listen at --coordinator={shown(coordinator, 80)} "
            f"({error.strerror}); give an address of its own machine and a port that is free"
        ) from None
