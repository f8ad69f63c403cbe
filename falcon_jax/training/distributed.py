"""Several processes, on one machine or on many, that train one network together."""

import dataclasses
import os
import socket
from collections.abc import Mapping
from typing import Any

import jax

from falcon_jax.wording import reason, shown

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
