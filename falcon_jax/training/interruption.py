"""How a run is stopped, and how the program ends: for certain, and with a sentence."""

import contextlib
import logging
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import IO, Any, NoReturn

import jax

from falcon_jax.wording import shown

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


LOST = (
    "another process of this run died or cannot be reached any more; start all of them again with "
    "the same command, and the run goes on from its last checkpoint"
)
_APART = (
    "the processes of this run could not find each other; give each the same --coordinator and "
    "--processes and a --process of its own, or --distributed=off to train with this one alone"
)
_SOCKET = "FALCON_JAX_WATCHED"  # descriptor of the socket to the watching process
_JOINED = b"j"
_LAST_WORDS = 10_000  # bytes of them that are kept
_PATIENCE = 10  # seconds to take leave of the other processes
# What C++ or Python's fault handler writes when it ends the process: nothing comes after it.
_DYING = re.compile(
    rb"F\d{4} \d\d:\d\d|E\d{4} .*coordination_service|\*\*\* |terminate called|Fatal Python error"
)
_REASON = re.compile(r"F\d{4} [^]]*\] (?:.*absl::Status: )?(.*)|what\(\): *(.*)")
_PEERS = re.compile("JAX distributed service|coordination")


def watched() -> bool:
    """Return whether another process watches over this one."""
    return _SOCKET in os.environ


def watch(command: Sequence[str]) -> int:
    """Run one of several processes as a child, and tell in one sentence if it ends violently.

    SIGTERM and SIGINT are handed on; the child ends when this process does.

    Args:
        command: of the child.

    Returns:
        The exit status: the child's, or the one that stands for how it ended.
    """
    ours, theirs = socket.socketpair()
    with ours:
        child = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            pass_fds=(theirs.fileno(),),
            process_group=0,  # else a terminal's signals reach it twice
            env={"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ, _SOCKET: str(theirs.fileno())},
        )
        theirs.close()
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {n: signal.signal(n, lambda n, _: child.send_signal(n)) for n in numbers}
        with child:
            assert child.stderr is not None
            last_words = _relayed(child.stderr)
        status = child.returncode
        for number, handler in before.items():
            signal.signal(number, handler)
        ours.setblocking(False)
        found_each_other = False
        with contextlib.suppress(OSError):
            found_each_other = ours.recv(1) == _JOINED
    if status >= 0:
        sys.stderr.write(last_words.decode(errors="backslashreplace"))
        return status
    print(f"train.py: {_end(-status, last_words, found_each_other)}", file=sys.stderr)
    return STOPPED if found_each_other else BAD_INPUT


def joined() -> None:
    """Tell the watching process, if there is one, that the processes have found each other.

    From then on this process ends when the watching one does.
    """
    if watched():
        report = socket.socket(fileno=int(os.environ[_SOCKET]))
        report.send(_JOINED)
        threading.Thread(target=_end_with, args=(report,), daemon=True).start()


def leave(status: int) -> NoReturn:
    """End the program, whatever threads are still at work.

    Args:
        status: the exit status.
    """
    if status == 0:
        sys.exit(0)
    if jax.distributed.is_initialized():
        goodbye = threading.Thread(target=_take_leave, daemon=True)
        goodbye.start()
        goodbye.join(_PATIENCE)  # the others may be gone, or busy
    for worker in multiprocessing.active_children():
        worker.terminate()
    with contextlib.suppress(Exception):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _relayed(errors: IO[bytes]) -> bytes:
    """Hand on what is written there; what C++ writes when it dies is kept and returned."""
    kept = b""
    for line in errors:
        if kept or _DYING.match(line):
            kept = (kept + line)[:_LAST_WORDS]
        else:
            sys.stderr.write(line.decode(errors="backslashreplace"))
            sys.stderr.flush()
    return kept


def _end(number: int, last_words: bytes, found_each_other: bool) -> str:
    words = last_words.decode(errors="replace")
    found = _REASON.search(words)
    said = f" ({shown(next(filter(None, found.groups()), ''), 120)})" if found else ""
    if not found_each_other:
        return f"error: {_APART}{said}"
    if _PEERS.search(words):
        return f"{LOST}{said}"
    name = signal.Signals(number).name
    return f"ended by {name}{said}; the same command goes on from the last checkpoint"


def _end_with(watching: socket.socket) -> None:
    with contextlib.suppress(OSError):
        watching.recv(1)  # nothing ever comes: it ends when the watching process does
    os._exit(STOPPED)


def _take_leave() -> None:
    with contextlib.suppress(Exception):
        jax.distributed.shutdown()
