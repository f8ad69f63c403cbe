"""Compiling takes most of the time here: it is done once for equal steps, and quickly."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(scope="package", autouse=True)
def _compiled_once(tmp_path_factory):
    fields = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.05,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in fields}
    for name, value in fields.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
