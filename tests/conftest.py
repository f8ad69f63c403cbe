"""Settings of the whole test suite: eight CPU devices, and no silent broadcasting across ranks.

Programs run once or twice here, so compiling them is what takes time: XLA optimises less.
"""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
).strip()
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jaxtyping
import pytest


@pytest.fixture(scope="module")
def without_hook():
    """Leave out the checks of annotations: what is wrong comes as far as it does for a user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield


@pytest.fixture(autouse=True)
def _no_rank_promotion():
    with jax.numpy_rank_promotion("raise"):
        yield
