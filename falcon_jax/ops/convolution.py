"""The standard convolution, with every padding that Flax knows."""

import jax
from jax import lax
from jaxtyping import Array, Float

from falcon_jax.ops.geometry import Padding, pad_boundary, padding_pairs
from falcon_jax.ops.small_maps import conv_on_small_maps


def conv(
    x: Float[Array, "b *spatial m"],
    kernel: Float[Array, "*kernel_size m_group n"],
    *,
    strides: tuple[int, ...],
    padding: Padding,
    input_dilation: tuple[int, ...],
    kernel_dilation: tuple[int, ...],
    feature_group_count: int = 1,
    precision: lax.PrecisionLike = None,
) -> Float[Array, "b *spatial_out n"]:
    """Convolve a channels-last batch with a standard kernel.

    Args:
        x: input of shape ``(batch, *spatial, M)``.
        kernel: shape ``(*kernel_size, M / groups, N)``.
        strides: step between outputs, per axis.
        padding: a name or explicit ``(low, high)`` pairs.
        input_dilation: distance between input points, per axis.
        kernel_dilation: distance between taps, per axis.
        feature_group_count: number of groups that channels are split into.
        precision: of the products on accelerators, as in ``jax.lax``.

    Returns:
        Output of shape ``(batch, *spatial_out, N)``.

    Reference:
        FALCON, Equations 1 and 2.
    """
    kernel_size = kernel.shape[:-2]
    x, padding = pad_boundary(x, padding, kernel_size, kernel_dilation=kernel_dilation)
    pairs = padding_pairs(
        padding,
        x.shape[1:-1],
        kernel_size,
        strides=strides,
        input_dilation=input_dilation,
        kernel_dilation=kernel_dilation,
    )
    rank = len(kernel_size)
    channels_last = (0, rank + 1, *range(1, rank + 1))
    kernel_layout = (rank + 1, rank, *range(rank))
    return conv_on_small_maps(
        x,
        kernel,
        strides,
        pairs,
        lhs_dilation=input_dilation,
        rhs_dilation=kernel_dilation,
        dimension_numbers=jax.lax.ConvDimensionNumbers(channels_last, kernel_layout, channels_last),
        feature_group_count=feature_group_count,
        precision=precision,
    )
