"""Layers with a fast backward pass: BatchNorm, and the depthwise convolution."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype, Initializer
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from falcon_jax.ops.choice import DepthwiseForm
from falcon_jax.ops.depthwise import depthwise_conv
from falcon_jax.ops.geometry import ConvSpec, PaddingLike, PerAxis
from falcon_jax.ops.normalization import normalize_batch


class BatchNorm(nnx.BatchNorm):
    """``nnx.BatchNorm`` with a backward pass of its own: 1.3 to 2 times faster in training on CPUs.

    Arguments, variables and results are those of ``nnx.BatchNorm``. What it does not do itself (a
    mask, other axes, devices joined by ``axis_name``, no scale or bias) it leaves to Flax.

    >>> import jax.numpy as jnp
    >>> BatchNorm(4, rngs=nnx.Rngs(0))(jnp.ones((2, 3, 3, 4))).shape
    (2, 3, 3, 4)
    """

    def __call__(
        self,
        x: Float[Array, "*batch c"],
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
    ) -> Any:
        """Normalise the input; in training by its own statistics, which are then kept."""
        average = self.use_running_average if use_running_average is None else use_running_average
        plain = self.axis in (-1, x.ndim - 1) and self.axis_name is None and self.use_fast_variance
        if average is not False or mask is not None or not plain:
            return super().__call__(x, use_running_average, mask=mask)
        if self.scale is None or self.bias is None:
            return super().__call__(x, use_running_average, mask=mask)
        arrays = (x, self.mean[...], self.var[...], self.scale[...], self.bias[...])
        x, _, _, scale, bias = self.promote_dtype(arrays, dtype=self.dtype)
        y, mean, variance = normalize_batch(x, scale, bias, epsilon=self.epsilon)
        for kept, new in ((self.mean, mean), (self.var, variance)):
            kept[...] = self.momentum * kept[...] + (1 - self.momentum) * lax.stop_gradient(new)
        return y


class DepthwiseConv(nnx.Module):
    """A convolution of every channel with a kernel of its own, fast forward and backward.

    What ``nnx.Conv(features, features, ..., feature_group_count=features)`` computes. Parameters:
    ``kernel`` of shape ``(*kernel_size, C)`` and ``bias`` of shape ``(C,)`` or None.

    Args:
        features: channels C, in and out.
        kernel_size: taps per spatial axis; a number for one axis.
        strides: step between outputs.
        padding: as in ``nnx.Conv``.
        input_dilation: distance between input points.
        kernel_dilation: distance between taps.
        use_bias: whether a bias is added.
        dtype: of the computation; as inputs and parameters if None.
        param_dtype: of the parameters.
        kernel_init: makes the kernel, of shape ``(*kernel_size, 1, C)`` as in ``nnx.Conv``.
        bias_init: makes the bias.
        impl: how it is computed; see `depthwise_conv`.
        rngs: for the parameters, stream ``params``.

    >>> layer = DepthwiseConv(16, (3, 3), strides=2, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 8, 8, 16))).shape
    (1, 4, 4, 16)
    """

    def __init__(
        self,
        features: int,
        kernel_size: int | Sequence[int],
        strides: PerAxis = 1,
        *,
        padding: PaddingLike = "SAME",
        input_dilation: PerAxis = 1,
        kernel_dilation: PerAxis = 1,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),  # noqa: B008  # a pure function
        bias_init: Initializer = nnx.initializers.zeros_init(),  # noqa: B008
        impl: DepthwiseForm = "auto",
        rngs: nnx.Rngs,
    ):
        self.spec = ConvSpec(
            kernel_size=kernel_size,
            in_features=features,
            out_features=features,
            strides=strides,
            padding=padding,
            input_dilation=input_dilation,
            kernel_dilation=kernel_dilation,
            feature_group_count=features,
            use_bias=use_bias,
        )
        kernel = kernel_init(rngs.params(), self.spec.kernel_shape, param_dtype)
        self.kernel = nnx.Param(jnp.squeeze(kernel, -2))
        self.bias = nnx.data(None)
        if use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), (features,), param_dtype))
        self.dtype = dtype
        self.impl: DepthwiseForm = impl

    def __call__(self, inputs: Float[ArrayLike, "*batch c"]) -> Float[Array, "*batch_out c"]:
        """Convolve inputs of shape ``(..., *spatial, C)``, any number of batch axes."""
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)
        y = depthwise_conv(x, kernel, **self.spec.geometry, impl=self.impl)
        return y if bias is None else y + jnp.broadcast_to(bias, y.shape)
