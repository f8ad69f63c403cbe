"""What is told while a run goes on: metrics, progress, numbers that go wrong, a profile."""

import contextlib
import dataclasses
import json
import pathlib
import secrets
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from falcon_jax.export.files import optional
from falcon_jax.paths import write_whole
from falcon_jax.terminal import Bar, console_of
from falcon_jax.training.interruption import Interruption
from falcon_jax.training.step import Metrics
from falcon_jax.wording import reason


@runtime_checkable
class Logger(Protocol):
    """Something that shows the metrics of a run: what all loggers have in common."""

    def log(self, step: int, metrics: Mapping[str, float | int]) -> None:
        """Take metrics by name, after a number of steps."""
        ...

    def close(self) -> None:
        """Finish."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What a logger is told of a run.

    Attributes:
        directory: of its files.
        label: what is trained.
        project: that the run belongs to.
        config: of the experiment, as plain data.
        from_step: the last step that an earlier start of the run took and this one goes on from.
    """

    directory: pathlib.Path
    label: str = ""
    project: str = "falcon_jax"
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    from_step: int = 0

    @property
    def name(self) -> str:
        """The run's name: that of the experiment's folder, and what is trained."""
        return f"{self.directory.parent.name}/{self.label or self.directory.name}"


class _TensorBoard:
    def __init__(self, run: Run):
        writer = _package("tensorboard").SummaryWriter
        self._events = writer(str(run.directory), purge_step=run.from_step + 1)

    def log(self, step: int, metrics: Mapping[str, float | int]) -> None:
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._events.close()


class _Tracked:
    """A run of wandb, or of trackio, whose runs have the same methods."""

    def __init__(self, run: Any, *, finish: Callable[[], Any]):
        self._run = run
        self._finish = finish

    def log(self, step: int, metrics: Mapping[str, float | int]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._finish()


def _wandb(run: Run) -> Logger:
    wandb = _package("wandb")
    # By this a run that goes on is found again, wherever the folder is by then.
    known = run.directory / "wandb_id.txt"
    if not known.exists():
        known.write_text(secrets.token_hex(8))
    made = wandb.init(
        project=run.project,
        name=run.name,
        id=known.read_text().strip(),
        resume="allow",
        dir=str(run.directory),
        config=dict(run.config),
        settings={"console": "off"},  # it would stand between the terminal and us
    )
    return _Tracked(made, finish=made.finish)


def _trackio(run: Run) -> Logger:
    trackio = _package("trackio")
    made = trackio.init(project=run.project, name=run.name, resume="allow", config=dict(run.config))
    # Not the run's own: the next `init` would finish the run once more.
    return _Tracked(made, finish=trackio.finish)


LOGGERS: Mapping[str, Callable[[Run], Logger]] = MappingProxyType(
    {"tensorboard": _TensorBoard, "wandb": _wandb, "trackio": _trackio}
)
_PACKAGES = MappingProxyType(
    {
        "tensorboard": ("tensorboardX", "train"),
        "wandb": ("wandb", "wandb"),
        "trackio": ("trackio", "trackio"),
    }
)


def require_loggers(names: Iterable[str]) -> None:
    """Raise unless the packages that some loggers need are installed.

    Args:
        names: of ``LOGGERS``.

    Raises:
        ImportError: saying what to install.
    """
    for name in names:
        _package(name)


def _package(name: str) -> Any:
    module, extra = _PACKAGES[name]
    return optional(module, f"the logger {name!r}", extra)


class MetricsLog:
    """Writes metrics to ``metrics.jsonl`` and gives them to loggers.

    Only the first process writes. A run that continues from a checkpoint drops the lines that it
    is about to write again. A logger that fails is warned of and left out from there on; the lines
    go on.

    Args:
        run: whose metrics they are; its directory is made if missing.
        loggers: names out of ``LOGGERS``.

    Raises:
        ImportError: if the package of a logger is not installed.
    """

    def __init__(self, run: Run, *, loggers: Iterable[str] = ()):
        self._path = run.directory / "metrics.jsonl"
        self._writes = jax.process_index() == 0
        self._loggers: dict[str, Logger] = {}
        if not self._writes:
            return
        require_loggers(loggers)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._truncate(run.from_step)
        for name in loggers:
            with self._left_out_if_it_fails(name):
                self._loggers[name] = LOGGERS[name](run)

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
        for name, logger in list(self._loggers.items()):
            with self._left_out_if_it_fails(name):
                logger.log(step, metrics)

    def close(self) -> None:
        """Finish the loggers."""
        for name, logger in list(self._loggers.items()):
            with self._left_out_if_it_fails(name):
                logger.close()
        self._loggers.clear()

    @contextlib.contextmanager
    def _left_out_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any kind: of the network, of an account, of a full disk
            self._loggers.pop(name, None)
            warnings.warn(
                f"the logger {name!r} failed and gets nothing more of this run; metrics.jsonl goes "
                f"on: {reason(error)}",
                stacklevel=4,
            )

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


class Progress:
    """Shows images/s and the time left.

    Args:
        label: what is running.
        total: images in the whole run.
        done: images that an earlier start of the run has done.
        show: whether to show anything.
    """

    def __init__(self, label: str, *, total: int, done: int = 0, show: bool = True):
        self._label = label
        self._show = show
        self._bar = None
        console = console_of(sys.stderr)
        if show and console is not None:
            self._bar = Bar(console, label, total=total, done=done, unit="img")

    def advance(self, images: int) -> None:
        """Count images of one step."""
        if self._bar is not None:
            self._bar.advance(images)

    def epoch(self, epoch: int, epochs: int, metrics: Mapping[str, float | int]) -> None:
        """Show the metrics of an epoch that has ended."""
        values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        line = f"{self._label}: epoch {epoch}/{epochs}  {values}"
        if self._bar is not None:
            self._bar.line(line)
        elif self._show:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


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
        label: shown with what goes wrong.
        directory: of the run; what was not finite is kept there.
        epoch: number of the epoch, from 1.
        sums: to add to.
        skipped: steps skipped so far.
        skip_nonfinite: steps that may be skipped before the run stops.
        interruption: tells when to stop early.
    """

    def __init__(
        self,
        label: str,
        directory: pathlib.Path,
        *,
        epoch: int,
        sums: EpochSums,
        skipped: int,
        skip_nonfinite: int,
        interruption: Interruption,
    ):
        self.label = label
        self.stop = False
        self._directory = directory
        self._epoch = epoch
        self._sums = sums
        self._skipped = skipped
        self._allowed = skip_nonfinite
        self._interruption = interruption
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
        if self._interruption.requested and jax.process_count() == 1:
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
        path = self._directory / f"not_finite_step_{step}{process}.json"
        content = {
            "step": step,
            "epoch": self._epoch,
            "loss": str(values["loss"]),
            "gradient_norm": str(values["gradient_norm"]),
            "indices": indices.tolist(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content) + "\n")
        if self._skipped > self._allowed:
            raise FloatingPointError(
                f"{self.label}: loss {values['loss']}, gradient norm "
                f"{values['gradient_norm']} at step {step} in epoch {self._epoch}; {path} has the "
                "batch's indices, the last checkpoint is kept. Try a lower learning_rate, "
                f"warmup_epochs, or skip_nonfinite above {self._allowed} to skip such steps"
            )


class ProfilerWindow:
    """A trace of some steps, on request.

    Args:
        directory: where the trace goes.
        start_step: the first of them.
        steps: how many there are; 0 for no trace.
    """

    def __init__(self, directory: pathlib.Path, *, start_step: int, steps: int):
        self._directory = str(directory)
        self._start = start_step
        self._stop = start_step + steps
        self._running = False

    def before(self, step: int) -> None:
        """Start or end the trace, if it is time.

        Args:
            step: number of the step that comes.
        """
        if not self._running and self._start <= step < self._stop:
            jax.profiler.start_trace(self._directory)
            self._running = True
        elif self._running and step >= self._stop:
            self.close()

    def close(self) -> None:
        """End the trace."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
