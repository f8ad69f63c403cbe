"""Random weights from NumPy: compiling JAX's generators takes longer than the tests themselves."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def normal(key, shape, dtype=jnp.float32):
    """An initializer: normal, of variance 1 / fan_in. All alike while tracing."""
    seed = 0 if isinstance(key, Tracer) else [int(word) for word in jax.random.key_data(key)]
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values / np.sqrt(max(np.prod(shape[:-1]), 1)), dtype)


WEIGHTS = {"kernel_init": normal, "bias_init": normal}
