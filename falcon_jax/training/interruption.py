"""Signals that ask a run to stop: it saves at the next step and can go on later."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

BAD_INPUT = 2  # exit status after bad input, told in one line
STOPPED = 3  # exit status of a run that stopped early and can go on


class Stopped(Exception):  # noqa: N818 - not an error
    """A run ended before its time, with everything saved that the same command needs to go on."""


class Interruption:
    """Whether the process was asked to stop, by SIGTERM or SIGINT.

    Used as a context it takes the two signals over: the first is remembered, the second ends the
    process at once with status `STOPPED`. Outside the main thread it leaves signals alone.
    """

    def __init__(self):
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise if the process was asked to stop.

        Raises:
            Stopped: then.
        """
        if self.requested:
            raise Stopped("stopped between two stages; the same command goes on from here")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(STOPPED)
        self.requested = True
        name = signal.Signals(number).name
        print(
            f"{name}: saving at the next step, then stopping; once more ends at once",
            file=sys.stderr,
            flush=True,
        )
