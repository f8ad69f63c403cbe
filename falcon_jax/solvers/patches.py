"""Patches of maps that a kernel is multiplied by, and their moments, batch by batch."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from falcon_jax.ops.geometry import ConvSpec, pad, pad_boundary, padding_pairs, tap_slices
from falcon_jax.solvers.moments import Moments

CHUNK = 1 << 24  # floats of patches at a time: 64 MB


def no_moments(spec: ConvSpec) -> Moments:
    """Return the moments of no points, for a convolution."""
    groups = spec.feature_group_count
    inputs, outputs = spec.taps * spec.group_in_features, spec.out_features // groups
    return Moments(
        count=jnp.zeros(()),
        input_mean=jnp.zeros((groups, inputs)),
        target_mean=jnp.zeros((groups, outputs)),
        second=jnp.zeros((groups, inputs, inputs)),
        cross=jnp.zeros((groups, inputs, outputs)),
        variance=jnp.zeros((groups, outputs)),
    )


def update_moments(
    moments: Moments,
    x: Float[Array, "b *spatial m"],
    y: Float[Array, "b *spatial_out n"],
    spec: ConvSpec,
    *,
    weights: Float[Array, "b *spatial_out"] | None = None,
    points: int | None = None,
    key: PRNGKeyArray | None = None,
) -> Moments:
    """Return the moments with those of a batch added.

    Args:
        moments: of the batches before.
        x: what the layer gets.
        y: what it should answer.
        spec: the convolution.
        weights: of the output points, 0 or more; all count the same if None.
        points: of each example's output, so many are looked at, at random; all if None.
        key: for the choice.

    Returns:
        Moments; the patches of a few examples at a time are in memory.
    """
    total = math.prod(y.shape[1:-1])
    seen = total if points is None else min(points, total)
    inputs = spec.taps * spec.in_features
    examples = max(1, CHUNK // max(1, seen * inputs))
    if seen < total and key is None:
        raise ValueError("sampling points needs a key, e.g. key=jax.random.key(0).")
    for start in range(0, x.shape[0], examples):
        part = slice(start, start + examples)
        some = None
        if seen < total:
            assert key is not None
            scores = jax.random.uniform(jax.random.fold_in(key, start), (x[part].shape[0], total))
            some = lax.top_k(scores, seen)[1]
        weight = None if weights is None else jnp.asarray(weights[part])
        moments = _updated(moments, x[part], y[part], weight, some, spec=spec)
    return moments


@functools.partial(jax.jit, static_argnames="spec", donate_argnums=0)
def _updated(
    moments: Moments,
    x: Array,
    y: Array,
    weights: Array | None,
    chosen: Array | None,
    *,
    spec: ConvSpec,
) -> Moments:
    groups = spec.feature_group_count
    patches = patches_at(x, spec, chosen)
    target = points_at(y, chosen).reshape(-1, groups, spec.out_features // groups).swapaxes(0, 1)
    count = target.shape[1]
    if weights is None:
        share = jnp.full((1, count, 1), 1 / max(count, 1))
        total = jnp.asarray(float(count))
    else:
        weight = points_at(weights[..., None], chosen).reshape(1, count, 1)
        total = weight.sum()
        share = weight / jnp.where(total > 0, total, 1)
    x_mean, y_mean = (share * patches).sum(1), (share * target).sum(1)
    x_rest, y_rest = patches - x_mean[:, None], target - y_mean[:, None]
    product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    weighted = x_rest * share
    return moments.merge(
        Moments(
            count=total,
            input_mean=x_mean,
            target_mean=y_mean,
            second=product("gsi,gsj->gij", weighted, x_rest),
            cross=product("gsi,gsn->gin", weighted, y_rest),
            variance=(share * y_rest * y_rest).sum(1),
        )
    )


def patches_at(
    x: Float[Array, "b *spatial m"], spec: ConvSpec, chosen: Int[Array, "b points"] | None
) -> Float[Array, "groups b_points inputs"]:
    """Return what a convolution's kernel is multiplied by at some points of its output.

    Args:
        x: what the convolution gets.
        spec: the convolution.
        chosen: points of each example's output, in row-major order; all if None.
    """
    groups = spec.feature_group_count
    rows = (-1, spec.taps, groups, spec.group_in_features)
    patches = _patches(x, spec, chosen).reshape(rows).transpose(2, 0, 1, 3)
    return patches.reshape(groups, -1, rows[1] * rows[3])


def points_at(
    y: Float[Array, "b *spatial c"], chosen: Int[Array, "b points"] | None
) -> Float[Array, "b points c"]:
    """Return the channels at some points of a map, or at all."""
    flat = y.reshape(y.shape[0], math.prod(y.shape[1:-1]), y.shape[-1])
    return flat if chosen is None else jnp.take_along_axis(flat, chosen[..., None], axis=1)


def _patches(x: Array, spec: ConvSpec, chosen: Array | None) -> Float[Array, "b points taps m"]:
    x, padding = pad_boundary(
        x, spec.padding, spec.kernel_size, kernel_dilation=spec.kernel_dilation
    )
    pairs = padding_pairs(
        padding,
        x.shape[1:-1],
        spec.kernel_size,
        strides=spec.strides,
        input_dilation=spec.input_dilation,
        kernel_dilation=spec.kernel_dilation,
    )
    geometry = spec.strides, pairs, spec.input_dilation, spec.kernel_dilation
    slices = tap_slices(geometry, pad(geometry, x), spec.kernel_size)
    return jnp.stack([points_at(tap, chosen) for tap in slices], axis=2)
