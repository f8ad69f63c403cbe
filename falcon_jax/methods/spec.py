"""`ConvSpec`: everything about a convolution but its weights."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from falcon_jax.ops.geometry import PADDING_NAMES, Padding, output_shape

PerAxis = int | Sequence[int] | None
PaddingLike = str | int | Sequence[int | tuple[int, int] | Sequence[int]]


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
        ValueError: if a size is not positive, or sizes do not fit each other.

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
        size = (kernel_size,) if isinstance(kernel_size, int) else tuple(map(int, kernel_size))
        axes = len(size)
        values = {
            "kernel_size": size,
            "in_features": in_features,
            "out_features": out_features,
            "strides": _per_axis("strides", strides, axes),
            "padding": _canonical_padding(padding, axes),
            "kernel_dilation": _per_axis("kernel_dilation", kernel_dilation, axes),
            "input_dilation": _per_axis("input_dilation", input_dilation, axes),
            "feature_group_count": feature_group_count,
            "use_bias": use_bias,
        }
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
        """Return the spatial output sizes for the given spatial input sizes."""
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


def _per_axis(name: str, value: PerAxis, axes: int) -> tuple[int, ...]:
    if value is None:
        return (1,) * axes
    if isinstance(value, int):
        return (value,) * axes
    if len(value) != axes:
        raise ValueError(
            f"{name} has {len(value)} entries for {axes} spatial axes: {tuple(value)}. "
            "Give one number, or one for each axis."
        )
    return tuple(int(v) for v in value)


def _canonical_padding(padding: PaddingLike, axes: int) -> Padding:
    if isinstance(padding, str):
        if padding in PADDING_NAMES:
            return padding
    elif isinstance(padding, int):
        return ((padding, padding),) * axes
    elif len(padding) == axes:
        pairs = [(p, p) if isinstance(p, int) else tuple(p) for p in padding]
        if all(len(pair) == 2 for pair in pairs):
            return tuple((int(low), int(high)) for low, high in pairs)
    raise ValueError(
        f"padding {padding!r} is not one of {', '.join(PADDING_NAMES)}, a whole number, or a "
        f"number or (low, high) pair for each of the {axes} spatial axes."
    )
