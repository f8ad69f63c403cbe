"""Linen modules to be used like ``linen.Conv``, one per method: thin names over `NamedConv`."""

from collections.abc import Sequence
from typing import Literal

from falcon_jax.methods.chain import HALF, ChainRank, Inner
from falcon_jax.methods.channel_decomposition import ChannelDecomposition
from falcon_jax.methods.cp import CP, TermRank
from falcon_jax.methods.decoupled import Decoupled, Order
from falcon_jax.methods.depthwise_separable import DepthwiseSeparable
from falcon_jax.methods.falcon import Falcon, Impl
from falcon_jax.methods.filter_summary import DifferentiableFilterSummary, FilterSummary, Step
from falcon_jax.methods.ranks import Budget, Rank
from falcon_jax.methods.spatial_decomposition import SpatialDecomposition
from falcon_jax.methods.tensor_train import TensorTrain
from falcon_jax.methods.tucker import ChannelRanks, Tucker
from falcon_jax.nn.compressed import NamedConv


class FalconConv(NamedConv):
    """A rank-k FALCON convolution, to be used like ``linen.Conv``.

    Parameters: ``pointwise`` of shape ``(M / groups, k, N)``, ``depthwise`` of shape
    ``(*kernel_size, k, N)`` and ``bias`` of shape ``(N,)``. Settings: ``rank``, the number k of
    terms, and ``impl``; see `Falcon`.

    Reference:
        FALCON, Sections 3.3 and 3.4.

    >>> import jax
    >>> layer = FalconConv(32, (3, 3), rank=2)
    >>> x = jax.ShapeDtypeStruct((1, 8, 8, 16), "f4")
    >>> shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    >>> {name: value.shape for name, value in sorted(shapes.items())}
    {'bias': (32,), 'depthwise': (3, 3, 2, 32), 'pointwise': (16, 2, 32)}
    """

    method_class = Falcon
    rank: Rank = 1
    impl: Impl = "auto"


class DepthwiseSeparableConv(NamedConv):
    """A depthwise-then-pointwise convolution of rank k, to be used like ``linen.Conv``.

    Parameters: ``depthwise`` of shape ``(*kernel_size, M, k)``, ``pointwise`` of shape
    ``(M / groups, k, N)`` and ``bias`` of shape ``(N,)``. Settings: ``rank``, the number of
    depthwise kernels per input channel; see `DepthwiseSeparable`.

    Reference:
        FALCON, Section 3.6.1.

    >>> import jax
    >>> layer = DepthwiseSeparableConv(32, (3, 3), rank=2)
    >>> x = jax.ShapeDtypeStruct((1, 8, 8, 16), "f4")
    >>> shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    >>> {name: value.shape for name, value in sorted(shapes.items())}
    {'bias': (32,), 'depthwise': (3, 3, 16, 2), 'pointwise': (16, 2, 32)}
    """

    method_class = DepthwiseSeparable
    rank: Rank = 1


class DecoupledConv(NamedConv):
    """A sum of pointwise and depthwise convolutions, to be used like ``linen.Conv``.

    Parameters: those of `FalconConv`, or of `DepthwiseSeparableConv` for the other order, and
    ``bias`` of shape ``(N,)``. Settings: ``order``, ``terms`` and ``energy``; see `Decoupled`.

    Reference:
        Guo et al.: Network Decoupling, BMVC 2018.

    >>> import jax
    >>> layer = DecoupledConv(32, (3, 3), terms=2)
    >>> x = jax.ShapeDtypeStruct((1, 8, 8, 16), "f4")
    >>> shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    >>> {name: value.shape for name, value in sorted(shapes.items())}
    {'bias': (32,), 'depthwise': (3, 3, 2, 32), 'pointwise': (16, 2, 32)}
    """

    method_class = Decoupled
    order: Order = "pw-dw"
    terms: int | Literal["full"] | None = None
    energy: float | int | None = None


class TuckerConv(NamedConv):
    """Pointwise, spatial and pointwise convolution, to be used like ``linen.Conv``.

    Parameters: ``inner`` of shape ``(M, R_in)``, ``core`` of shape ``(*kernel_size, R_in, R_out)``,
    ``outer`` of shape ``(R_out, N)`` and ``bias`` of shape ``(N,)``. Settings: ``rank``, which is
    ``(R_in, R_out)``, one number for both, ``full`` or a `Budget`; see `Tucker`.

    Reference:
        Kim et al., ICLR 2016.

    >>> import jax
    >>> layer = TuckerConv(32, (3, 3), rank=(4, 8))
    >>> x = jax.ShapeDtypeStruct((1, 8, 8, 16), "f4")
    >>> shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    >>> {name: value.shape for name, value in sorted(shapes.items())}
    {'bias': (32,), 'core': (3, 3, 4, 8), 'inner': (16, 4), 'outer': (8, 32)}
    """

    method_class = Tucker
    rank: ChannelRanks = "vbmf"


class CPConv(NamedConv):
    """Pointwise, one depthwise step per axis, pointwise; to be used like ``linen.Conv``.

    Parameters: ``inner`` of shape ``(M, R)``, ``axis0``, ``axis1``, ... of shape ``(D, R)``,
    ``outer`` of shape ``(R, N)`` and ``bias`` of shape ``(N,)``. Settings: ``rank``, the number R
    of terms or a `Budget`; see `CP`.

    Reference:
        Lebedev et al., ICLR 2015.

    >>> import jax
    >>> layer = CPConv(32, (3, 3), rank=8)
    >>> x = jax.ShapeDtypeStruct((1, 8, 8, 16), "f4")
    >>> shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    >>> {name: value.shape for name, value in sorted(shapes.items())}
    {'axis0': (3, 8), 'axis1': (3, 8), 'bias': (32,), 'inner': (16, 8), 'outer': (8, 32)}
    """

    method_class = CP
    rank: TermRank = "vbmf"


class TensorTrainConv(NamedConv):
    """Pointwise, one convolution along each axis, pointwise; to be used like ``linen.Conv``.

    Parameters: ``inner``, ``axis0``, ``axis1``, ..., ``outer`` and ``bias`` of shape ``(N,)``.
    Settings: ``rank``; see `TensorTrain`.

    Reference:
        Oseledets, SIAM J. Sci. Comput. 2011.

    >>> import jax
    >>> layer = TensorTrainConv(8, (3, 3), rank=4)
    >>> x = jax.ShapeDtypeStruct((1, 8, 8, 16), "f4")
    >>> shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    >>> {name: value.shape for name, value in sorted(shapes.items())}
    {'axis0': (3, 1, 4, 4), 'axis1': (1, 3, 4, 4), 'bias': (8,), 'inner': (16, 4), 'outer': (4, 8)}
    """

    method_class = TensorTrain
    rank: int | Sequence[int] | Literal["full"] | Budget = HALF


class SpatialDecompositionConv(NamedConv):
    """A vertical convolution, then a horizontal one, to be used like ``linen.Conv``.

    Parameters: ``vertical`` of shape ``(h, 1, M, r)``, ``horizontal`` of shape ``(1, w, r, N)`` and
    ``bias`` of shape ``(N,)``. Settings: ``rank`` and ``inner``; see `SpatialDecomposition`.

    Reference:
        Jaderberg et al., BMVC 2014.

    >>> import jax
    >>> layer = SpatialDecompositionConv(32, (3, 3), rank=8)
    >>> x = jax.ShapeDtypeStruct((1, 8, 8, 16), "f4")
    >>> shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    >>> {name: value.shape for name, value in sorted(shapes.items())}
    {'bias': (32,), 'horizontal': (1, 3, 8, 32), 'vertical': (3, 1, 16, 8)}
    """

    method_class = SpatialDecomposition
    rank: ChainRank = HALF
    inner: Inner | Sequence[Inner] = None


class ChannelDecompositionConv(NamedConv):
    """A convolution to fewer channels, then a pointwise one; to be used like ``linen.Conv``.

    Parameters: ``spatial`` of shape ``(*kernel_size, M, d)``, ``pointwise`` of shape ``(d, N)`` and
    ``bias`` of shape ``(N,)``. Settings: ``rank``, ``inner`` and ``relu``; see
    `ChannelDecomposition`.

    Reference:
        Zhang et al., TPAMI 2016.

    >>> import jax
    >>> layer = ChannelDecompositionConv(32, (3, 3), rank=8)
    >>> x = jax.ShapeDtypeStruct((1, 8, 8, 16), "f4")
    >>> shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    >>> {name: value.shape for name, value in sorted(shapes.items())}
    {'bias': (32,), 'pointwise': (8, 32), 'spatial': (3, 3, 16, 8)}
    """

    method_class = ChannelDecomposition
    rank: ChainRank = HALF
    inner: Inner | Sequence[Inner] = None
    relu: bool = False


class FilterSummaryConv(NamedConv):
    """A convolution whose filters are segments of one vector, to be used like ``linen.Conv``.

    Parameters: ``summary`` of shape ``(L,)`` and ``bias`` of shape ``(N,)``. Settings: ``ratio``,
    ``step`` and ``reorder``; see `FilterSummary`.

    Reference:
        FSNet (Yang et al., 2019), Section 3.1.

    >>> import jax
    >>> layer = FilterSummaryConv(32, (3, 3), ratio=4)
    >>> x = jax.ShapeDtypeStruct((1, 8, 8, 16), "f4")
    >>> shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    >>> {name: value.shape for name, value in sorted(shapes.items())}
    {'bias': (32,), 'summary': (1152,)}
    """

    method_class = FilterSummary
    ratio: float | int = 4.0
    step: Step = "even"
    reorder: bool | Sequence[int] = False


class DifferentiableFilterSummaryConv(NamedConv):
    """A filter summary with learned locations, to be used like ``linen.Conv``.

    Parameters: ``summary`` of shape ``(L,)``, ``shift`` of shape ``(N,)`` and ``bias`` of shape
    ``(N,)``. Settings: ``ratio``; see `DifferentiableFilterSummary`.

    Reference:
        FSNet (Yang et al., 2019), Section 3.2.

    >>> import jax
    >>> layer = DifferentiableFilterSummaryConv(32, (3, 3), ratio=4)
    >>> x = jax.ShapeDtypeStruct((1, 8, 8, 16), "f4")
    >>> shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    >>> {name: value.shape for name, value in sorted(shapes.items())}
    {'bias': (32,), 'shift': (32,), 'summary': (1152,)}
    """

    method_class = DifferentiableFilterSummary
    ratio: float | int = 4.0
