"""Settings of the whole test suite: eight CPU devices, and no silent broadcasting across ranks.

Programs run once or twice here, so compiling them is what takes time: XLA optimises less, and what
one test compiled another one, or the program that it starts, finds in `.xla_cache`.
"""

import functools
import gc
import os
import pathlib
import typing

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
).strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's threads of two workers wait in loops
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path(__file__).parents[1] / ".xla_cache")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import jaxtyping
import pytest


def pytest_configure(config):
    """Check, in the quick suite, calls of what is annotated with shapes; in others, all calls.

    Checking everything takes a fifth of the time, and pyright knows of types without shapes.
    """
    if config.option.markexpr == "not slow":  # the hook of jaxtyping's plugin decorates by this
        jaxtyping.jaxtyped = lambda *, typechecker: functools.partial(
            _checked_if_shaped, check=_jaxtyped(typechecker=typechecker)
        )


_jaxtyped = jaxtyping.jaxtyped


def _checked_if_shaped(function, check):
    annotations = getattr(function, "__annotations__", {}).values()
    return check(function) if any(map(_has_shapes, annotations)) else function


def _has_shapes(annotation):
    own = isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray)
    return own or any(map(_has_shapes, typing.get_args(annotation)))


def pytest_collection_finish():
    """Let the garbage collector pass over what is loaded, and look for the rest less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture(scope="module")
def without_hook():
    """Leave out the checks of annotations: what is wrong comes as far as it does for a user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield


@pytest.fixture(scope="package", autouse=True)  # what fixtures compile, tests find
def _no_rank_promotion():
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="session")
def torchvision():
    """torchvision without its compiled operators, which may belong to another PyTorch."""
    torch = pytest.importorskip("torch")

    def not_loaded(path):
        raise OSError(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops, "load_library", not_loaded)
        library = torch.library.Library("torchvision", "DEF")
        # It asks for these two on import.
        library.define("nms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        library.define("qnms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        module = pytest.importorskip("torchvision")
    yield module
    del library  # its operators go with it
