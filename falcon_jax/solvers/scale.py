"""Kernels near the largest and the smallest numbers of their type, fitted at a safe scale."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Params = dict[str, Array]


def at_safe_scale(
    solve: Callable[[Array], Params],
    kernel: Float[Array, "*kernel_shape"],
    factors: Sequence[str],
    *,
    near: int | None = None,
) -> Params:
    """Return the fit of a kernel, found where squares and sums neither overflow nor vanish.

    ``solve(kernel / 2^e)``, and ``2^e`` spread over the factors; e is 0 unless the kernel is
    extreme. Factors share their scale, too, where the kernel's type cannot hold them.

    Args:
        solve: fits a kernel in float32 or wider.
        kernel: of any scale, finite.
        factors: names of the parameters in each of which the kernel is linear; if there are none,
            the kernel is fitted as it is.
        near: as of `safe_exponent`.

    Returns:
        The parameters in the type of ``kernel``.
    """
    if not factors:
        return solve(kernel)
    exponent = safe_exponent(kernel, near=near)
    params = solve(times_power_of_two(kernel, -exponent))
    shifts = _shifts([params[name] for name in factors], exponent, kernel.dtype)
    params |= {n: times_power_of_two(params[n], s) for n, s in zip(factors, shifts, strict=True)}
    return {name: value.astype(kernel.dtype) for name, value in params.items()}


def safe_exponent(kernel: Float[Array, "*kernel_shape"], *, near: int | None = None) -> Any:
    """Return e such that a fit to ``kernel / 2^e`` is safe; 0 unless the kernel is extreme.

    Args:
        kernel: of any scale, finite.
        near: how many powers of two from 1 the largest entry may be; beyond, it is brought to 1.
            If not given, three quarters of the type's, and it is brought just so far: entries that
            are much smaller stay what they are.
    """
    xp = _numpy_of(kernel)
    exponent = largest_exponent(kernel)
    if near is not None:
        return xp.where(abs(exponent) > near, exponent, 0)
    bound = 3 * jnp.finfo(_wide(kernel.dtype)).maxexp // 4
    return exponent - xp.clip(exponent, -bound, bound)


def times_power_of_two(values: Float[Array, "*shape"], exponent: Any) -> Float[Array, "*shape"]:
    """Return ``values * 2^exponent`` in float32 or wider."""
    wide = values.astype(_wide(values.dtype))
    if not isinstance(exponent, Tracer):
        # NumPy knows subnormal numbers, which XLA takes for zero on CPUs.
        return jnp.asarray(np.ldexp(np.asarray(values, wide.dtype), exponent)) if exponent else wide
    # In two steps: the power itself may be out of range.
    half = exponent // 2
    return jnp.ldexp(jnp.ldexp(wide, half), exponent - half)


def _shifts(factors: Sequence[Array], exponent: Any, dtype: DTypeLike) -> list[Any]:
    """Return powers of two for each factor, of sum ``exponent``; 0 if nothing is out of range."""
    xp, limits = _numpy_of(*factors), jnp.finfo(dtype)
    sizes = [largest_exponent(factor) for factor in factors]
    extreme = exponent != 0
    for size in sizes:
        extreme |= (size >= limits.maxexp) | (size < limits.minexp + 4)
    total = exponent + sum(sizes)
    shares = [(total + index) // len(sizes) for index in range(len(sizes))]
    return [xp.where(extreme, share - size, 0) for share, size in zip(shares, sizes, strict=True)]


def largest_exponent(*arrays: Array | np.ndarray) -> Any:
    """Return e such that all entries are below ``2^e``, and one is not below half of it.

    0 for zeros.
    """
    xp = _numpy_of(*arrays)
    sizes = [xp.max(xp.abs(_values(array, xp)), initial=0) for array in arrays]
    return xp.frexp(functools.reduce(xp.maximum, sizes))[1]


def _values(array: Array | np.ndarray, xp: Any) -> Any:
    values = lax.stop_gradient(array) if xp is jnp else np.asarray(array)
    return values.astype(_wide(array.dtype))


def _numpy_of(*arrays: Array | np.ndarray) -> Any:
    return jnp if any(isinstance(array, Tracer) for array in arrays) else np


def _wide(dtype: DTypeLike) -> Any:
    return jnp.promote_types(dtype, jnp.float32)
