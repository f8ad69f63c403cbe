"""A progress bar on standard error, for what takes longer than a glance."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from falcon_jax.terminal import Bar, console_of

T = TypeVar("T")
WIDTH = 20


def shown(
    steps: Sequence[T], label: str, *, progress: bool, name: Callable[[T], str] = str
) -> Iterator[T]:
    """Yield steps, and show how far they have come.

    Args:
        steps: what is done.
        label: what it is called.
        progress: whether to show anything.
        name: of a step.
    """
    console = console_of(sys.stderr)
    if progress and console is not None:
        with contextlib.closing(Bar(console, label, total=len(steps))) as bar:
            for step in steps:
                bar.note(name(step))
                yield step
                bar.advance()
            bar.note("")
        return
    begin = time.monotonic()
    for done, step in enumerate(steps):
        if progress:
            _show(label, done, len(steps), begin, f": {name(step)}")
        yield step
    if progress:
        _show(label, len(steps), len(steps), begin, "\n")


def _show(label: str, done: int, steps: int, begin: float, rest: str) -> None:
    bar = ("#" * (WIDTH * done // max(steps, 1))).ljust(WIDTH)
    line = f"{label} [{bar}] {done}/{steps}, {time.monotonic() - begin:.0f} s"
    text = line.ljust(79) + rest if rest == "\n" else f"{line}{rest}".ljust(79)
    sys.stderr.write(f"\r{text}")
    sys.stderr.flush()
