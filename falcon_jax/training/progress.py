"""Progress of a run: a bar on a terminal, one line an epoch elsewhere."""

import sys
from collections.abc import Mapping


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
        if show and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                desc=label,
                total=total,
                initial=done,
                unit="img",
                unit_scale=True,
                dynamic_ncols=True,
                mininterval=0.5,
            )

    def advance(self, images: int) -> None:
        """Count images of one step."""
        if self._bar is not None:
            self._bar.update(images)

    def epoch(self, epoch: int, epochs: int, metrics: Mapping[str, float | int]) -> None:
        """Show the metrics of an epoch that has ended."""
        values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        if self._bar is not None:
            self._bar.set_postfix_str(values)
        elif self._show:
            print(f"{self._label}: epoch {epoch}/{epochs}  {values}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
