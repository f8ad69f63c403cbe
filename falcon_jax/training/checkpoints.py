"""Checkpoints of a training run, with Orbax."""

import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from falcon_jax.training.step import TrainState


class Checkpoints:
    """The checkpoints of one run: the latest and the best.

    Each holds the `TrainState` and a dictionary of plain data (``meta``). Saving goes on in the
    background; `close` waits for it.

    Args:
        directory: where they are; made if missing.
        keep: how many of the latest to keep beside the best.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 1):
        best = preservation_policy.BestN(get_metric_fn=_accuracy, n=1)
        latest = preservation_policy.LatestN(n=keep)
        self._manager = ocp.CheckpointManager(
            pathlib.Path(directory).absolute(),
            options=ocp.CheckpointManagerOptions(
                best_fn=_accuracy,
                best_mode="max",
                preservation_policy=preservation_policy.AnyPreservationPolicy([latest, best]),
            ),
        )

    def save(self, state: TrainState, meta: dict[str, Any], *, accuracy: float) -> None:
        """Save the state after an epoch.

        Args:
            state: after ``state.step`` steps.
            meta: plain data, JSON.
            accuracy: on the validation split; the highest is the best checkpoint.
        """
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_tree(state)),  # type: ignore[call-arg]
                meta=ocp.args.JsonSave(meta),  # type: ignore[call-arg]
            ),
            metrics={"accuracy": accuracy},
        )

    def restore_latest(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Return the latest state and its meta, or None if there is none yet.

        Args:
            like: a state of the same structure, on the devices where the restored one should be.
        """
        return self._restore(self._manager.latest_step(), like)

    def restore_best(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Return the state of the highest accuracy (the latest of equals) and its meta."""
        return self._restore(self._manager.best_step(), like)

    def close(self) -> None:
        """Wait until everything is saved."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _restore(
        self, step: int | None, like: TrainState
    ) -> tuple[TrainState, dict[str, Any]] | None:
        if step is None:
            return None
        self._manager.wait_until_finished()
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(jax.tree.map(_abstract, _tree(like))),  # type: ignore[call-arg]
                meta=ocp.args.JsonRestore(),
            ),
        )
        leaves = [restored["state"][name] for name in _tree(like)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), restored["meta"]


def _accuracy(metrics: Any) -> float:
    return metrics["accuracy"]


def _tree(state: TrainState) -> dict[str, Any]:
    leaves, _ = jax.tree.flatten_with_path(state)
    return {_name(path): leaf for path, leaf in leaves}


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").replace("/", ".")


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
