"""`ConvSpec`: everything about a convolution but its weights."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from falcon_jax.numeric import as_whole, as_wholes
from falcon_jax.ops.geometry import (
    Padding,
    PaddingLike,
    PerAxis,
    canonical_padding,
    output_shape,
    per_axis,
)


@dataclasses.dataclass(frozen=True, kw_only=True, init=False)
class ConvSpec:
    """A convolution's geometry, with as many spatial axes as ``kernel_size`` has entries.

    Whole numbers given for ``kernel_size`` (one axis), ``strides``, ``padding`` or a dilation are
    spread over the axes, so that equal convolutions have equal specs.

    Attributes:
        kernel_size: taps per spatial axis.
        in_features: input channels M.
        out_features: output channels N.
        strides: step between outputs, per axis.
        padding: SAME, SAME_LOWER, VALID, CIRCULAR, REFLECT, CAUSAL or ``(low, high)`` pairs.
        kernel_dilation: distance between taps, per axis.
        input_dilation: distance between input points, per axis.
        feature_group_count: groups that the channels are split into.
        use_bias: whether a bias of N entries is added.

    Raises:
        ValueError: if a size is no positive whole number, or sizes do not fit each other.

    >>> ConvSpec(kernel_size=(3, 3), in_features=4, out_features=8, padding=1).padding
    ((1, 1), (1, 1))
    """

    kernel_size: tuple[int, ...]
    in_features: int
    out_features: int
    strides: tuple[int, ...]
    padding: Padding
    kernel_dilation: tuple[int, ...]
    input_dilation: tuple[int, ...]
    feature_group_count: int
    use_bias: bool

    def __init__(
        self,
        *,
        kernel_size: int | Sequence[int],
        in_features: int,
        out_features: int,
        strides: PerAxis = 1,
        padding: PaddingLike = "SAME",
        kernel_dilation: PerAxis = 1,
        input_dilation: PerAxis = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
    ):
        one = as_whole(kernel_size)
        size = as_wholes(kernel_size) if one is None else (one,)
        if size is None or None in size:
            raise ValueError(
                f"kernel_size is a whole number, or one for each spatial axis; got {kernel_size!r}."
            )
        axes = len(size)
        values = {
            "kernel_size": size,
            "in_features": _whole("in_features", in_features),
            "out_features": _whole("out_features", out_features),
            "strides": per_axis("strides", strides, axes),
            "padding": canonical_padding(padding, axes),
            "kernel_dilation": per_axis("kernel_dilation", kernel_dilation, axes),
            "input_dilation": per_axis("input_dilation", input_dilation, axes),
            "feature_group_count": _whole("feature_group_count", feature_group_count),
            "use_bias": use_bias,
        }
        if not isinstance(use_bias, bool):
            raise ValueError(f"use_bias is True or False; got {use_bias!r}.")
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self._validate()

    def _validate(self) -> None:
        size = self.kernel_size
        positive = (*size, self.in_features, self.out_features, *self.strides)
        positive += (*self.kernel_dilation, *self.input_dilation, self.feature_group_count)
        if not size or min(positive) < 1:
            raise ValueError(
                f"a convolution needs at least one spatial axis, and positive sizes, strides, "
                f"dilations and groups; got {self}."
            )
        groups = self.feature_group_count
        if self.in_features % groups or self.out_features % groups:
            raise ValueError(
                f"feature_group_count={groups} does not divide in_features={self.in_features} and "
                f"out_features={self.out_features}."
            )
        if self.padding == "CAUSAL" and len(size) != 1:
            raise ValueError(
                f"CAUSAL padding is for one spatial axis; got kernel_size={size}. "
                "Give explicit (low, high) pairs instead."
            )

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Shape of the standard kernel: ``(*kernel_size, M / groups, N)``."""
        return (*self.kernel_size, self.group_in_features, self.out_features)

    @property
    def group_in_features(self) -> int:
        """Input channels of one group."""
        return self.in_features // self.feature_group_count

    @property
    def geometry(self) -> dict[str, Any]:
        """Strides, padding and dilations, as the functions of `falcon_jax.ops` take them."""
        return {
            "strides": self.strides,
            "padding": self.padding,
            "input_dilation": self.input_dilation,
            "kernel_dilation": self.kernel_dilation,
        }

    @property
    def taps(self) -> int:
        """Points of the kernel: D^2 for a square one."""
        return math.prod(self.kernel_size)

    def output_shape(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """Return the spatial output sizes for the given spatial input sizes.

        Raises:
            ValueError: if there is not one size, 0 or more, for each spatial axis.
        """
        if len(spatial) != len(self.kernel_size) or min(spatial) < 0:
            raise ValueError(
                f"give one size, 0 or more, for each of the {len(self.kernel_size)} spatial axes; "
                f"got {tuple(spatial)}."
            )
        return output_shape(spatial, self.kernel_size, **self.geometry)

    @classmethod
    def of_kernel(cls, shape: Sequence[int]) -> "ConvSpec":
        """Return the plain convolution (stride 1, SAME, no bias) with a kernel of this shape.

        Raises:
            ValueError: if the shape has fewer than three axes.
        """
        if len(shape) < 3:
            raise ValueError(
                f"a convolution kernel has shape (*kernel_size, in, out), three axes or more; "
                f"got {tuple(shape)}."
            )
        *size, m, n = shape
        return cls(kernel_size=tuple(size), in_features=m, out_features=n, use_bias=False)


def _whole(name: str, value: Any) -> int:
    number = as_whole(value)
    if number is None:
        raise ValueError(f"{name} is a whole number; got {value!r}.")
    return number
