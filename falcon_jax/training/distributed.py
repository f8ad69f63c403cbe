"""Several processes, on one machine or on many, that train one network together."""

import os
from collections.abc import Mapping

import jax

MODES = ("auto", "on", "off")
# How many processes a launcher has started, as it tells each of them.
_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "JAX_NUM_PROCESSES")


def start_distributed(
    mode: str,
    *,
    coordinator: str = "",
    processes: int = 0,
    process: int = -1,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Join the other processes, before anything asks JAX for its devices.

    Args:
        mode: ``off``; ``on``; or ``auto``: on if a coordinator is given, or the environment is that
            of several processes that Slurm or Open MPI started.
        coordinator: address of process 0, ``host:port``; found by JAX itself on clusters that it
            knows (Slurm, Open MPI, Kubernetes, Cloud TPU) if empty.
        processes: how many there are; with ``coordinator``.
        process: number of this one, from 0; with ``coordinator``.
        environment: variables that launchers set.

    Raises:
        ValueError: if only some of the three are given, or JAX cannot find the others.
    """
    if mode not in MODES:
        raise ValueError(f"--distributed must be one of {', '.join(MODES)}, but is {mode!r}")
    given = (bool(coordinator), processes > 0, process >= 0)
    if any(given) and not all(given):
        raise ValueError("give --coordinator, --processes and --process together")
    if process >= max(processes, 0) and all(given):
        raise ValueError(f"--process runs from 0 to {processes - 1}, but is {process}")
    launched = any(int(environment.get(name) or 1) > 1 for name in _COUNTS)
    if mode == "off" or (mode == "auto" and not (all(given) or launched)):
        return
    try:
        if all(given):
            jax.distributed.initialize(coordinator, processes, process)
        else:
            jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the processes of this run could not find each other ({reason}); give --coordinator, "
            "--processes and --process to each, or --distributed=off to train with this one alone"
        ) from None
