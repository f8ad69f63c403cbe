"""Checkpoints of a training run, with Orbax, verified when they are read."""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from falcon_jax.paths import user_path
from falcon_jax.storage.directories import (
    MANIFEST,
    array_digest,
    check_manifest,
    data_digest,
    write_manifest,
)
from falcon_jax.training.interruption import Stopped
from falcon_jax.training.network import Arrays
from falcon_jax.training.step import TrainState
from falcon_jax.wording import reason, some_of

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
                    set_aside(folder, reason(error, 1000))
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


_NO_SCORE = -1.0  # below every share and every epoch's number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Best:
    """The best checkpoint of a run so far: its step and its score."""

    step: int
    score: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestModel:
    """What `Checkpoints.restore_best_model` found.

    Attributes:
        arrays: parameters and BatchNorm statistics, by path.
        step: of the checkpoint.
        note: a sentence for the report if the best checkpoint could not be used; None if it was.
    """

    arrays: tuple[Arrays, Arrays]
    step: int
    note: str | None = None


class Checkpoints:
    """The checkpoints of one run: the latest and the best.

    Each holds the model's arrays, the optimizer's state, a dictionary of plain data (``meta``) and
    a digest of every array. Saving goes on in the background; `close` waits for it. A checkpoint
    that is damaged is moved out of the way, told on stderr, and the one before is used.

    Args:
        directory: where they are; made if missing.
        keep: how many of the latest to keep beside the best.

    Raises:
        Stopped: if there can be no checkpoints there.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 2):
        self._directory = user_path(directory).absolute()
        self._unsealed: int | None = None
        self._failed = False
        self._best: Best | None = None
        best = preservation_policy.BestN(get_metric_fn=_score, n=1)
        latest = preservation_policy.LatestN(n=keep)
        try:
            # Before Orbax: its threads would wait for a folder that cannot be made.
            self._directory.mkdir(parents=True, exist_ok=True)
            set_damaged_aside(self._directory)
            self._manager = ocp.CheckpointManager(
                self._directory,
                item_handlers={
                    "model": ocp.StandardCheckpointHandler(),
                    "optimizer": ocp.StandardCheckpointHandler(),
                    "meta": ocp.JsonCheckpointHandler(),
                },
                options=ocp.CheckpointManagerOptions(
                    best_fn=_score,
                    best_mode="max",
                    preservation_policy=preservation_policy.AnyPreservationPolicy([latest, best]),
                ),
            )
        except Exception as error:  # of what is in the way there: anything
            raise Stopped(
                f"{self._directory} cannot be used as a folder of checkpoints ({reason(error)}); "
                "move away what is in the way, and the same command goes on"
            ) from error

    def save(self, state: TrainState, meta: dict[str, Any], *, score: float | None) -> None:
        """Save a state.

        Args:
            state: after ``state.step`` steps; an earlier checkpoint of the same step is replaced.
            meta: plain data, JSON.
            score: the checkpoint with the highest one is the best; None within an epoch.

        Raises:
            Stopped: if the one before could not be saved.
        """
        self.wait()
        step = int(state.step)
        if not self._directory.is_dir():
            raise self._stopped(step, FileNotFoundError("the folder is gone"))
        if step in self._manager.all_steps():
            self._manager.delete(step)
        model, optimizer = _items(state)
        if score is not None and (self._best is None or score >= self._best.score):
            self._best = Best(step=step, score=score)
        content = {
            "meta": meta,
            "best": None if self._best is None else dataclasses.asdict(self._best),
            "sha256": _digests(model) | _digests(optimizer),
        }
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    model=ocp.args.StandardSave(model),  # type: ignore[call-arg]
                    optimizer=ocp.args.StandardSave(optimizer),  # type: ignore[call-arg]
                    meta=ocp.args.JsonSave({**content, "whole": data_digest(content)}),  # type: ignore[call-arg]
                ),
                metrics={"score": _NO_SCORE if score is None else score},
            )
        except Exception as error:
            raise self._stopped(step, error) from error
        self._unsealed = step

    def restore_latest(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Return the latest state that is whole and its ``meta``, or None if there is none yet.

        Args:
            like: a state of the same structure, on the devices where the restored one should be.

        Raises:
            ValueError: if there were checkpoints, but none is whole, or they are those of another
                network.
        """
        self.wait()
        model, optimizer = _items(like)
        found = None
        had_some = self._manager.latest_step() is not None or self._set_aside_before()
        while found is None and (step := self._manager.latest_step()) is not None:
            found = self._restored(step, {"model": model, "optimizer": optimizer})
        if found is None:
            if had_some:
                raise ValueError(f"{self._none_is_whole()}; give another --workdir to start anew")
            return None
        arrays, meta, self._best = found
        names, _ = jax.tree.flatten_with_path(like)
        leaves = [arrays[_name(path)] for path, _ in names]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), meta

    def restore_best_model(self, params: Arrays, statistics: Arrays) -> BestModel:
        """Return the parameters and statistics of the highest score (the latest of equals).

        Where that checkpoint cannot be used, they are those of the next best, and that is said.

        Args:
            params: parameters of the same structure, on the devices where they should be.
            statistics: likewise.

        Raises:
            FileNotFoundError: if there is no checkpoint.
            ValueError: if none is whole, or the best one is that of another network.
        """
        self.wait()
        like = {"params": params, "statistics": statistics}
        leaves, structure = jax.tree.flatten_with_path(like)
        named = {_name(path): leaf for path, leaf in leaves}
        had_some = False
        best = self._best_of_the_run()
        while (step := self._manager.best_step()) is not None:
            had_some = True
            if (restored := self._restored(step, {"model": named})) is not None:
                arrays, _, _ = restored
                found = jax.tree.unflatten(structure, [arrays[_name(path)] for path, _ in leaves])
                note = self._substitute_note(step, best)
                both = found["params"], found["statistics"]
                return BestModel(arrays=both, step=step, note=note)
        if had_some or self._set_aside_before():
            raise ValueError(self._none_is_whole())
        raise FileNotFoundError(f"{self._directory} holds no checkpoint")

    def _best_of_the_run(self) -> Best | None:
        """Return what the newest readable checkpoint says was the best up to it."""
        for step in sorted(self._manager.all_steps(), reverse=True):
            with contextlib.suppress(Exception):  # told when it is its turn
                return self._content(step)[1]
        return None

    def _substitute_note(self, used: int, best: Best | None) -> str | None:
        """Say so if the checkpoint that is used is not the best that the run had."""
        latest = max([used, *self._manager.all_steps()])
        lost = sorted(step for step in damaged_steps(self._directory) if step > latest)
        if best is not None and best.step != used:
            missing = f"that of step {best.step}, the best"
        elif lost:
            missing = f"a later one, of step {lost[-1]}"
        else:
            return None
        return f"checkpoint of step {used} used: {missing}, is damaged or missing"

    def close(self) -> None:
        """Wait until everything is saved.

        Raises:
            Stopped: if something could not be saved.
        """
        try:
            self.wait()
        finally:
            # What could not be saved was told; closing would tell it again.
            with contextlib.suppress(*[Exception] * self._failed):
                self._manager.close()

    def wait(self) -> None:
        """Wait until what was saved is on disk.

        Raises:
            Stopped: if it could not be saved.
        """
        step, self._unsealed = self._unsealed, None
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # from the thread that saves: anything
            raise self._stopped(step, error) from error
        if step is not None:
            seal(self._directory / str(step))

    def _stopped(self, step: int | None, error: Exception) -> Stopped:
        self._failed = True
        return Stopped(
            f"the checkpoint of step {step} could not be saved in {self._directory} "
            f"({reason(error)}); the ones before are kept, and the same command goes on from "
            "them once there is room"
        )

    def _content(self, step: int) -> tuple[dict[str, Any], Best | None]:
        """Return what is kept beside the arrays of a step, and the best up to it.

        Raises:
            Exception: of any kind, if it is damaged.
        """
        how = ocp.args.Composite(meta=ocp.args.JsonRestore())
        content = self._manager.restore(step, args=how)["meta"]
        if content.pop("whole") != data_digest(content):
            raise ValueError("its metadata is not what was saved")
        best = content.get("best")  # none in those of earlier versions
        return content, None if best is None else Best(**best)

    def _restored(
        self, step: int, items: Mapping[str, Arrays]
    ) -> tuple[Arrays, dict[str, Any], Best | None] | None:
        """Return arrays, meta and the best up to a step, or None if it is damaged.

        A damaged one is set aside.
        """
        try:
            content, best = self._content(step)
            shapes = {
                name: array.shape
                for item in items
                for name, array in self._manager.item_metadata(step)[item].tree.items()
            }
        except Exception as error:  # damage makes Orbax raise anything
            self._set_aside(step, error)
            return None
        like = {name: array for arrays in items.values() for name, array in arrays.items()}
        if shapes != {name: array.shape for name, array in like.items()}:
            raise ValueError(
                f"the checkpoint in {self._directory} is that of another network; model, "
                "classes, channels, plan and optimizer must be the same"
            )
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    **{item: _restore_like(arrays) for item, arrays in items.items()}
                ),
            )
            arrays = {n: array for item in items for n, array in restored[item].items()}
            wrong = [n for n, d in _digests(arrays).items() if d != content["sha256"][n]]
            if wrong:
                raise ValueError(f"{some_of(wrong)} is not what was saved")
        except Exception as error:
            self._set_aside(step, error)
            return None
        return arrays, content["meta"], best

    def _set_aside(self, step: int, error: Exception) -> None:
        wait_for_all(f"read {step}")
        if jax.process_index() == 0:
            set_aside(self._directory / str(step), reason(error))
        wait_for_all(f"set aside {step}")
        self._manager.reload()

    def _set_aside_before(self) -> bool:
        return (self._directory.parent / DAMAGED).is_dir()

    def _none_is_whole(self) -> str:
        return f"no checkpoint in {self._directory} is whole; the damaged ones are beside it"


def _score(metrics: Any) -> float:
    return metrics["score"]


def _items(state: TrainState) -> tuple[Arrays, Arrays]:
    """Return the model's arrays and the rest, by names that survive in plain containers."""
    leaves, _ = jax.tree.flatten_with_path(state)
    named = {_name(path): leaf for path, leaf in leaves}
    model = {n: leaf for n, leaf in named.items() if n.startswith(("params.", "statistics."))}
    return model, {n: leaf for n, leaf in named.items() if n not in model}


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").replace("/", ".")


def _restore_like(arrays: Arrays) -> Any:
    return ocp.args.StandardRestore(  # type: ignore[call-arg]
        {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in arrays.items()
        }
    )


def _digests(arrays: Arrays) -> dict[str, str]:
    """Return the digest of every array; each is whole on every device."""
    return {n: array_digest(np.asarray(a.addressable_shards[0].data)) for n, a in arrays.items()}
