"""GDGConv: the unit of ShuffleNet as a conv unit."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from falcon_jax.models.units import (
    PAD_ONE,
    ConvUnit,
    UnitFactory,
    channel_shuffle,
    depthwise_3x3,
    pointwise,
)
from falcon_jax.settings import is_whole

_BOTTLENECK = 4


class GDGUnit(nnx.Module):
    """Group pointwise, shuffle, depthwise and group pointwise convolution beside a shortcut.

    1x1 in g groups to b channels, BatchNorm, ReLU, shuffle; 3x3 depthwise, BatchNorm; 1x1 in g
    groups, BatchNorm. All three convolutions have biases. Where M is N, the last one gives N
    channels and the input is added; elsewhere it gives N - M and the input is put before them. b is
    a quarter of the channels that the last one gives. With strides, the shortcut is averaged over
    3x3 points.

    The unit stands for convolution, BatchNorm and ReLU together and is trained from scratch. It is
    no drop-in for a bare convolution: it is not linear, so no kernel can be fitted.

    Args:
        in_features: input channels M.
        out_features: output channels N, not less than M.
        strides: step between outputs, of the depthwise convolution.
        groups: number g; it divides M, b and the channels that the last convolution gives.
        activate: whether ReLU ends the unit.
        dtype: of the computation.
        rngs: for parameters.

    Raises:
        ValueError: if the groups do not divide the channels, or N is less than M.

    Reference:
        FALCON, Section 3.6.3 and Table 2; ShuffleNet (Zhang et al., 2018), Section 3.2.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        strides: int = 1,
        groups: int,
        activate: bool = True,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        self.adds = in_features == out_features
        last = out_features if self.adds else out_features - in_features
        inner = last // _BOTTLENECK
        _check(in_features, out_features, inner, last, groups)
        compress = pointwise(
            in_features, inner, groups=groups, use_bias=True, dtype=dtype, rngs=rngs
        )
        self.compress = ConvUnit(compress, inner, dtype=dtype, rngs=rngs)
        depthwise = depthwise_3x3(inner, strides, use_bias=True, dtype=dtype, rngs=rngs)
        self.depthwise = ConvUnit(depthwise, inner, activation=None, dtype=dtype, rngs=rngs)
        expand = pointwise(inner, last, groups=groups, use_bias=True, dtype=dtype, rngs=rngs)
        self.expand = ConvUnit(expand, last, activation=None, dtype=dtype, rngs=rngs)
        self.strides = strides
        self.groups = groups
        self.activate = activate

    def __call__(self, x: Float[Array, "b h w m"]) -> Float[Array, "b h_out w_out n"]:
        """Apply the unit to a batch of feature maps."""
        y = channel_shuffle(self.compress(x), self.groups)
        y = self.expand(self.depthwise(y))
        if self.strides != 1:
            x = nnx.avg_pool(x, (3, 3), (self.strides,) * 2, PAD_ONE)  # type: ignore[arg-type]
        y = x + y if self.adds else jnp.concatenate([x, y], axis=-1)
        return jax.nn.relu(y) if self.activate else y


def gdg_unit(groups: int = 2) -> UnitFactory:
    """Return a factory of GDGConv units.

    Args:
        groups: number g of groups of the pointwise convolutions; the paper takes 2.

    Returns:
        A unit factory.

    Raises:
        ValueError: if there is no such number of groups.

    Reference:
        FALCON, Section 4.1.4.
    """
    if not is_whole(groups) or groups < 1:
        raise ValueError(f"groups is a whole number of at least 1; got {groups!r}.")

    def unit(
        in_features: int,
        out_features: int,
        *,
        strides: int = 1,
        activate: bool = True,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ) -> GDGUnit:
        return GDGUnit(
            in_features,
            out_features,
            strides=strides,
            groups=groups,
            activate=activate,
            dtype=dtype,
            rngs=rngs,
        )

    return unit


def _check(in_features: int, out_features: int, inner: int, last: int, groups: int) -> None:
    layer = f"GDGConv from {in_features} to {out_features} channels"
    if last < _BOTTLENECK:
        raise ValueError(
            f"{layer} has {last} channels to make, and needs {_BOTTLENECK} at least: give equal "
            "numbers (the input is added) or more output channels (it is concatenated)."
        )
    if groups < 1 or any(channels % groups for channels in (in_features, inner, last)):
        raise ValueError(
            f"{layer}: groups={groups} does not divide the {in_features} input channels, the "
            f"{inner} inner and the {last} new ones. Give a divisor of all three, or another "
            "width multiplier."
        )
