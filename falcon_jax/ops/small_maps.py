"""Standard convolutions on maps of a few pixels, where XLA's own are very slow on CPUs."""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from falcon_jax.ops.geometry import output_shape, pad, padding_pairs, tap_slices

_SMALL = 4  # output pixels: a 2x2 map


def conv_on_small_maps(
    lhs: Float[Array, "b *spatial m"],
    rhs: Float[Array, "*kernel_size m_group n"],
    window_strides: tuple[int, ...],
    padding: Any,
    lhs_dilation: tuple[int, ...],
    rhs_dilation: tuple[int, ...],
    feature_group_count: int = 1,
    **options: Any,
) -> Float[Array, "b *spatial_out n"]:
    """Do what ``lax.conv_general_dilated`` does, faster where the output has at most 4 pixels.

    There the taps are gathered side by side and one matrix product does the rest (im2col): 8 to 90
    times faster on CPUs. To be given to ``nnx.Conv(conv_general_dilated=...)``.

    Args:
        lhs: input, channels last.
        rhs: kernel in Flax's layout.
        window_strides: step between outputs.
        padding: SAME, VALID or pairs.
        lhs_dilation: distance between input points.
        rhs_dilation: distance between taps.
        feature_group_count: groups; one for the fast form.
        **options: passed on to ``lax.conv_general_dilated``.

    Returns:
        The convolution.
    """
    *kernel_size, _, n = rhs.shape
    kernel_size, spatial = tuple(kernel_size), lhs.shape[1:-1]
    pairs = padding if isinstance(padding, str) else tuple(map(tuple, padding))
    geometry: dict[str, Any] = {
        "strides": tuple(window_strides),
        "input_dilation": tuple(lhs_dilation),
        "kernel_dilation": tuple(rhs_dilation),
    }
    sizes = output_shape(spatial, kernel_size, padding=pairs, **geometry)
    if feature_group_count > 1 or math.prod(kernel_size) == 1 or math.prod(sizes) > _SMALL:
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            feature_group_count=feature_group_count,
            **options,
        )
    pairs = padding_pairs(pairs, spatial, kernel_size, **geometry)
    form = (geometry["strides"], pairs, geometry["input_dilation"], geometry["kernel_dilation"])
    taps = tap_slices(form, pad(form, lhs), kernel_size)
    columns = jnp.concatenate(list(taps), axis=-1)
    y = jnp.matmul(
        columns.reshape(-1, columns.shape[-1]),
        rhs.reshape(-1, n),
        precision=options.get("precision"),
    )
    return y.reshape(*columns.shape[:-1], n)
