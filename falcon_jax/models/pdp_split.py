"""PDPConv-split: the unit of ShuffleNetV2 as a conv unit."""

import jax
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from falcon_jax.models.branch import half_of, in_two_branches, passes_half
from falcon_jax.models.convolutions import depthwise_3x3, pointwise
from falcon_jax.models.units import ConvUnit


class PDPSplitUnit(nnx.Module):
    """PDPConv on half of the channels; the other half passes. Concatenated and shuffled.

    The branch: 1x1, BatchNorm, ReLU, 3x3 depthwise, BatchNorm, 1x1, BatchNorm, ReLU. Where channels
    or stride change, the branch goes from all M channels to N / 2, and so does a second one: 3x3
    depthwise, BatchNorm, 1x1, BatchNorm, ReLU.

    The unit stands for convolution, BatchNorm and ReLU together and is trained from scratch. It is
    no drop-in for a bare convolution: it is not linear, so no kernel can be fitted.

    Args:
        in_features: input channels M.
        out_features: output channels N, an even number.
        strides: step between outputs, of the depthwise convolutions.
        dtype: of the computation.
        rngs: for parameters.

    Raises:
        ValueError: if the output channels cannot be halved.

    Reference:
        FALCON, Section 3.6.4 and Table 2; ShuffleNetV2 (Ma et al., 2018), Figure 3.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        strides: int = 1,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        half = half_of(in_features, out_features, "PDPConv-split")
        passes = passes_half(in_features, out_features, strides)
        m = half if passes else in_features
        self.left = nnx.data(None)
        if not passes:
            self.left = nnx.Sequential(
                _depthwise(m, strides, dtype, rngs), _pointwise(m, half, dtype, rngs)
            )
        self.right = nnx.Sequential(
            _pointwise(m, half, dtype, rngs),
            _depthwise(half, strides, dtype, rngs),
            _pointwise(half, half, dtype, rngs),
        )

    def __call__(self, x: Float[Array, "b h w m"]) -> Float[Array, "b h_out w_out n"]:
        """Apply the unit to a batch of feature maps."""
        return in_two_branches(x, self.left, self.right)


def pdp_split_unit(
    in_features: int,
    out_features: int,
    *,
    strides: int = 1,
    activate: bool = True,
    dtype: Dtype | None = None,
    rngs: nnx.Rngs,
) -> PDPSplitUnit:
    """Return a PDPConv-split unit. Its branches end with ReLU, whatever ``activate`` says."""
    return PDPSplitUnit(in_features, out_features, strides=strides, dtype=dtype, rngs=rngs)


def _pointwise(m: int, n: int, dtype: Dtype | None, rngs: nnx.Rngs) -> ConvUnit:
    conv = pointwise(m, n, use_bias=False, dtype=dtype, rngs=rngs)
    return ConvUnit(conv, n, activation=jax.nn.relu, dtype=dtype, rngs=rngs)


def _depthwise(features: int, strides: int, dtype: Dtype | None, rngs: nnx.Rngs) -> ConvUnit:
    conv = depthwise_3x3(features, strides, use_bias=False, dtype=dtype, rngs=rngs)
    return ConvUnit(conv, features, activation=None, dtype=dtype, rngs=rngs)
