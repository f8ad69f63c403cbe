"""Geometry of a convolution: `ConvSpec`, where its taps fall, padding and output sizes."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import max_dim
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from falcon_jax.settings import as_whole, as_wholes

Size = Any  # a whole number, or in jax.export a symbolic one
Pairs = tuple[tuple[Size, Size], ...]
Padding = str | Pairs
# What users may give.
PerAxis = int | Sequence[int] | None
PaddingLike = str | int | Sequence[int | tuple[int, int] | Sequence[int]]
# (strides, padding, input_dilation, kernel_dilation), hashable.
Geometry = tuple[tuple[int, ...], Pairs, tuple[int, ...], tuple[int, ...]]

BOUNDARY_MODES = {"CIRCULAR": "wrap", "REFLECT": "reflect"}
PADDING_NAMES = ("SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", "CAUSAL")


def per_axis(name: str, value: PerAxis, axes: int) -> tuple[int, ...]:
    """Return one whole number for each axis: a single one is spread, None stands for 1.

    Raises:
        ValueError: with the name, if that is not what is given.
    """
    one = 1 if value is None else as_whole(value)
    if one is not None:
        return (one,) * axes
    given = as_wholes(value)
    if given is None or None in given:
        raise ValueError(f"{name} is a whole number, or one for each axis; got {value!r}.")
    if len(given) != axes:
        raise ValueError(
            f"{name} has {len(given)} entries for {axes} spatial axes: {given}. "
            "Give one number, or one for each axis."
        )
    return given  # type: ignore[return-value]


def canonical_padding(padding: PaddingLike, axes: int) -> Padding:
    """Return the name of a padding in capitals, or its ``(low, high)`` pairs.

    Raises:
        ValueError: if it is neither a name, nor whole numbers for the axes.
    """
    if isinstance(padding, str):
        if padding.upper() in PADDING_NAMES:
            return padding.upper()
    else:
        one, entries = as_whole(padding), as_wholes(padding)
        if one is not None:
            return ((one, one),) * axes
        if entries is not None and len(entries) == axes:
            pairs = tuple(
                as_wholes(given) if one is None else (one, one)
                for given, one in zip(padding, entries, strict=True)  # type: ignore[arg-type]
            )
            if all(pair is not None and len(pair) == 2 and None not in pair for pair in pairs):
                return pairs  # type: ignore[return-value]
    raise ValueError(
        f"padding {padding!r} is not one of {', '.join(PADDING_NAMES)}, a whole number, or a "
        f"number or (low, high) pair for each of the {axes} spatial axes."
    )


def known(*sizes: Size) -> bool:
    """Return whether sizes are numbers, none of them symbolic as in an exported function."""
    return all(isinstance(size, int) for size in sizes)


def at_least(least: int, size: Size) -> Size:
    """Return the larger of a number and a size, which may be symbolic."""
    return max(size, least) if known(size) else max_dim(size, least)


def dilated(size: Size, dilation: int) -> Size:
    """Return the extent of ``size`` points that lie ``dilation`` apart.

    >>> dilated(3, 2)
    5
    """
    return size if dilation == 1 else at_least(0, (size - 1) * dilation + 1)


def padding_pairs(
    padding: Padding,
    spatial: Sequence[Size],
    kernel_size: Sequence[int],
    *,
    strides: Sequence[int],
    input_dilation: Sequence[int],
    kernel_dilation: Sequence[int],
) -> Pairs:
    """Return how many points a padding adds before and after each spatial axis.

    SAME gives ``ceil(n / stride)`` outputs for a (dilated) input of n points, the odd point at the
    end (at the start for SAME_LOWER); CIRCULAR and REFLECT add ``(D - 1) // 2`` before and
    ``D // 2`` after; CAUSAL adds ``D - 1`` before, with D the dilated kernel size.

    Args:
        padding: a name out of ``PADDING_NAMES`` or explicit ``(low, high)`` pairs.
        spatial: sizes of the input's spatial axes, before input dilation; symbolic ones, too.
        kernel_size: taps per axis.
        strides: step between outputs, per axis.
        input_dilation: distance between input points, per axis.
        kernel_dilation: distance between taps, per axis.

    Returns:
        One ``(low, high)`` pair per axis, in points of the dilated input.

    Raises:
        ValueError: if negative pairs take away more points than there are.
    """
    padding = canonical_padding(padding, len(kernel_size))
    if not isinstance(padding, str):
        points = [dilated(n, di) for n, di in zip(spatial, input_dilation, strict=True)]
        left = [n + low + high for n, (low, high) in zip(points, padding, strict=True)]
        if any(known(n) and n < 0 for n in left):
            raise ValueError(
                f"padding {padding} takes more away than the {points} points that there are along "
                "the axes; give pairs that leave 0 points or more."
            )
        return padding
    pairs = []
    for n, k, s, di, dk in zip(
        spatial, kernel_size, strides, input_dilation, kernel_dilation, strict=True
    ):
        extent = dilated(k, dk)
        if padding == "VALID":
            pairs.append((0, 0))
        elif padding == "CAUSAL":
            pairs.append((extent - 1, 0))
        elif padding in BOUNDARY_MODES:
            pairs.append(((extent - 1) // 2, extent // 2))
        else:
            points = dilated(n, di)
            total = at_least(0, ((points + s - 1) // s - 1) * s + extent - points)
            low = total // 2 if padding == "SAME" else total - total // 2
            pairs.append((low, total - low))
    return tuple(pairs)


def pad_boundary(
    x: Float[Array, "b *spatial c"],
    padding: Padding,
    kernel_size: Sequence[int],
    *,
    kernel_dilation: Sequence[int],
) -> tuple[Float[Array, "b *padded c"], Padding]:
    """Carry out the paddings that copy input values; leave zero padding to the convolution.

    Args:
        x: input of shape ``(batch, *spatial, channels)``.
        padding: any padding.
        kernel_size: taps per axis.
        kernel_dilation: distance between taps, per axis.

    Returns:
        The input, wrapped or reflected if so asked, and the padding that remains to be done.
    """
    padding = canonical_padding(padding, len(kernel_size))
    if padding not in BOUNDARY_MODES:
        return x, padding
    ones = (1,) * len(kernel_size)
    pairs = padding_pairs(
        padding,
        x.shape[1:-1],
        kernel_size,
        strides=ones,
        input_dilation=ones,
        kernel_dilation=kernel_dilation,
    )
    return jnp.pad(x, ((0, 0), *pairs, (0, 0)), mode=BOUNDARY_MODES[str(padding)]), "VALID"


def output_shape(
    spatial: Sequence[Size],
    kernel_size: Sequence[int],
    *,
    strides: Sequence[int],
    padding: Padding,
    input_dilation: Sequence[int],
    kernel_dilation: Sequence[int],
) -> tuple[Size, ...]:
    """Return the spatial output sizes of a convolution.

    ``H' = (dilated(H) + low + high - dilated(D)) // stride + 1``, at least 0.

    Args:
        spatial: sizes of the input's spatial axes.
        kernel_size: taps per axis.
        strides: step between outputs, per axis.
        padding: a name or explicit pairs.
        input_dilation: distance between input points, per axis.
        kernel_dilation: distance between taps, per axis.

    Returns:
        One size per axis.

    Raises:
        ValueError: if there is no such padding, or it takes away more points than there are.

    >>> spec = ConvSpec(kernel_size=(3, 3), in_features=4, out_features=8, strides=2)
    >>> output_shape((32, 17), spec.kernel_size, **spec.geometry)
    (16, 9)
    """
    pairs = padding_pairs(
        padding,
        spatial,
        kernel_size,
        strides=strides,
        input_dilation=input_dilation,
        kernel_dilation=kernel_dilation,
    )
    if padding in BOUNDARY_MODES:
        # Flax wraps or reflects first and dilates the longer input afterwards.
        spatial = [n + low + high for n, (low, high) in zip(spatial, pairs, strict=True)]
        pairs = ((0, 0),) * len(pairs)
    geometry = (tuple(strides), pairs, tuple(input_dilation), tuple(kernel_dilation))
    return output_sizes(geometry, spatial, kernel_size)


def output_sizes(
    geometry: Geometry, spatial: Sequence[Size], kernel_size: Sequence[int]
) -> tuple[Size, ...]:
    """Return the spatial output sizes where padding is given by pairs.

    Args:
        geometry: strides, padding, input dilation and kernel dilation.
        spatial: sizes of the input's spatial axes.
        kernel_size: taps per axis.

    Returns:
        One size per axis.
    """
    return tuple(
        at_least(0, (dilated(n, di) + low + high - dilated(k, dk)) // s + 1)
        for n, k, s, (low, high), di, dk in zip(spatial, kernel_size, *geometry, strict=True)
    )


def covered(geometry: Geometry, spatial: Sequence[Size], kernel_size: Sequence[int]) -> Pairs:
    """Return the padding with an end that lets every tap take ``stride`` points per output.

    Of symbolic sizes `tap_slices` knows then that they fit; the results are the same.

    Args:
        geometry: strides, padding, input dilation and kernel dilation.
        spatial: sizes of the input's spatial axes.
        kernel_size: taps per axis.
    """
    outputs = output_sizes(geometry, spatial, kernel_size)
    return tuple(
        (low, out * s + dilated(k, dk) - 1 - dilated(n, di) - low)
        for out, n, k, s, (low, _), di, dk in zip(
            outputs, spatial, kernel_size, *geometry, strict=True
        )
    )


def pad(geometry: Geometry, x: Float[Array, "b *spatial c"]) -> Float[Array, "b *padded c"]:
    """Return the input, dilated and padded with zeros (cropped where padding is negative)."""
    _, pairs, input_dilation, _ = geometry
    config = [(low, high, d - 1) for (low, high), d in zip(pairs, input_dilation, strict=True)]
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *config, (0, 0, 0)])


def tap_slices(
    geometry: Geometry, padded: Float[Array, "b *padded c"], kernel_size: tuple[int, ...]
) -> Iterator[Float[Array, "b *spatial_out c"]]:
    """Yield, for every tap in row-major order, the padded input points that it multiplies.

    Args:
        geometry: strides, padding, input dilation and kernel dilation.
        padded: what `pad` returns, of shape ``(batch, *padded, channels)``; where sizes are
            symbolic, as `covered` has it.
        kernel_size: taps per axis.

    Returns:
        An iterator over arrays of shape ``(batch, *spatial_out, channels)``.
    """
    strides, _, _, kernel_dilation = geometry
    extents = [dilated(k, d) for k, d in zip(kernel_size, kernel_dilation, strict=True)]
    outputs = [
        at_least(0, (n - extent) // s + 1)
        for n, extent, s in zip(padded.shape[1:-1], extents, strides, strict=True)
    ]
    for tap in itertools.product(*map(range, kernel_size)):
        starts = [t * d for t, d in zip(tap, kernel_dilation, strict=True)]
        # An axis without outputs gives an empty slice.
        starts = [0 if n == 0 else start for start, n in zip(starts, outputs, strict=True)]
        stops = [
            start + (dilated(n, s) if known(n) else n * s)
            for start, n, s in zip(starts, outputs, strides, strict=True)
        ]
        yield lax.slice(
            padded, (0, *starts, 0), (padded.shape[0], *stops, padded.shape[-1]), (1, *strides, 1)
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


def whole_kernel(kernel: Float[Array, "*stacked_kernel_shape"]) -> Array:
    """Return a kernel that lies whole on every device of a mesh with explicit axes."""
    layout = jax.typeof(kernel).sharding
    if all(axis is None for axis in layout.spec):
        return kernel
    return jax.reshard(kernel, NamedSharding(layout.mesh, PartitionSpec()))
