"""NNX modules to be used like ``nnx.Conv``, one a method."""

from collections.abc import Sequence
from typing import Unpack

from flax import nnx

from falcon_jax.methods.cp import CP, TermRank
from falcon_jax.methods.depthwise_separable import DepthwiseSeparable
from falcon_jax.methods.falcon import Falcon, Impl
from falcon_jax.methods.ranks import Rank
from falcon_jax.methods.tucker import ChannelRanks, Tucker
from falcon_jax.nn.method_conv import ConvLike, ConvOptions, fit_conv, named_layer
from falcon_jax.ops.geometry import PerAxis


@named_layer
class FalconConv(ConvLike):
    """A rank-k FALCON convolution, to be used like ``nnx.Conv``.

    Parameters: ``pointwise`` of shape ``(M / groups, k, N)``, ``depthwise`` of shape
    ``(*kernel_size, k, N)`` and ``bias`` of shape ``(N,)`` or None.

    Args:
        in_features: input channels M.
        out_features: output channels N.
        kernel_size: taps per spatial axis; a number for one axis.
        strides: step between outputs.
        rank: number k of terms, or ``full``.
        impl: ``auto``, ``separable``, ``wide``, ``grouped`` or ``gep``; see `Falcon`.
        **conv: ``padding``, ``input_dilation``, ``kernel_dilation``, ``feature_group_count``,
            ``use_bias``, ``dtype``, ``param_dtype``, ``precision``, ``bias_init`` and ``rngs`` as
            in ``nnx.Conv``; ``params`` and ``bias`` to start from.

    Reference:
        FALCON, Sections 3.3 and 3.4.

    >>> import jax.numpy as jnp
    >>> layer = FalconConv(16, 32, (3, 3), rank=2, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 8, 8, 16))).shape
    (1, 8, 8, 32)
    """

    method_class = Falcon

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: PerAxis = 1,
        *,
        rank: Rank = 1,
        impl: Impl = "auto",
        **conv: Unpack[ConvOptions],
    ):
        method = Falcon(rank=rank, impl=impl)
        super().__init__(method, in_features, out_features, kernel_size, strides, conv)

    @classmethod
    def from_conv(cls, conv: nnx.Conv, rank: Rank = 1, *, impl: Impl = "auto") -> "FalconConv":
        """Return the FALCON layer nearest to a trained convolution.

        Raises:
            ValueError: if the convolution cannot be replaced, with the reason.
        """
        layer = fit_conv(conv, Falcon(rank=rank, impl=impl))
        assert isinstance(layer, cls)
        return layer


@named_layer
class DepthwiseSeparableConv(ConvLike):
    """A depthwise-then-pointwise convolution of rank k, to be used like ``nnx.Conv``.

    Parameters: ``depthwise`` of shape ``(*kernel_size, M, k)``, ``pointwise`` of shape
    ``(M / groups, k, N)`` and ``bias`` of shape ``(N,)`` or None.

    Args:
        in_features: input channels M.
        out_features: output channels N.
        kernel_size: taps per spatial axis; a number for one axis.
        strides: step between outputs.
        rank: depthwise kernels per input channel, or ``full``.
        **conv: as in `FalconConv`.

    Reference:
        FALCON, Section 3.6.1.
    """

    method_class = DepthwiseSeparable

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: PerAxis = 1,
        *,
        rank: Rank = 1,
        **conv: Unpack[ConvOptions],
    ):
        method = DepthwiseSeparable(rank=rank)
        super().__init__(method, in_features, out_features, kernel_size, strides, conv)

    @classmethod
    def from_conv(cls, conv: nnx.Conv, rank: Rank = 1) -> "DepthwiseSeparableConv":
        """Return the depthwise separable layer nearest to a trained convolution (GEP-in).

        Raises:
            ValueError: if the convolution cannot be replaced, with the reason.
        """
        layer = fit_conv(conv, DepthwiseSeparable(rank=rank))
        assert isinstance(layer, cls)
        return layer


@named_layer
class TuckerConv(ConvLike):
    """Pointwise, spatial and pointwise convolution, to be used like ``nnx.Conv``.

    Parameters: ``inner`` of shape ``(M, R_in)``, ``core`` of shape ``(*kernel_size, R_in, R_out)``,
    ``outer`` of shape ``(R_out, N)`` and ``bias`` of shape ``(N,)`` or None.

    Args:
        in_features: input channels M.
        out_features: output channels N.
        kernel_size: taps per spatial axis; a number for one axis.
        strides: step between outputs.
        rank: ``(R_in, R_out)``, one number for both, ``full`` or a `Budget`.
        **conv: as in `FalconConv`.

    Reference:
        Kim et al., ICLR 2016; see `Tucker`.
    """

    method_class = Tucker

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: PerAxis = 1,
        *,
        rank: ChannelRanks,
        **conv: Unpack[ConvOptions],
    ):
        method = Tucker(rank=rank)
        super().__init__(method, in_features, out_features, kernel_size, strides, conv)

    @classmethod
    def from_conv(cls, conv: nnx.Conv, rank: ChannelRanks = "vbmf") -> "TuckerConv":
        """Return the Tucker layer fitted to a trained convolution, by HOSVD and HOOI.

        Raises:
            ValueError: if the convolution cannot be replaced, with the reason.
        """
        layer = fit_conv(conv, Tucker(rank=rank))
        assert isinstance(layer, cls)
        return layer


@named_layer
class CPConv(ConvLike):
    """Pointwise, one depthwise step an axis, pointwise; to be used like ``nnx.Conv``.

    Parameters: ``inner`` of shape ``(M, R)``, ``axis0``, ``axis1``, ... of shape ``(D, R)``,
    ``outer`` of shape ``(R, N)`` and ``bias`` of shape ``(N,)`` or None.

    Args:
        in_features: input channels M.
        out_features: output channels N.
        kernel_size: taps per spatial axis; a number for one axis.
        strides: step between outputs.
        rank: number R of terms, or a `Budget`.
        **conv: as in `FalconConv`.

    Reference:
        Lebedev et al., ICLR 2015; see `CP`.
    """

    method_class = CP

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: PerAxis = 1,
        *,
        rank: TermRank,
        **conv: Unpack[ConvOptions],
    ):
        method = CP(rank=rank)
        super().__init__(method, in_features, out_features, kernel_size, strides, conv)

    @classmethod
    def from_conv(cls, conv: nnx.Conv, rank: TermRank = "vbmf") -> "CPConv":
        """Return the CP layer fitted to a trained convolution, by alternating least squares.

        Raises:
            ValueError: if the convolution cannot be replaced, with the reason.
        """
        layer = fit_conv(conv, CP(rank=rank))
        assert isinstance(layer, cls)
        return layer
