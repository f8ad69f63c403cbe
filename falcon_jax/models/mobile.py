"""Conv units of networks for mobile devices: ShuffleNet's, MobileNetV2's and ShuffleNetV2's.

StConv-branch and FALCON-branch convolve half of the channels and pass the other half on; PDPConv-t
and PDPConv-split are the units of MobileNetV2 and ShuffleNetV2, GDGConv is that of ShuffleNet.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from falcon_jax.methods.base import Method
from falcon_jax.models.units import (
    PAD_ONE,
    ConvUnit,
    UnitFactory,
    channel_shuffle,
    depthwise_3x3,
    method_unit,
    pointwise,
    unbiased_unit,
)
from falcon_jax.settings import is_number, is_whole


class BranchUnit(nnx.Module):
    """Two branches of N / 2 channels each, concatenated and shuffled.

    Where neither channels nor stride change, the first half of the input passes as it is and the
    second goes through 3x3 convolution, BatchNorm and ReLU. Elsewhere both branches do so, from all
    M channels to N / 2.

    The unit stands for convolution, BatchNorm and ReLU together. It is no drop-in for a bare
    convolution; its inner convolutions can be replaced like any other.

    Args:
        in_features: input channels M.
        out_features: output channels N, an even number.
        strides: step between outputs.
        inner: factory of the convolutions in the branches.
        dtype: of the computation.
        rngs: for parameters.

    Raises:
        ValueError: if the output channels cannot be halved.

    Reference:
        FALCON, Section 3.5 and Figure 3; ShuffleNetV2 (Ma et al., 2018), Section 4.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        strides: int = 1,
        inner: UnitFactory = unbiased_unit,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        half = _half_of(in_features, out_features, "branch unit")
        self.left = nnx.data(None)
        passes = _passes_half(in_features, out_features, strides)
        if not passes:
            self.left = inner(
                in_features, half, strides=strides, activate=True, dtype=dtype, rngs=rngs
            )
        self.right = inner(
            half if passes else in_features,
            half,
            strides=strides,
            activate=True,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "b h w m"]) -> Float[Array, "b h_out w_out n"]:
        """Apply the unit to a batch of feature maps."""
        return _in_two_branches(x, self.left, self.right)


def branch_unit(method: Method | None = None) -> UnitFactory:
    """Return a factory of branch units: StConv-branch, or FALCON-branch with ``Falcon()``.

    FALCON-branch fitted to trained kernels is the StConv-branch model, compressed by ``compress``.

    Args:
        method: carries the inner convolutions out; standard ones if None.

    Returns:
        A unit factory. The branches end with ReLU, whatever ``activate`` says.

    Reference:
        FALCON, Section 3.5.

    >>> from falcon_jax.methods.falcon import Falcon
    >>> unit = branch_unit(Falcon())(8, 8, rngs=nnx.Rngs(0))
    >>> unit.left is None, unit.right.conv.method  # the first half passes
    (True, Falcon(rank=1, impl='auto'))
    """
    inner = unbiased_unit if method is None else method_unit(method)

    def unit(
        in_features: int,
        out_features: int,
        *,
        strides: int = 1,
        activate: bool = True,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ) -> BranchUnit:
        return BranchUnit(
            in_features, out_features, strides=strides, inner=inner, dtype=dtype, rngs=rngs
        )

    return unit


def _half_of(in_features: int, out_features: int, name: str) -> int:
    """Return half of the output channels.

    Args:
        in_features: input channels, for the message.
        out_features: output channels.
        name: of the unit, for the message.

    Raises:
        ValueError: if there are an odd number of them.
    """
    if out_features % 2:
        raise ValueError(
            f"a {name} from {in_features} to {out_features} channels cannot be halved: give an "
            f"even number of output channels, such as {out_features - 1} or {out_features + 1}, "
            "by another width multiplier."
        )
    return out_features // 2


def _passes_half(in_features: int, out_features: int, strides: int) -> bool:
    """Say whether half of the input can pass as it is: neither channels nor stride change."""
    return in_features == out_features and strides == 1


def _in_two_branches(
    x: Float[Array, "b h w m"], left: nnx.Module | None, right: nnx.Module
) -> Float[Array, "b h_out w_out n"]:
    """Apply two branches side by side and shuffle what they give.

    Args:
        x: input.
        left: first branch; None passes the first half of the channels as it is, and hands only the
            second half on to the other branch.
        right: second branch.

    Returns:
        Both results, concatenated and shuffled in two groups.
    """
    first, second = jnp.split(x, 2, axis=-1) if left is None else (x, x)
    first = first if left is None else left(first)  # type: ignore[operator]
    y = jnp.concatenate([first, right(second)], axis=-1)  # type: ignore[operator]
    return channel_shuffle(y, 2)


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

    >>> unit = pdp_unit(0.5)(8, 16, rngs=nnx.Rngs(0))
    >>> unit.expand.conv.kernel.shape, unit.project.conv.kernel.shape
    ((1, 1, 8, 4), (1, 1, 4, 16))
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
        half = _half_of(in_features, out_features, "PDPConv-split")
        passes = _passes_half(in_features, out_features, strides)
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
        return _in_two_branches(x, self.left, self.right)


def pdp_split_unit(
    in_features: int,
    out_features: int,
    *,
    strides: int = 1,
    activate: bool = True,
    dtype: Dtype | None = None,
    rngs: nnx.Rngs,
) -> PDPSplitUnit:
    """Return a PDPConv-split unit.

    Args:
        in_features: input channels M.
        out_features: output channels N, an even number.
        strides: step between outputs.
        activate: has no say: the branches end with ReLU.
        dtype: of the computation; parameters and statistics are float32.
        rngs: stream ``params``.

    Returns:
        The unit.

    Raises:
        ValueError: if the output channels cannot be halved.

    Reference:
        FALCON, Section 3.6.4.

    >>> unit = pdp_split_unit(8, 8, rngs=nnx.Rngs(0))
    >>> unit.left is None, unit.right.layers[0].conv.kernel.shape  # the first half passes
    (True, (1, 1, 4, 4))
    """
    return PDPSplitUnit(in_features, out_features, strides=strides, dtype=dtype, rngs=rngs)


def _pointwise(m: int, n: int, dtype: Dtype | None, rngs: nnx.Rngs) -> ConvUnit:
    conv = pointwise(m, n, use_bias=False, dtype=dtype, rngs=rngs)
    return ConvUnit(conv, n, activation=jax.nn.relu, dtype=dtype, rngs=rngs)


def _depthwise(features: int, strides: int, dtype: Dtype | None, rngs: nnx.Rngs) -> ConvUnit:
    conv = depthwise_3x3(features, strides, use_bias=False, dtype=dtype, rngs=rngs)
    return ConvUnit(conv, features, activation=None, dtype=dtype, rngs=rngs)


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
        _check_groups(in_features, out_features, inner, last, groups)
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

    >>> unit = gdg_unit(2)(8, 8, rngs=nnx.Rngs(0))
    >>> unit.compress.conv.kernel.shape, unit.expand.conv.kernel.shape  # inputs of one group
    ((1, 1, 4, 2), (1, 1, 1, 8))
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


def _check_groups(in_features: int, out_features: int, inner: int, last: int, groups: int) -> None:
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
