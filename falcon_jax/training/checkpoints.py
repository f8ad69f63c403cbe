"""Checkpoints of a training run, with Orbax."""

import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from falcon_jax.training.network import Arrays
from falcon_jax.training.step import TrainState


class Checkpoints:
    """The checkpoints of one run: the latest and the best.

    Each holds the model's arrays, the optimizer's state and a dictionary of plain data (``meta``).
    Saving goes on in the background; `close` waits for it.

    Args:
        directory: where they are; made if missing.
        keep: how many of the latest to keep beside the best.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 1):
        best = preservation_policy.BestN(get_metric_fn=_score, n=1)
        latest = preservation_policy.LatestN(n=keep)
        self._manager = ocp.CheckpointManager(
            pathlib.Path(directory).absolute(),
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

    def save(self, state: TrainState, meta: dict[str, Any], *, score: float) -> None:
        """Save the state after an epoch.

        Args:
            state: after ``state.step`` steps.
            meta: plain data, JSON.
            score: the checkpoint with the highest one is the best.
        """
        model, optimizer = _items(state)
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                model=ocp.args.StandardSave(model),  # type: ignore[call-arg]
                optimizer=ocp.args.StandardSave(optimizer),  # type: ignore[call-arg]
                meta=ocp.args.JsonSave(meta),  # type: ignore[call-arg]
            ),
            metrics={"score": score},
        )

    def restore_latest(self, like: TrainState) -> TrainState | None:
        """Return the latest state, or None if there is none yet.

        Args:
            like: a state of the same structure, on the devices where the restored one should be.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        model, optimizer = _items(like)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(model=_restore_like(model), optimizer=_restore_like(optimizer)),
        )
        names, _ = jax.tree.flatten_with_path(like)
        arrays = restored["model"] | restored["optimizer"]
        leaves = [arrays[_name(path)] for path, _ in names]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def restore_best_model(self, params: Arrays, statistics: Arrays) -> tuple[Arrays, Arrays]:
        """Return the parameters and statistics of the highest score (the latest of equals).

        Args:
            params: parameters of the same structure, on the devices where they should be.
            statistics: likewise.

        Raises:
            FileNotFoundError: if there is no checkpoint.
            ValueError: if the best checkpoint is that of another network.
        """
        self._manager.wait_until_finished()
        step = self._manager.best_step()
        if step is None:
            raise FileNotFoundError(f"{self._manager.directory} holds no checkpoint")
        like = {"params": params, "statistics": statistics}
        leaves, structure = jax.tree.flatten_with_path(like)
        named = {_name(path): leaf for path, leaf in leaves}
        # Orbax notices only while it reads, and leaves its other reads hanging.
        saved = self._manager.item_metadata(step)["model"].tree
        if {n: a.shape for n, a in saved.items()} != {n: a.shape for n, a in named.items()}:
            raise ValueError(
                f"the checkpoint in {self._manager.directory} is that of another network; model, "
                "classes, channels and plan must be the same"
            )
        restored = self._manager.restore(step, args=ocp.args.Composite(model=_restore_like(named)))
        found = jax.tree.unflatten(structure, [restored["model"][name] for name in named])
        return found["params"], found["statistics"]

    def close(self) -> None:
        """Wait until everything is saved."""
        self._manager.wait_until_finished()
        self._manager.close()


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
