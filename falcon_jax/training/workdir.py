"""One folder, one experiment, one run at a time: a lock, and the config kept and compared."""

import contextlib
import fcntl
import json
import os
import pathlib
import platform
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from falcon_jax.paths import read_json
from falcon_jax.report.table import write_json
from falcon_jax.wording import shown

# Fields that say where the data is, what to run or what to show, and change no result.
_FREE = ("log.", "compression.only", "data.data_dir", "data.workers", "checkpoint.")


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Keep other runs out of a folder, for as long as the process lives or the context lasts.

    Of the processes of one run, the first holds the lock.

    Args:
        workdir: made if missing.

    Raises:
        BlockingIOError: if another process works there.
        OSError: if the folder cannot be written to.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    if jax.process_index() > 0:
        yield
        return
    with (workdir / ".lock").open("a+", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = shown(file.read(1000), 100) or "another process"
            raise BlockingIOError(
                f"{holder} works in {workdir}; wait for it or stop it, or give another --workdir"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def claim_workdir(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Keep the config of an experiment in its folder, or compare it with the one kept there.

    Args:
        workdir: made if missing.
        config: plain data.

    Raises:
        ValueError: if the folder holds another experiment, listing the fields that differ.
        OSError: if the folder cannot be written to.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "config.json"
    config = json.loads(json.dumps(config))
    if path.exists():
        kept = read_json(path)
        if not isinstance(kept, dict):
            raise ValueError(f"{path} holds no config; give another --workdir")
        differences = list(_differences(kept, config))
        if differences:
            raise ValueError(
                f"{workdir} holds an experiment with another config ({_some(differences)}); "
                "give another --workdir, or the config that it has"
            )
    if jax.process_index() == 0:
        write_json(path, config)


def _differences(kept: Any, given: Any, name: str = "") -> Iterator[str]:
    if name.startswith(_FREE):
        return
    if isinstance(kept, Mapping) and isinstance(given, Mapping):
        for field in [*kept, *(f for f in given if f not in kept)]:
            dotted = f"{name}.{field}" if name else field
            yield from _differences(kept.get(field), given.get(field), dotted)
    elif kept != given:
        yield f"{shown(name, 100)}: {_value(kept)} there, {_value(given)} given"


def _value(value: Any) -> str:
    return shown(repr(value), 100)


def _some(differences: list[str], most: int = 20) -> str:
    more = [f"and {len(differences) - most} more"] if len(differences) > most else []
    return "; ".join([*differences[:most], *more])
