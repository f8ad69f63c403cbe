"""A disk that is full while a checkpoint is saved."""

import contextlib
import resource

import numpy as np
import pytest

from falcon_jax.training.checkpoints import Checkpoints
from falcon_jax.training.interruption import Stopped
from tests.training.test_checkpoints import state_at


@contextlib.contextmanager
def full_disk():
    """Let no file of this process grow beyond a few bytes: writing fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_checkpoint_before_stays_and_the_run_can_go_on(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(state_at(1), {"epoch": 1}, score=0.5)
    checkpoints._finish_saving()
    with full_disk(), pytest.raises(Stopped, match=r"step 2 could not be saved .* goes on"):
        checkpoints.save(state_at(2), {"epoch": 2}, score=0.6)
        checkpoints._finish_saving()
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    state, meta = checkpoints.restore_latest(state_at(0))
    assert meta == {"epoch": 1}
    np.testing.assert_array_equal(state.params["head/bias"], state_at(1).params["head/bias"])
    checkpoints.save(state_at(2), {"epoch": 2}, score=0.6)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert int(checkpoints.restore_latest(state_at(0))[0].step) == 2
    checkpoints.close()
