"""The machine that a measurement was made on."""

import os
import platform
from pathlib import Path

import jax
import numpy as np


def describe_machine() -> dict[str, str | int]:
    """Say what a measurement ran on: processor, cores, devices, versions.

    Returns:
        "cpu", "cores" (those this process may use), "devices" (JAX's), "python", "jax" and
        "numpy" (versions).
    """
    devices = jax.devices()
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
