"""How the program ends: children that die in every way, and threads that never end."""

import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from falcon_jax.training.devices import Peers, start_distributed
from falcon_jax.training.interruption import LOST, watch

JOIN = "import os, socket; os.write(int(os.environ['FALCON_JAX_WATCHED']), b'j')\n"
STACK = r"""
import os, sys
print("an epoch", file=sys.stderr)
print("F1126 12:15:15.164829   13588 client.h:86] Terminating process because the JAX distributed "
      "service detected fatal errors. absl::Status: UNAVAILABLE: task 1 \x1b[31m is gone\n"
      "*** Check failure stack trace: ***\n    @ 0x7ff2b0af81b4 absl::Flush()", file=sys.stderr)
"""


def end_of(program, capsys):
    status = watch([sys.executable, "-c", program])
    return status, capsys.readouterr().err


def test_statuses_and_words_of_the_child_are_handed_on(capsys):
    program = "import sys; print('bad: \\x1b', file=sys.stderr); sys.exit(4)"
    assert end_of(program, capsys) == (4, "bad: \x1b\n")


def test_a_peer_that_died_is_told_in_one_sentence(capsys):
    status, told = end_of(JOIN + STACK + "os.abort()", capsys)
    assert status == 3
    assert told.splitlines() == [
        "an epoch",
        f"train.py: {LOST} (UNAVAILABLE: task 1 \\x1b[31m is gone)",
    ]


def test_processes_that_do_not_find_each_other_are_told_as_bad_input(capsys):
    status, told = end_of(STACK + "os.abort()", capsys)
    assert status == 2
    assert "error: the processes of this run could not find each other" in told
    assert "same --coordinator and --processes" in told and "@ 0x" not in told


def test_a_child_that_was_killed(capsys):
    status, told = end_of(JOIN + "import os; os.kill(os.getpid(), 9)", capsys)
    assert (status, told) == (
        3,
        "train.py: ended by SIGKILL; the same command goes on from the last checkpoint\n",
    )


def test_signals_are_handed_on(capsys):
    program = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\n"
        "print('ready', file=sys.stderr, flush=True)\n"
        "time.sleep(60)"
    )
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    status, _ = end_of(program, capsys)
    assert status in (3, 2)  # 2: the signal came before the child was ready


LEAVE = """
import threading
from falcon_jax.training.interruption import leave
threading.Thread(target=threading.Event().wait).start()
print("said")
leave(3)
"""


def test_threads_that_never_end_do_not_keep_the_program():
    found = subprocess.run(
        [sys.executable, "-c", LEAVE], capture_output=True, text=True, timeout=60
    )
    assert (found.returncode, found.stdout) == (3, "said\n")


def test_a_taken_port_is_told():
    with socket.socket() as other:
        other.bind(("localhost", 0))
        other.listen()
        peers = Peers(coordinator=f"localhost:{other.getsockname()[1]}", processes=2, process=0)
        with pytest.raises(ValueError, match=r"cannot listen at --coordinator=localhost:.*in use"):
            start_distributed(peers)
    with pytest.raises(ValueError, match="an address of its own machine"):
        start_distributed(Peers(coordinator="192.0.2.1:12345", processes=2, process=0))
