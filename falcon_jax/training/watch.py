"""Watching the numbers of every step, one step late so that the devices need not wait."""

import dataclasses
import json

import jax
import numpy as np

from falcon_jax.training.run import Run
from falcon_jax.training.step import Metrics


@dataclasses.dataclass(kw_only=True)
class EpochSums:
    """Sums over the steps of an epoch.

    Attributes:
        loss: of the batches.
        accuracy: of the batches.
        steps: how many there were, without those that were skipped.
    """

    loss: float = 0.0
    accuracy: float = 0.0
    steps: int = 0

    def means(self) -> dict[str, float]:
        """Return the mean loss and accuracy."""
        count = max(self.steps, 1)
        return {"loss": self.loss / count, "accuracy": self.accuracy / count}


class Watch:
    """Adds up metrics, stops a run whose numbers go bad, and hears of requests to stop.

    Attributes:
        label: of the run.
        stop: whether a process of the run was asked to stop.

    Args:
        run: the run.
        epoch: number of the epoch, from 1.
        sums: to add to.
        skipped: steps skipped so far.
    """

    def __init__(self, run: Run, epoch: int, sums: EpochSums, *, skipped: int):
        self.label = run.label
        self.stop = False
        self._run = run
        self._epoch = epoch
        self._sums = sums
        self._skipped = skipped
        self._unseen: tuple[int, np.ndarray, Metrics] | None = None

    def see(self, step: int, indices: np.ndarray, metrics: Metrics) -> None:
        """Take the metrics of a step that has just been started, and look at the one before.

        Args:
            step: its number.
            indices: of this process's examples.
            metrics: what the step gives; they are waited for at the next call.

        Raises:
            FloatingPointError: if more steps were not finite than may be skipped.
        """
        self.see_rest()
        self._unseen = (step, indices, metrics)
        if self._run.interruption.requested and jax.process_count() == 1:
            self.stop = True

    def see_rest(self) -> None:
        """Look at the last step."""
        if self._unseen is None:
            return
        (step, indices, metrics), self._unseen = self._unseen, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.stop = self.stop or values["stop"] > 0
        if values["skipped"] > self._skipped:
            self._skipped = int(values["skipped"])
            self._report(step, indices, values)
            return
        self._sums.loss += values["loss"]
        self._sums.accuracy += values["accuracy"]
        self._sums.steps += 1

    def _report(self, step: int, indices: np.ndarray, values: dict[str, float]) -> None:
        """Keep the examples of a step that was not finite, and give up if there were too many."""
        process = f"_process_{jax.process_index()}" if jax.process_count() > 1 else ""
        path = self._run.directory / f"not_finite_step_{step}{process}.json"
        content = {
            "step": step,
            "epoch": self._epoch,
            "loss": str(values["loss"]),
            "gradient_norm": str(values["gradient_norm"]),
            "indices": indices.tolist(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content) + "\n")
        allowed = self._run.settings.skip_nonfinite
        if self._skipped > allowed:
            raise FloatingPointError(
                f"{self.label}: loss {values['loss']}, gradient norm "
                f"{values['gradient_norm']} at step {step} in epoch {self._epoch}; {path} has the "
                "batch's indices, the last checkpoint is kept. Try a lower learning_rate, "
                f"warmup_epochs, or skip_nonfinite above {allowed} to skip such steps"
            )
