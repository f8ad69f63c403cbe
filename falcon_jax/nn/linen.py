"""Linen modules that apply a compression method in place of a convolution."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from falcon_jax.methods import CP, ConvSpec, DepthwiseSeparable, Falcon, Method, Tucker
from falcon_jax.methods.cp import TermRank
from falcon_jax.methods.falcon import Impl
from falcon_jax.methods.ranks import Rank
from falcon_jax.methods.tucker import ChannelRanks
from falcon_jax.nn.linen_compressed import method_conv
from falcon_jax.ops.geometry import PaddingLike, PerAxis


class ConvLike(nn.Module):
    """Arguments of ``linen.Conv``; a subclass says which method carries the convolution out."""

    features: int
    kernel_size: int | Sequence[int]
    rank: Any = 1
    strides: PerAxis = 1
    padding: PaddingLike = "SAME"
    input_dilation: PerAxis = 1
    kernel_dilation: PerAxis = 1
    feature_group_count: int = 1
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: lax.PrecisionLike = None
    bias_init: Initializer = nn.initializers.zeros_init()

    def method(self) -> Method:
        """Return the method."""
        raise TypeError(f"{type(self).__name__} names no method.")

    def spec(self, in_features: int) -> ConvSpec:
        """Return the geometry for inputs of so many channels."""
        return ConvSpec(
            kernel_size=self.kernel_size,
            in_features=in_features,
            out_features=self.features,
            strides=self.strides,
            padding=self.padding,
            kernel_dilation=self.kernel_dilation,
            input_dilation=self.input_dilation,
            feature_group_count=self.feature_group_count,
            use_bias=self.use_bias,
        )

    @nn.compact
    def __call__(self, inputs: Float[ArrayLike, "*batch m"]) -> Float[Array, "*batch_out n"]:
        """Convolve inputs of shape ``(..., *spatial, M)``, any number of batch axes."""
        return method_conv(
            self,
            self.method(),
            self.spec(jnp.shape(inputs)[-1]),
            inputs,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            bias_init=self.bias_init,
        )


class FalconConv(ConvLike):
    """A rank-k FALCON convolution, to be used like ``linen.Conv``.

    Parameters: ``pointwise`` of shape ``(M / groups, k, N)``, ``depthwise`` of shape
    ``(*kernel_size, k, N)`` and ``bias`` of shape ``(N,)``.

    Attributes:
        features: output channels N.
        kernel_size: taps per spatial axis; a number for one axis.
        rank: number k of terms, or ``full``.
        strides: step between outputs.
        padding: as in ``linen.Conv``.
        input_dilation: distance between input points.
        kernel_dilation: distance between taps.
        feature_group_count: groups that the channels are split into.
        use_bias: whether a bias is added.
        dtype: of the computation; as inputs and parameters if None.
        param_dtype: of the parameters.
        precision: of products on accelerators, as in ``jax.lax``.
        bias_init: makes the bias.
        impl: ``auto``, ``separable``, ``wide``, ``grouped`` or ``gep``; see `Falcon`.

    Reference:
        FALCON, Sections 3.3 and 3.4.
    """

    rank: Rank = 1
    impl: Impl = "auto"

    def method(self) -> Method:
        """Return FALCON of this module's rank."""
        return Falcon(rank=self.rank, impl=self.impl)


class DepthwiseSeparableConv(ConvLike):
    """A depthwise-then-pointwise convolution of rank k, to be used like ``linen.Conv``.

    Parameters: ``depthwise`` of shape ``(*kernel_size, M, k)``, ``pointwise`` of shape
    ``(M / groups, k, N)`` and ``bias`` of shape ``(N,)``. Attributes as in `FalconConv`.

    Reference:
        FALCON, Section 3.6.1.
    """

    rank: Rank = 1

    def method(self) -> Method:
        """Return the depthwise separable method of this module's rank."""
        return DepthwiseSeparable(rank=self.rank)


class TuckerConv(ConvLike):
    """Pointwise, spatial and pointwise convolution, to be used like ``linen.Conv``.

    Parameters: ``inner`` of shape ``(M, R_in)``, ``core`` of shape ``(*kernel_size, R_in, R_out)``,
    ``outer`` of shape ``(R_out, N)`` and ``bias`` of shape ``(N,)``. Attributes as in `FalconConv`;
    ``rank`` is ``(R_in, R_out)``, one number for both, ``full`` or a `Budget`.

    Reference:
        Kim et al., ICLR 2016; see `Tucker`.
    """

    rank: ChannelRanks = 1

    def method(self) -> Method:
        """Return Tucker of this module's ranks."""
        return Tucker(rank=self.rank)


class CPConv(ConvLike):
    """Pointwise, one depthwise step an axis, pointwise; to be used like ``linen.Conv``.

    Parameters: ``inner`` of shape ``(M, R)``, ``axis0``, ``axis1``, ... of shape ``(D, R)``,
    ``outer`` of shape ``(R, N)`` and ``bias`` of shape ``(N,)``. Attributes as in `FalconConv`;
    ``rank`` is the number R of terms or a `Budget`.

    Reference:
        Lebedev et al., ICLR 2015; see `CP`.
    """

    rank: TermRank = 1

    def method(self) -> Method:
        """Return CP of this module's rank."""
        return CP(rank=self.rank)
