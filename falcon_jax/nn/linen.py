"""Linen modules that apply a compression method in place of a convolution."""

from falcon_jax.methods.base import Method
from falcon_jax.methods.cp import CP, TermRank
from falcon_jax.methods.depthwise_separable import DepthwiseSeparable
from falcon_jax.methods.falcon import Falcon, Impl
from falcon_jax.methods.ranks import Rank
from falcon_jax.methods.tucker import ChannelRanks, Tucker
from falcon_jax.nn.compressed import ConvLike


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
