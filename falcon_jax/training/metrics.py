"""Metrics of a run, as JSON lines and for TensorBoard."""

import json
import os
from collections.abc import Mapping

import jax

from falcon_jax.paths import user_path
from falcon_jax.report.writing import write_whole


class MetricsLog:
    """Writes metrics to ``metrics.jsonl`` and, if asked, to TensorBoard event files.

    Only the first process writes. A run that continues from a checkpoint drops the lines that it
    is about to write again.

    Args:
        directory: where the files go; made if missing.
        tensorboard: whether to write event files.
        from_step: drop what was written after this step.

    Raises:
        ImportError: if TensorBoard is asked for and tensorboardX is not installed.
    """

    def __init__(self, directory: str | os.PathLike[str], *, tensorboard: bool, from_step: int = 0):
        self._path = user_path(directory) / "metrics.jsonl"
        self._writes = jax.process_index() == 0
        self._events = None
        if not self._writes:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._truncate(from_step)
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise ImportError(
                    "TensorBoard files need tensorboardX: pip install 'falcon-jax[train]', or set "
                    "config.log.tensorboard to False"
                ) from None
            self._events = SummaryWriter(str(self._path.parent), purge_step=from_step + 1)

    def write(self, step: int, metrics: Mapping[str, float | int]) -> None:
        """Write one line.

        Args:
            step: number of steps taken.
            metrics: numbers by name.
        """
        if not self._writes:
            return
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self._events is not None:
            for name, value in metrics.items():
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Finish the event files."""
        if self._events is not None:
            self._events.close()

    def _truncate(self, from_step: int) -> None:
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_bytes().split(b"\n"):
            try:
                if json.loads(line)["step"] <= from_step:
                    kept.append(line + b"\n")
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # a line cut short when the run was killed
        write_whole(self._path, b"".join(kept))
