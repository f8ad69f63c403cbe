"""Two processes with four devices each: killed, stopped, continued by them and by one process."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from falcon_jax.training.devices import Peers, launched, start_distributed
from falcon_jax.training.interruption import STOPPED, Interruption, Stopped
from falcon_jax.training.loop import train
from falcon_jax.training.network import Network
from tests.training import process
from tests.training.steps import one_device
from tests.training.test_survival import stopping_at
from tests.training.tiny import Tiny

ROOT = pathlib.Path(__file__).parents[2]


def start_two(directory):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    program = [sys.executable, "-m", "tests.training.process", str(directory), f"localhost:{port}"]
    return [
        subprocess.Popen(
            [*program, str(number)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]


def wait_for_step(directory, step, processes):
    """Wait until a checkpoint of that step or a later one is there."""
    deadline = time.monotonic() + 120
    while not any(
        int(p.name) >= step for p in directory.glob("checkpoints/[0-9]*") if p.name.isdigit()
    ):
        assert time.monotonic() < deadline
        assert all(p.poll() is None for p in processes), [p.communicate()[0] for p in processes]
        time.sleep(0.02)


def go_on(directory):
    run = process.run_in(directory, Interruption())
    return train(run, *Network.split(Tiny())).arrays


def assert_close(found, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The end of a run that one process with eight devices did alone."""
    params, statistics = go_on(tmp_path_factory.mktemp("whole"))
    return jax.device_get(params | statistics)


@pytest.mark.slow
def test_two_processes_are_killed_and_stopped_and_end_as_one(whole, tmp_path):
    both = start_two(tmp_path)
    wait_for_step(tmp_path, 2, both)
    both[1].send_signal(signal.SIGKILL)
    both[0].send_signal(signal.SIGKILL)
    for one in both:
        one.communicate()
    both = start_two(tmp_path)
    wait_for_step(tmp_path, 6, both)
    both[1].send_signal(signal.SIGTERM)
    said = [one.communicate(timeout=120)[0] for one in both]
    assert [one.returncode for one in both] == [STOPPED, STOPPED], said
    steps = {text.split("saved at step ")[1].split(";")[0] for text in said}
    assert len(steps) == 1
    both = start_two(tmp_path)
    said = [one.communicate(timeout=120)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    for number in range(2):
        with np.load(tmp_path / f"end{number}.npz") as end:
            assert_close(end, whole)


@pytest.mark.slow
def test_two_processes_begin_and_one_ends(whole, tmp_path):
    both = start_two(tmp_path)
    wait_for_step(tmp_path, 4, both)
    both[0].send_signal(signal.SIGTERM)
    said = [one.communicate(timeout=120)[0] for one in both]
    assert [one.returncode for one in both] == [STOPPED, STOPPED], said
    params, statistics = go_on(tmp_path)
    assert_close(params | statistics, whole)


@pytest.mark.parametrize("first", ["one", "eight"])
def test_a_checkpoint_goes_on_with_another_number_of_devices(whole, tmp_path, monkeypatch, first):
    meshes = [one_device(), None]
    if first == "eight":
        meshes.reverse()
    for mesh, stop in zip(meshes, (7, None), strict=True):
        run = process.run_in(tmp_path, Interruption(), mesh=mesh)
        with monkeypatch.context() as patched:
            if stop is not None:
                stopping_at(patched, run, stop)
                with pytest.raises(Stopped):
                    train(run, *Network.split(Tiny()))
            else:
                params, statistics = train(run, *Network.split(Tiny())).arrays
    assert_close(params | statistics, whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coordinator": "a:1"}, "together"),
        ({"coordinator": "a:1", "processes": 2}, "together"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, "runs from 0 to 1"),
        ({"coordinator": "here", "processes": 2, "process": 0}, "host:port"),
        ({"coordinator": "a:99999", "processes": 2, "process": 0}, "host:port"),
        ({"mode": "maybe"}, "one of auto, on, off"),
    ],
)
def test_places_that_do_not_fit_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Peers(**options)


def test_a_process_alone_joins_nothing():
    assert not launched({"SLURM_NTASKS": "1"})
    assert launched({"SLURM_NTASKS": "8"})
    start_distributed(Peers())
    start_distributed(Peers(mode="off", launched=True))
    assert jax.process_count() == 1
