"""PDPConv-t and PDPConv-split: the units of MobileNetV2 and ShuffleNetV2 as conv units."""

import jax
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from falcon_jax.models.branch import half_of, in_two_branches, passes_half
from falcon_jax.models.units import ConvUnit, UnitFactory, depthwise_3x3, pointwise
from falcon_jax.settings import is_number


class PDPUnit(nnx.Module):
    """Pointwise, depthwise and pointwise convolution beside a shortcut.

    1x1 to t M channels, 3x3 depthwise, both with BatchNorm and ReLU6; 1x1 to N with BatchNorm and
    no activation. Where the stride is 1, the input is added, through a 1x1 convolution with
    BatchNorm if M differs from N.

    The unit stands for convolution, BatchNorm and ReLU together and is trained from scratch. It is
    no drop-in for a bare convolution: it is not linear, so no kernel can be fitted.

    Args:
        in_features: input channels M.
        out_features: output channels N.
        strides: step between outputs, of the depthwise convolution.
        expansion: the ratio t of inner to input channels.
        dtype: of the computation.
        rngs: for parameters.

    Raises:
        ValueError: if the expansion leaves no inner channel.

    Reference:
        FALCON, Section 3.6.2 and Table 2; MobileNetV2 (Sandler et al., 2018), Section 3.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        strides: int = 1,
        expansion: float | int,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        inner = int(expansion * in_features)
        if inner < 1:
            raise ValueError(
                f"PDPConv from {in_features} to {out_features} channels has no inner channels with "
                f"expansion={expansion!r}; give at least 1 / {in_features}."
            )
        relu6 = jax.nn.relu6
        expand = pointwise(in_features, inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.expand = ConvUnit(expand, inner, activation=relu6, dtype=dtype, rngs=rngs)
        depthwise = depthwise_3x3(inner, strides, use_bias=False, dtype=dtype, rngs=rngs)
        self.depthwise = ConvUnit(depthwise, inner, activation=relu6, dtype=dtype, rngs=rngs)
        self.project = _linear(inner, out_features, dtype=dtype, rngs=rngs)
        self.residual = strides == 1
        self.shortcut = nnx.data(None)
        if self.residual and in_features != out_features:
            self.shortcut = _linear(in_features, out_features, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w m"]) -> Float[Array, "b h_out w_out n"]:
        """Apply the unit to a batch of feature maps."""
        y = self.project(self.depthwise(self.expand(x)))
        if not self.residual:
            return y
        return y + (x if self.shortcut is None else self.shortcut(x))


def pdp_unit(expansion: float | int = 0.5) -> UnitFactory:
    """Return a factory of PDPConv-t units.

    Args:
        expansion: the ratio t of inner to input channels; the paper takes 0.5.

    Returns:
        A unit factory. The units end linearly, whatever ``activate`` says, as in MobileNetV2.

    Raises:
        ValueError: if the expansion is no number above 0.

    Reference:
        FALCON, Section 4.1.4.
    """
    if not is_number(expansion) or expansion <= 0:
        raise ValueError(f"expansion is a finite number above 0; got {expansion!r}.")

    def unit(
        in_features: int,
        out_features: int,
        *,
        strides: int = 1,
        activate: bool = True,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ) -> PDPUnit:
        return PDPUnit(
            in_features, out_features, strides=strides, expansion=expansion, dtype=dtype, rngs=rngs
        )

    return unit


def _linear(
    in_features: int, out_features: int, *, dtype: Dtype | None, rngs: nnx.Rngs
) -> ConvUnit:
    conv = pointwise(in_features, out_features, use_bias=False, dtype=dtype, rngs=rngs)
    return ConvUnit(conv, out_features, activation=None, dtype=dtype, rngs=rngs)


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
