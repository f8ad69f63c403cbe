"""A disk that is full while a checkpoint is saved."""

import resource
import subprocess
import sys

import numpy as np

from falcon_jax.training.checkpoints import Checkpoints
from falcon_jax.training.interruption import Stopped
from tests.training.test_checkpoints import state_at


def save_until_full(directory: str) -> None:
    """Save step 1, then step 2 with no file allowed to grow, as on a full disk; print what is said.

    In a process of its own, as in a run: Orbax's threads outlive the error.
    """
    checkpoints = Checkpoints(directory)
    checkpoints.save(state_at(1), {"epoch": 1}, score=0.5)
    checkpoints.wait()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, hard))
    try:
        checkpoints.save(state_at(2), {"epoch": 2}, score=0.6)
        checkpoints.close()
    except Stopped as stopped:
        print(stopped)


def test_the_checkpoint_before_stays_and_the_run_can_go_on(tmp_path):
    directory = tmp_path / "checkpoints"
    code = f"from {__name__} import save_until_full; save_until_full({str(directory)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "the checkpoint of step 2 could not be saved" in run.stdout, run.stderr
    assert "the same command goes on from them" in run.stdout

    checkpoints = Checkpoints(directory)
    found = checkpoints.restore_latest(state_at(0))
    assert found is not None
    state, meta = found
    assert meta == {"epoch": 1}
    np.testing.assert_array_equal(state.params["head/bias"], state_at(1).params["head/bias"])
    checkpoints.save(state_at(2), {"epoch": 2}, score=0.6)
    checkpoints.close()
    checkpoints = Checkpoints(directory)
    found = checkpoints.restore_latest(state_at(0))
    assert found is not None and int(found[0].step) == 2
    checkpoints.close()
