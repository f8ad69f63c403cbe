"""NNX modules to be used like ``nnx.Conv``, one per method: thin names over `MethodConv`."""

from falcon_jax.methods.channel_decomposition import ChannelDecomposition
from falcon_jax.methods.cp import CP
from falcon_jax.methods.decoupled import Decoupled
from falcon_jax.methods.depthwise_separable import DepthwiseSeparable
from falcon_jax.methods.falcon import Falcon
from falcon_jax.methods.filter_summary import DifferentiableFilterSummary, FilterSummary
from falcon_jax.methods.spatial_decomposition import SpatialDecomposition
from falcon_jax.methods.tensor_train import TensorTrain
from falcon_jax.methods.tucker import Tucker
from falcon_jax.nn.method_conv import NamedConv


class FalconConv(NamedConv):
    """A rank-k FALCON convolution, to be used like ``nnx.Conv``.

    Parameters: ``pointwise`` of shape ``(M / groups, k, N)``, ``depthwise`` of shape
    ``(*kernel_size, k, N)`` and ``bias`` of shape ``(N,)``. Settings: ``rank``, the number k of
    terms, and ``impl``; see `Falcon`.

    Reference:
        FALCON, Sections 3.3 and 3.4.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> layer = FalconConv(16, 32, (3, 3), rank=2, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 8, 8, 16))).shape
    (1, 8, 8, 32)
    """

    method_class = Falcon


class DepthwiseSeparableConv(NamedConv):
    """A depthwise-then-pointwise convolution of rank k, to be used like ``nnx.Conv``.

    Parameters: ``depthwise`` of shape ``(*kernel_size, M, k)``, ``pointwise`` of shape
    ``(M / groups, k, N)`` and ``bias`` of shape ``(N,)``. Settings: ``rank``, the number of
    depthwise kernels per input channel; see `DepthwiseSeparable`.

    Reference:
        FALCON, Section 3.6.1.

    >>> from flax import nnx
    >>> layer = DepthwiseSeparableConv(16, 32, (3, 3), rank=2, rngs=nnx.Rngs(0))
    >>> {name: value.shape for name, value in layer.params.items()}
    {'depthwise': (3, 3, 16, 2), 'pointwise': (16, 2, 32)}
    """

    method_class = DepthwiseSeparable


class DecoupledConv(NamedConv):
    """A sum of pointwise and depthwise convolutions, to be used like ``nnx.Conv``.

    Parameters: those of `FalconConv`, or of `DepthwiseSeparableConv` for the other order, and
    ``bias`` of shape ``(N,)``. Settings: ``order``, ``terms`` and ``energy``; see `Decoupled`.

    Reference:
        Guo et al.: Network Decoupling, BMVC 2018.

    >>> from flax import nnx
    >>> layer = DecoupledConv(16, 32, (3, 3), terms=2, rngs=nnx.Rngs(0))
    >>> {name: value.shape for name, value in layer.params.items()}
    {'depthwise': (3, 3, 2, 32), 'pointwise': (16, 2, 32)}
    """

    method_class = Decoupled


class TuckerConv(NamedConv):
    """Pointwise, spatial and pointwise convolution, to be used like ``nnx.Conv``.

    Parameters: ``inner`` of shape ``(M, R_in)``, ``core`` of shape ``(*kernel_size, R_in, R_out)``,
    ``outer`` of shape ``(R_out, N)`` and ``bias`` of shape ``(N,)``. Settings: ``rank``, which is
    ``(R_in, R_out)``, one number for both, ``full`` or a `Budget`; see `Tucker`.

    Reference:
        Kim et al., ICLR 2016.

    >>> from flax import nnx
    >>> layer = TuckerConv(16, 32, (3, 3), rank=8, rngs=nnx.Rngs(0))
    >>> {name: value.shape for name, value in layer.params.items()}
    {'core': (3, 3, 8, 8), 'inner': (16, 8), 'outer': (8, 32)}
    """

    method_class = Tucker


class CPConv(NamedConv):
    """Pointwise, one depthwise step per axis, pointwise; to be used like ``nnx.Conv``.

    Parameters: ``inner`` of shape ``(M, R)``, ``axis0``, ``axis1``, ... of shape ``(D, R)``,
    ``outer`` of shape ``(R, N)`` and ``bias`` of shape ``(N,)``. Settings: ``rank``, the number R
    of terms or a `Budget`; see `CP`.

    Reference:
        Lebedev et al., ICLR 2015.

    >>> from flax import nnx
    >>> layer = CPConv(16, 32, (3, 3), rank=8, rngs=nnx.Rngs(0))
    >>> {name: value.shape for name, value in layer.params.items()}
    {'axis0': (3, 8), 'axis1': (3, 8), 'inner': (16, 8), 'outer': (8, 32)}
    """

    method_class = CP


class TensorTrainConv(NamedConv):
    """Pointwise, one convolution along each axis, pointwise; to be used like ``nnx.Conv``.

    Parameters: ``inner``, ``axis0``, ``axis1``, ..., ``outer`` and ``bias`` of shape ``(N,)``.
    Settings: ``rank``; see `TensorTrain`.

    Reference:
        Oseledets, SIAM J. Sci. Comput. 2011.

    >>> from flax import nnx
    >>> layer = TensorTrainConv(16, 32, (3, 3), rank=8, rngs=nnx.Rngs(0))
    >>> {name: value.shape for name, value in layer.params.items()}
    {'axis0': (3, 1, 8, 8), 'axis1': (1, 3, 8, 8), 'inner': (16, 8), 'outer': (8, 32)}
    """

    method_class = TensorTrain


class SpatialDecompositionConv(NamedConv):
    """A vertical convolution, then a horizontal one, to be used like ``nnx.Conv``.

    Parameters: ``vertical`` of shape ``(h, 1, M, r)``, ``horizontal`` of shape ``(1, w, r, N)`` and
    ``bias`` of shape ``(N,)``. Settings: ``rank`` and ``inner``; see `SpatialDecomposition`.

    Reference:
        Jaderberg et al., BMVC 2014.

    >>> from flax import nnx
    >>> layer = SpatialDecompositionConv(16, 32, (3, 3), rank=8, rngs=nnx.Rngs(0))
    >>> {name: value.shape for name, value in layer.params.items()}
    {'horizontal': (1, 3, 8, 32), 'vertical': (3, 1, 16, 8)}
    """

    method_class = SpatialDecomposition


class ChannelDecompositionConv(NamedConv):
    """A convolution to fewer channels, then a pointwise one; to be used like ``nnx.Conv``.

    Parameters: ``spatial`` of shape ``(*kernel_size, M, d)``, ``pointwise`` of shape ``(d, N)`` and
    ``bias`` of shape ``(N,)``. Settings: ``rank``, ``inner`` and ``relu``; see
    `ChannelDecomposition`.

    Reference:
        Zhang et al., TPAMI 2016.

    >>> from flax import nnx
    >>> layer = ChannelDecompositionConv(16, 32, (3, 3), rank=8, rngs=nnx.Rngs(0))
    >>> {name: value.shape for name, value in layer.params.items()}
    {'pointwise': (8, 32), 'spatial': (3, 3, 16, 8)}
    """

    method_class = ChannelDecomposition


class FilterSummaryConv(NamedConv):
    """A convolution whose filters are segments of one vector, to be used like ``nnx.Conv``.

    Parameters: ``summary`` of shape ``(L,)`` and ``bias`` of shape ``(N,)``. Settings: ``ratio``,
    ``step`` and ``reorder``; see `FilterSummary`.

    Reference:
        FSNet (Yang et al., 2019), Section 3.1.

    >>> from flax import nnx
    >>> layer = FilterSummaryConv(16, 32, (3, 3), ratio=4, rngs=nnx.Rngs(0))
    >>> {name: value.shape for name, value in layer.params.items()}
    {'summary': (1152,)}
    """

    method_class = FilterSummary


class DifferentiableFilterSummaryConv(NamedConv):
    """A filter summary with learned locations, to be used like ``nnx.Conv``.

    Parameters: ``summary`` of shape ``(L,)``, ``shift`` of shape ``(N,)`` and ``bias`` of shape
    ``(N,)``. Settings: ``ratio``; see `DifferentiableFilterSummary`.

    Reference:
        FSNet (Yang et al., 2019), Section 3.2.

    >>> from flax import nnx
    >>> layer = DifferentiableFilterSummaryConv(16, 32, (3, 3), ratio=4, rngs=nnx.Rngs(0))
    >>> {name: value.shape for name, value in layer.params.items()}
    {'shift': (32,), 'summary': (1152,)}
    """

    method_class = DifferentiableFilterSummary
