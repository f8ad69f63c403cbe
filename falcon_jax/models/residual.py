"""Residual blocks built from conv units, and stages of them."""

from collections.abc import Callable
from typing import ClassVar

import jax
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from falcon_jax.models.units import ConvUnit, UnitFactory


class BasicBlock(nnx.Module):
    """Two conv units beside a shortcut; ReLU after their sum.

    The shortcut is a 1x1 convolution with BatchNorm where the stride or the width changes, and the
    input itself elsewhere.

    Args:
        in_features: input channels.
        features: channels of the units.
        strides: of the first unit and the shortcut.
        unit: factory of the conv units.
        shortcut: whether there is one.
        dtype: of the computation.
        rngs: for parameters.
    """

    expansion: ClassVar[int] = 1

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        strides: int,
        unit: UnitFactory,
        shortcut: bool = True,
        dtype: Dtype | None,
        rngs: nnx.Rngs,
    ):
        self.unit1 = unit(
            in_features, features, strides=strides, activate=True, dtype=dtype, rngs=rngs
        )
        self.unit2 = unit(features, features, strides=1, activate=False, dtype=dtype, rngs=rngs)
        self.shortcut = nnx.data(
            _shortcut(in_features, features, strides, dtype, rngs) if shortcut else None
        )
        self.residual = shortcut

    def __call__(self, x: Float[Array, "b h w m"]) -> Float[Array, "b h_out w_out n"]:
        """Apply the block to a batch of feature maps."""
        y = self.unit2(self.unit1(x))  # type: ignore[operator]
        return _after(y, x, self.shortcut, self.residual)


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 units beside a shortcut; ReLU after their sum.

    The last unit gives 4 times the channels; the stride is the 3x3 unit's.

    Args:
        in_features: input channels.
        features: channels of the first two units.
        strides: of the 3x3 unit and the shortcut.
        unit: factory of the 3x3 unit.
        shortcut: whether there is one.
        dtype: of the computation.
        rngs: for parameters.
    """

    expansion: ClassVar[int] = 4

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        strides: int,
        unit: UnitFactory,
        shortcut: bool = True,
        dtype: Dtype | None,
        rngs: nnx.Rngs,
    ):
        out_features = self.expansion * features
        self.unit1 = _pointwise_unit(
            in_features, features, strides=1, activate=True, dtype=dtype, rngs=rngs
        )
        self.unit2 = unit(
            features, features, strides=strides, activate=True, dtype=dtype, rngs=rngs
        )
        self.unit3 = _pointwise_unit(
            features, out_features, strides=1, activate=False, dtype=dtype, rngs=rngs
        )
        self.shortcut = nnx.data(
            _shortcut(in_features, out_features, strides, dtype, rngs) if shortcut else None
        )
        self.residual = shortcut

    def __call__(self, x: Float[Array, "b h w m"]) -> Float[Array, "b h_out w_out n"]:
        """Apply the block to a batch of feature maps."""
        y = self.unit3(self.unit2(self.unit1(x)))  # type: ignore[operator]
        return _after(y, x, self.shortcut, self.residual)


def residual_stage(
    block: Callable[..., BasicBlock | Bottleneck],
    in_features: int,
    features: int,
    *,
    count: int,
    strides: int,
    unit: UnitFactory,
    shortcut: bool,
    dtype: Dtype | None,
    rngs: nnx.Rngs,
) -> nnx.List:
    """Return blocks in a row, the first one with strides.

    Args:
        block: class of the blocks.
        in_features: input channels.
        features: channels of the blocks' 3x3 units.
        count: number of blocks.
        strides: of the first block.
        unit: factory of the 3x3 units.
        shortcut: whether the blocks have shortcuts.
        dtype: of the computation.
        rngs: for parameters.

    Returns:
        The blocks.
    """
    expansion: int = block.expansion  # type: ignore[attr-defined]
    return nnx.List(
        block(
            expansion * features if index else in_features,
            features,
            strides=1 if index else strides,
            unit=unit,
            shortcut=shortcut,
            dtype=dtype,
            rngs=rngs,
        )
        for index in range(count)
    )


def _after(y: Array, x: Array, shortcut: nnx.Module | None, residual: bool) -> Array:
    if residual:
        y = y + (x if shortcut is None else shortcut(x))  # type: ignore[operator]
    return jax.nn.relu(y)


def _shortcut(
    in_features: int, out_features: int, strides: int, dtype: Dtype | None, rngs: nnx.Rngs
) -> ConvUnit | None:
    if strides == 1 and in_features == out_features:
        return None
    return _pointwise_unit(
        in_features, out_features, strides=strides, activate=False, dtype=dtype, rngs=rngs
    )


def _pointwise_unit(
    in_features: int,
    out_features: int,
    *,
    strides: int,
    activate: bool,
    dtype: Dtype | None,
    rngs: nnx.Rngs,
) -> ConvUnit:
    conv = nnx.Conv(
        in_features,
        out_features,
        (1, 1),
        strides,
        padding="VALID",
        use_bias=False,
        dtype=dtype,
        kernel_init=nnx.initializers.he_uniform(),
        rngs=rngs,
    )
    activation = jax.nn.relu if activate else None
    return ConvUnit(conv, out_features, activation=activation, dtype=dtype, rngs=rngs)
