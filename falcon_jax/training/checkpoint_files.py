"""Checkpoints as directories: which are whole, and what happens to those that are not."""

import itertools
import pathlib
import re
import sys
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from falcon_jax.manifest import MANIFEST, check_manifest, write_manifest
from falcon_jax.wording import shown

DAMAGED = "damaged"


def set_damaged_aside(directory: pathlib.Path) -> None:
    """Move checkpoints whose files are not what was saved out of the way, naming them.

    A checkpoint has a manifest unless the run was killed right after saving it. One without is
    left to `Checkpoints`, which verifies its arrays.

    Args:
        directory: has a folder for every checkpoint, named by its step.
    """
    if jax.process_index() == 0:
        for folder in step_folders(directory):
            if (folder / MANIFEST).exists():
                try:
                    check_manifest(folder)
                except (ValueError, OSError) as error:
                    set_aside(folder, shown(error))
    wait_for_all(f"checked {directory}")


def step_folders(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield the folders of checkpoints, the newest first."""
    folders = directory.iterdir() if directory.is_dir() else ()
    named = [f for f in folders if f.is_dir() and re.fullmatch(r"\d+", f.name)]
    yield from sorted(named, key=lambda folder: int(folder.name), reverse=True)


def set_aside(folder: pathlib.Path, reason: str) -> None:
    """Move a damaged checkpoint out of the way and say so.

    Args:
        folder: of the checkpoint.
        reason: what is wrong with it.
    """
    aside = folder.parent.parent / DAMAGED
    aside.mkdir(parents=True, exist_ok=True)
    # One of the same step may be there from an earlier time; nothing is deleted.
    more = (f"{folder.name}.{number}" for number in itertools.count(2))
    names = itertools.chain([folder.name], more)
    place = next(aside / name for name in names if not (aside / name).exists())
    folder.rename(place)
    print(
        f"checkpoint {folder} is damaged and not used ({reason.rstrip('.')}); it is now {place}",
        file=sys.stderr,
        flush=True,
    )


def damaged_steps(directory: pathlib.Path) -> set[int]:
    """Return the steps of the checkpoints that were moved out of the way, now or before."""
    aside = directory.parent / DAMAGED
    names = [path.name for path in aside.iterdir()] if aside.is_dir() else []
    return {int(name.split(".")[0]) for name in names if re.fullmatch(r"\d+(\.\d+)?", name)}


def seal(folder: pathlib.Path) -> None:
    """Write the manifest of a checkpoint that was committed; one that is gone needs none."""
    if jax.process_index() == 0 and folder.is_dir() and not (folder / MANIFEST).exists():
        write_manifest(folder)


def wait_for_all(name: str) -> None:
    """Wait until every process of the run is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
