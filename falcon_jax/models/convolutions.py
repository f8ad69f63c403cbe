"""The kinds of convolution that conv units are made of, each an ``nnx.Conv`` that is fast."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from falcon_jax.ops import conv_on_small_maps, depthwise_conv, pointwise_conv

PAD_ONE = ((1, 1), (1, 1))


def conv_3x3(
    in_features: int,
    out_features: int,
    strides: int,
    *,
    use_bias: bool,
    dtype: Dtype | None,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Return a standard 3x3 convolution, padded by one."""
    return nnx.Conv(
        in_features,
        out_features,
        (3, 3),
        strides,
        padding=PAD_ONE,
        use_bias=use_bias,
        dtype=dtype,
        conv_general_dilated=conv_on_small_maps,
        kernel_init=nnx.initializers.he_uniform(),
        rngs=rngs,
    )


def depthwise_3x3(
    features: int, strides: int, *, use_bias: bool, dtype: Dtype | None, rngs: nnx.Rngs
) -> nnx.Conv:
    """Return a 3x3 convolution with a kernel of its own for every channel, padded by one."""
    return nnx.Conv(
        features,
        features,
        (3, 3),
        strides,
        padding=PAD_ONE,
        feature_group_count=features,
        use_bias=use_bias,
        dtype=dtype,
        conv_general_dilated=_depthwise,
        kernel_init=nnx.initializers.he_uniform(),
        rngs=rngs,
    )


def pointwise(
    in_features: int,
    out_features: int,
    *,
    groups: int = 1,
    use_bias: bool,
    dtype: Dtype | None,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Return a 1x1 convolution, one for each group of channels."""
    return nnx.Conv(
        in_features,
        out_features,
        (1, 1),
        padding="VALID",
        feature_group_count=groups,
        use_bias=use_bias,
        dtype=dtype,
        conv_general_dilated=_pointwise,
        kernel_init=nnx.initializers.he_uniform(),
        rngs=rngs,
    )


def _depthwise(
    lhs: Float[Array, "b h w c"],
    rhs: Float[Array, "d1 d2 1 c"],
    window_strides: tuple[int, ...],
    padding: Any,
    **options: Any,
) -> Float[Array, "b h_out w_out c"]:
    pairs = tuple(map(tuple, padding))
    return depthwise_conv(lhs, jnp.squeeze(rhs, 2), strides=tuple(window_strides), padding=pairs)


def _pointwise(
    lhs: Float[Array, "b h w m"],
    rhs: Float[Array, "1 1 m_group n"],
    window_strides: tuple[int, ...],
    padding: Any,
    *,
    feature_group_count: int,
    precision: Any,
    **options: Any,
) -> Float[Array, "b h w n"]:
    kernel = rhs.reshape(rhs.shape[2:])
    return pointwise_conv(lhs, kernel, feature_group_count=feature_group_count, precision=precision)
