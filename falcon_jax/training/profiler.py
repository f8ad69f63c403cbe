"""The profiler's window within a run."""

import jax

from falcon_jax.training.run import Run


class ProfilerWindow:
    """A trace of some steps, on request.

    Args:
        run: says which, and where the trace goes.
    """

    def __init__(self, run: Run):
        self._directory = str(run.directory / "profile")
        self._start = run.log.profile_start_step
        self._stop = self._start + run.log.profile_steps
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
