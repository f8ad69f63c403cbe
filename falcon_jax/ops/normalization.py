"""BatchNorm in training, with its own backward pass."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from falcon_jax.ops.choice import is_canonical
from falcon_jax.ops.linear import Arrays, accumulator, jvp_call, linear_call

Normalized = tuple[Array, Array, Array]
Types = tuple[Any, Any, Any, Any]  # of y, x, scale and bias


def normalize_batch(
    x: Float[Array, "*batch c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    *,
    epsilon: float,
) -> tuple[Float[Array, "*batch c"], Float[Array, " c"], Float[Array, " c"]]:
    """Normalise every channel by the batch's own statistics.

    ``y = (x - m) / sqrt(v + eps) * scale + bias``, ``m = mean(x)``, ``v = mean(x^2) - m^2``

    The gradient needs two sums a channel, of dy and of x dy, which XLA makes from the arrays as
    they lie in memory; autodiff writes x - m and a product to memory first.

    Args:
        x: any number of batch axes, channels last.
        scale: one a channel.
        bias: one a channel.
        epsilon: added to the variance.

    Returns:
        The normalised batch, mean and variance (not negative) of every channel, float32 or wider.

    Reference:
        Ioffe and Szegedy, 2015.

    >>> x, scale, bias = jnp.array([[1.0], [3.0]]), jnp.full(1, 2.0), jnp.ones(1)
    >>> y, mean, variance = normalize_batch(x, scale, bias, epsilon=0.0)
    >>> y.tolist(), mean.tolist(), variance.tolist()
    ([[-1.0], [3.0]], [2.0], [1.0])
    """
    settings, operands = float(epsilon), (x, scale, bias)
    if is_canonical():
        return _normalized(settings, operands)
    y, mean, variance = jvp_call(_normalized, _derivative, settings, operands)
    return y, mean, variance


def _normalized(epsilon: float, operands: Arrays) -> Normalized:
    x, scale, bias = operands
    wide, dtype = _wide(x), jnp.result_type(x, scale, bias)
    mean = _mean(wide)
    variance = jnp.maximum(_mean(wide * wide) - mean * mean, 0)
    inverse = lax.rsqrt(variance + epsilon)
    y = (wide - _row(mean, x)) * _row(inverse * scale, x) + _row(bias.astype(wide.dtype), x)
    return y.astype(dtype), mean, variance


def _derivative(
    epsilon: float, primals: Arrays, tangents: tuple[Array | None, ...]
) -> tuple[Arrays, Arrays]:
    x, scale, bias = primals
    y, mean, variance = jvp_call(_normalized, _derivative, epsilon, primals)
    residuals = (x, mean, lax.rsqrt(variance + epsilon), scale)
    types = (y.dtype, x.dtype, scale.dtype, bias.dtype)
    moving = tuple(
        jnp.zeros_like(x) if dx is None else dx for x, dx in zip(primals, tangents, strict=True)
    )
    return (y, mean, variance), linear_call(_forward, _backward, types, residuals, moving)


def _forward(types: Types, residuals: tuple[Array, ...], tangents: tuple[Array, ...]) -> Normalized:
    x, mean, inverse, scale = residuals
    dx, dscale, dbias = tangents
    wide, dx = _wide(x), _wide(dx)
    dmean = _mean(dx)
    dvariance = 2 * (_mean(wide * dx) - mean * dmean)
    gain = inverse * scale
    slope = inverse * dscale - gain * inverse * inverse * dvariance / 2
    offset = dbias - gain * dmean - slope * mean
    dy = dx * _row(gain, x) + wide * _row(slope, x) + _row(offset, x)
    return dy.astype(types[0]), dmean, dvariance


def _backward(
    types: Types, residuals: tuple[Array, ...], cotangents: tuple[Array, ...]
) -> Normalized:
    x, mean, inverse, scale = residuals
    dy, dmean, dvariance = cotangents
    wide, dy = _wide(x), _wide(dy)
    n = x.size // max(x.shape[-1], 1)
    dbias = _mean(dy) * n
    dscale = (_mean(dy * wide) * n - mean * dbias) * inverse
    gain = inverse * scale
    slope = (2 * dvariance - gain * inverse * dscale) / n
    offset = (dmean - gain * dbias) / n - slope * mean
    dx = dy * _row(gain, x) + wide * _row(slope, x) + _row(offset, x)
    return dx.astype(types[1]), dscale.astype(types[2]), dbias.astype(types[3])


def _wide(x: Array) -> Array:
    return x.astype(accumulator(x))


def _mean(x: Array) -> Array:
    return x.mean(axis=tuple(range(x.ndim - 1)))


def _row(values: Array, x: Array) -> Array:
    return values.reshape(*(1,) * (x.ndim - 1), -1)
