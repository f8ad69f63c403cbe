"""Sums of many terms: in which type, and as one expression."""

import functools
from collections.abc import Iterable

import jax.numpy as jnp
from jaxtyping import Array


def accumulator(*arrays: Array) -> jnp.dtype:
    """Return the type that products are summed in: half-precision terms in float32."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def add_up(terms: Iterable[Array]) -> Array:
    """Return the sum of at least one term."""
    first, *rest = terms
    return functools.reduce(jnp.add, rest, first)
