"""BatchNorm in training, with its own backward pass."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from falcon_jax.ops.accumulation import accumulator

Normalized = tuple[Array, Array, Array]


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
    """
    return _normalize(float(epsilon), x, scale, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize(epsilon: float, x: Array, scale: Array, bias: Array) -> Normalized:
    return _forward(epsilon, x, scale, bias)[0]


def _forward(
    epsilon: float, x: Array, scale: Array, bias: Array
) -> tuple[Normalized, tuple[Array, ...]]:
    wide, dtype = _wide(x), jnp.result_type(x, scale, bias)
    mean = _mean(wide)
    variance = jnp.maximum(_mean(wide * wide) - mean * mean, 0)
    inverse = lax.rsqrt(variance + epsilon)
    y = (wide - _row(mean, x)) * _row(inverse * scale, x) + _row(bias.astype(wide.dtype), x)
    return (y.astype(dtype), mean, variance), (x, mean, inverse, scale, bias[:0])


def _backward(
    epsilon: float, residual: tuple[Array, ...], cotangents: Normalized
) -> tuple[Array, Array, Array]:
    x, mean, inverse, scale, like_bias = residual
    dy, dmean, dvariance = map(jnp.asarray, cotangents)
    wide, dy = _wide(x), _wide(dy)
    n = x.size // max(x.shape[-1], 1)
    dbias = _mean(dy) * n
    dscale = (_mean(dy * wide) * n - mean * dbias) * inverse
    gain = inverse * scale
    slope = (2 * dvariance - gain * inverse * dscale) / n
    offset = (dmean - gain * dbias) / n - slope * mean
    dx = dy * _row(gain, x) + wide * _row(slope, x) + _row(offset, x)
    return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(like_bias.dtype)


_normalize.defvjp(_forward, _backward)


def _wide(x: Array) -> Array:
    return x.astype(accumulator(x))


def _mean(x: Array) -> Array:
    return x.mean(axis=tuple(range(x.ndim - 1)))


def _row(values: Array, x: Array) -> Array:
    return values.reshape(*(1,) * (x.ndim - 1), -1)
