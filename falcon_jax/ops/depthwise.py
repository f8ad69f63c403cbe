"""Depthwise convolution in several forms, with its own backward pass."""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from falcon_jax.ops.choice import DEPTHWISE_FORMS, DepthwiseForm, depthwise_form, is_canonical
from falcon_jax.ops.geometry import (
    Geometry,
    Padding,
    PaddingLike,
    PerAxis,
    Size,
    canonical_padding,
    covered,
    dilated,
    known,
    output_sizes,
    pad,
    pad_boundary,
    padding_pairs,
    per_axis,
    tap_slices,
)
from falcon_jax.ops.linear import PRODUCTS, Arrays, accumulator, add_up, jvp_call, linear_call
from falcon_jax.settings import no_such

Pairing = tuple[int, int, int]  # (tap, input pixel, output pixel), all counted in row-major order


def pairings(
    geometry: Geometry, spatial: Sequence[int], kernel_size: Sequence[int]
) -> tuple[Pairing, ...]:
    """Return which tap carries which input pixel to which output pixel.

    Args:
        geometry: strides, padding, input dilation and kernel dilation.
        spatial: sizes of the input's spatial axes.
        kernel_size: taps per axis.
    """
    strides, pairs, input_dilation, kernel_dilation = geometry
    outputs = output_sizes(geometry, spatial, kernel_size)
    per_axis = []
    for n, out, k, s, (low, _), di, dk in zip(
        spatial, outputs, kernel_size, strides, pairs, input_dilation, kernel_dilation, strict=True
    ):
        found = []
        for o, tap in itertools.product(range(out), range(k)):
            point, hole = divmod(o * s + tap * dk - low, di)
            if not hole and 0 <= point < n:
                found.append((tap, point, o))
        per_axis.append(found)
    return tuple(
        (
            _flat([a[0] for a in axes], kernel_size),
            _flat([a[1] for a in axes], spatial),
            _flat([a[2] for a in axes], outputs),
        )
        for axes in itertools.product(*per_axis)
    )


def sum_per_pixel(
    geometry: Geometry, x: Float[Array, "b *spatial c"], kernel: Float[Array, "*kernel_size c"]
) -> Float[Array, "b *spatial_out c"]:
    """Return the depthwise convolution, every output pixel a sum of its own.

    Args:
        geometry: strides, padding, input dilation and kernel dilation.
        x: input.
        kernel: one row a tap.
    """
    dtype = accumulator(x, kernel)
    kernel_size, spatial = kernel.shape[:-1], x.shape[1:-1]
    outputs = output_sizes(geometry, spatial, kernel_size)
    pixels = _pixels(x.astype(dtype))
    rows = kernel.reshape(math.prod(kernel.shape[:-1]), 1, kernel.shape[-1]).astype(dtype)
    terms: list[list[Array]] = [[] for _ in range(math.prod(outputs))]
    for tap, point, out in pairings(geometry, spatial, kernel_size):
        terms[out].append(pixels[point] * rows[tap])
    zero = jnp.zeros((x.shape[0], x.shape[-1]), dtype)
    y = jnp.stack([add_up(t) if t else zero for t in terms] or [zero], axis=1)[:, : len(terms)]
    return y.reshape(x.shape[0], *outputs, x.shape[-1]).astype(jnp.result_type(x, kernel))


def kernel_gradient_per_pixel(
    geometry: Geometry,
    x: Float[Array, "b *spatial c"],
    dy: Float[Array, "b *spatial_out c"],
    kernel_size: tuple[int, ...],
) -> Float[Array, "*kernel_size c"]:
    """Return ``dK[tap, c]``, the sum over batch and pixels of what the tap multiplied times dy."""
    dtype = accumulator(x, dy)
    inputs, outputs = _pixels(x.astype(dtype)), _pixels(dy.astype(dtype))
    terms: list[list[Array]] = [[] for _ in range(math.prod(kernel_size))]
    for tap, point, out in pairings(geometry, x.shape[1:-1], kernel_size):
        terms[tap].append(inputs[point] * outputs[out])
    zero = jnp.zeros((x.shape[0], x.shape[-1]), dtype)
    stacked = lax.optimization_barrier(jnp.stack([add_up(t) if t else zero for t in terms], axis=1))
    return stacked.sum(axis=0).reshape(*kernel_size, dy.shape[-1])


def _pixels(x: Array) -> list[Array]:
    flat = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
    return [lax.index_in_dim(flat, i, 1, keepdims=False) for i in range(flat.shape[1])]


def _flat(index: Sequence[int], sizes: Sequence[int]) -> int:
    flat = 0
    for i, n in zip(index, sizes, strict=True):
        flat = flat * n + i
    return flat


_SMALL_MAP = 14 * 14  # points
_ELEMENTS = {True: 2**23, False: 2**18}  # of small and of other maps, in a pass of kernel_gradient
_MOST_PRODUCTS = 9 * 128  # written out in one loop: a row of 128 points for nine taps


def padded_input(
    geometry: Geometry, x: Float[Array, "b *spatial c"]
) -> Float[Array, "b *padded c"]:
    """Return the padded input, laid out in memory.

    Without the barrier XLA reads the middle tap from the unpadded input and keeps both alive: one
    more large buffer, and up to twice the time on CPUs.
    """
    return lax.optimization_barrier(pad(geometry, x))


def sum_of_taps(
    geometry: Geometry, padded: Float[Array, "b *padded c"], kernel: Float[Array, "*kernel_size c"]
) -> Float[Array, "b *spatial_out c"]:
    """Return ``sum over taps of the padded input, shifted, times the tap's row of the kernel``."""
    dtype = accumulator(padded, kernel)
    taps = math.prod(kernel.shape[:-1])
    rows = kernel.reshape(taps, *(1,) * (padded.ndim - 1), kernel.shape[-1]).astype(dtype)
    points = tap_slices(geometry, padded, kernel.shape[:-1])
    terms = (p.astype(dtype) * row for p, row in zip(points, rows, strict=True))
    return add_up(terms).astype(jnp.result_type(padded, kernel))


def kernel_gradient(
    geometry: Geometry,
    padded: Float[Array, "b *padded c"],
    dy: Float[Array, "b *spatial_out c"],
    kernel_size: tuple[int, ...],
) -> Float[Array, "*kernel_size c"]:
    """Return ``dK[tap, c] = sum over batch and points of x shifted by the tap times dy``.

    In chunks of the batch that fit the cache, since every tap reads both arrays anew; chunks of
    small maps are larger, or there is too little to do in each.
    """
    batch = dy.shape[0]
    if not known(*padded.shape, *dy.shape):
        return _chunk_gradient(geometry, padded, dy, kernel_size)
    per_image = max(math.prod(padded.shape[1:]), math.prod(dy.shape[1:]), 1)
    elements = _ELEMENTS[math.prod(dy.shape[1:-1]) <= _SMALL_MAP]
    chunk = _largest_divisor(batch, at_most=max(elements // per_image, 2))
    if chunk == batch:
        return _chunk_gradient(geometry, padded, dy, kernel_size)
    chunks = (
        padded.reshape(-1, chunk, *padded.shape[1:]),
        dy.reshape(-1, chunk, *dy.shape[1:]),
    )

    def add(total: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        return total + _chunk_gradient(geometry, *pair, kernel_size), None

    zero = jnp.zeros((*kernel_size, dy.shape[-1]), accumulator(padded, dy))
    return lax.scan(add, zero, chunks)[0]


def _chunk_gradient(
    geometry: Geometry, padded: Array, dy: Array, kernel_size: tuple[int, ...]
) -> Array:
    """Sum the products along a row while they are made, the rest in one wide column sum.

    A row that is summed in parts takes two to three times as long. Slices are taken before they are
    multiplied, or XLA writes the whole product to memory; the barrier keeps it from fusing the two
    sums, which is several times slower on CPUs.
    """
    dtype = accumulator(padded, dy)
    axis = dy.ndim - 2
    at_most = max(_MOST_PRODUCTS // math.prod(kernel_size), 1)
    points = dy.shape[axis]
    unrolled = _largest_divisor(points, at_most=at_most) if known(points) else 1

    def every(points: Array, start: int) -> Array:
        return lax.slice_in_dim(points, start, None, unrolled, axis).astype(dtype)

    parts = [every(dy, start) for start in range(unrolled)]
    sums = [
        add_up(every(points, start) * part for start, part in enumerate(parts))
        for points in tap_slices(geometry, padded, kernel_size)
    ]
    stacked = lax.optimization_barrier(jnp.stack(sums))
    if not known(*stacked.shape):
        columns = stacked.sum(axis=tuple(range(1, stacked.ndim - 1)))
    else:
        rows = math.prod(stacked.shape[1:-1])
        columns = stacked.reshape(len(sums), rows, dy.shape[-1]).sum(axis=1)
    return columns.reshape(*kernel_size, dy.shape[-1])


def _largest_divisor(n: int, *, at_most: int) -> int:
    return next(d for d in range(max(min(n, at_most), 1), 0, -1) if n % d == 0)


def depthwise_conv(
    x: Float[ArrayLike, "*batch c"],
    kernel: Float[ArrayLike, "*kernel_size kernel_c"],
    *,
    strides: PerAxis = 1,
    padding: PaddingLike = "SAME",
    input_dilation: PerAxis = 1,
    kernel_dilation: PerAxis = 1,
    impl: DepthwiseForm = "auto",
) -> Float[Array, "*batch_out c"]:
    """Convolve every channel with a kernel of its own.

    ``y[b, h', w', c] = sum_ij kernel[i, j, c] * x[b, h' s + i - p, w' s + j - p, c]``

    Differentiable in both modes, any number of times.

    Args:
        x: input of shape ``(..., *spatial, C)``, any number of batch axes.
        kernel: shape ``(*kernel_size, C)``.
        strides: step between outputs, per axis or one for all.
        padding: SAME, SAME_LOWER, VALID, CIRCULAR, REFLECT, CAUSAL, ``(low, high)`` pairs, or
            numbers for both.
        input_dilation: distance between input points.
        kernel_dilation: distance between taps.
        impl: how it is computed, with the same result: ``shifted`` (one sum of shifted slices),
            ``per_pixel`` (for maps of a few pixels), ``grouped`` (a ``lax`` convolution), or
            ``auto``, the fastest as measured on the default backend.

    Returns:
        Output of shape ``(..., *spatial_out, C)``.

    Raises:
        ValueError: if the shapes do not fit each other, a size is not positive, or there is no such
            ``impl``.

    Reference:
        FALCON, Equations 3 and 7.

    >>> depthwise_conv(jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 4)), strides=2).shape
    (1, 4, 4, 4)
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    axes = kernel.ndim - 1
    if axes < 0 or x.ndim <= axes or x.shape[-1] != kernel.shape[-1]:
        raise ValueError(
            f"depthwise_conv takes x of shape (..., *spatial, C) and a kernel of shape "
            f"(*kernel_size, C) with equal C; got {x.shape} and {kernel.shape}."
        )
    if impl not in DEPTHWISE_FORMS:
        raise ValueError(no_such("impl of depthwise_conv", impl, DEPTHWISE_FORMS))
    batch = x.shape[: x.ndim - axes - 1]
    if len(batch) != 1:
        x = x.reshape(math.prod(batch), *x.shape[x.ndim - axes - 1 :])
    kernel_size = kernel.shape[:-1]
    strides = per_axis("strides", strides, axes)
    kernel_dilation = per_axis("kernel_dilation", kernel_dilation, axes)
    input_dilation = per_axis("input_dilation", input_dilation, axes)
    if min((*kernel_size, *strides, *kernel_dilation, *input_dilation), default=1) < 1:
        raise ValueError(
            f"depthwise_conv needs a kernel with taps, and strides and dilations of 1 or more; got "
            f"kernel_size={kernel_size}, {strides=}, {kernel_dilation=}, {input_dilation=}."
        )
    x, padding = pad_boundary(
        x, canonical_padding(padding, axes), kernel_size, kernel_dilation=kernel_dilation
    )
    pairs = padding_pairs(
        padding,
        x.shape[1:-1],
        kernel_size,
        strides=strides,
        input_dilation=input_dilation,
        kernel_dilation=kernel_dilation,
    )
    geometry = (strides, pairs, input_dilation, kernel_dilation)
    spatial = x.shape[1:-1]
    if is_canonical():
        y = _grouped(geometry, x, kernel, pairs if known(*spatial) else padding)
        return y if len(batch) == 1 else y.reshape(*batch, *y.shape[1:])
    if not known(*spatial):
        geometry = (strides, covered(geometry, spatial, kernel_size), *geometry[2:])
        impl = "grouped" if impl == "grouped" else "shifted"
    if impl == "auto":
        points = max(math.prod(spatial), math.prod(output_sizes(geometry, spatial, kernel_size)))
        impl = depthwise_form(points=points, taps=math.prod(kernel_size))
    if impl == "grouped":
        y = _grouped(geometry, x, kernel)
    else:
        with jax.named_scope(PRODUCTS):
            y = _convolve(impl, geometry, x, kernel)
    return y if len(batch) == 1 else y.reshape(*batch, *y.shape[1:])


def _grouped(geometry: Geometry, x: Array, kernel: Array, padding: Padding | None = None) -> Array:
    strides, pairs, input_dilation, kernel_dilation = geometry
    dtype, axes = jnp.result_type(x, kernel), len(strides)
    channels_last = (0, axes + 1, *range(1, axes + 1))
    return lax.conv_general_dilated(
        x.astype(dtype),
        kernel[..., None, :].astype(dtype),
        strides,
        pairs if padding is None else padding,
        lhs_dilation=input_dilation,
        rhs_dilation=kernel_dilation,
        dimension_numbers=lax.ConvDimensionNumbers(
            channels_last, (axes + 1, axes, *range(axes)), channels_last
        ),
        feature_group_count=x.shape[-1],
    )


def _convolve(form: DepthwiseForm, geometry: Geometry, x: Array, kernel: Array) -> Array:
    """Return what is linear in x and in the kernel; each has a transpose of its own."""
    (y,) = jvp_call(_sum, _derivative, (form, geometry), (x, kernel), bilinear=True)
    return y


def _sum(settings: tuple, operands: Arrays) -> Arrays:
    (form, geometry), (x, kernel) = settings, operands
    if form == "per_pixel":
        return (sum_per_pixel(geometry, x, kernel),)
    return (sum_of_taps(geometry, padded_input(geometry, x), kernel),)


def _derivative(
    settings: tuple, primals: Arrays, tangents: tuple[Array | None, ...]
) -> tuple[Arrays, Arrays]:
    (form, geometry), (x, kernel), (dx, dkernel) = settings, primals, tangents
    terms: list[Array] = []
    if dx is not None:
        given = (form, geometry, x.shape[1:-1], x.dtype)
        terms += linear_call(_of_input, _to_input, given, (kernel,), (dx,), bilinear=True)
    if dkernel is not None:
        if form == "shifted":  # the padded input is kept, not made anew for the backward pass
            (x,) = linear_call(_padded, _unpadded, geometry, (), (x,))
            geometry = _without_padding(geometry)
        given = (form, geometry, kernel.shape[:-1], kernel.dtype)
        terms += linear_call(_of_kernel, _to_kernel, given, (x,), (dkernel,), bilinear=True)
    return (_convolve(form, geometry, x, kernel),), (add_up(terms),)


def _padded(geometry: Geometry, residuals: Arrays, inputs: Arrays) -> Arrays:
    return (padded_input(geometry, *inputs),)


def _unpadded(geometry: Geometry, residuals: Arrays, outputs: Arrays) -> Arrays:
    _, pairs, input_dilation, _ = geometry
    (dy,) = outputs
    config = [(-low, -high, 0) for low, high in pairs]
    points = lax.pad(dy, jnp.zeros((), dy.dtype), [(0, 0, 0), *config, (0, 0, 0)])
    return (lax.slice(points, (0,) * dy.ndim, points.shape, (1, *input_dilation, 1)),)


def _of_input(settings: tuple, residuals: Arrays, inputs: Arrays) -> Arrays:
    form, geometry, *_ = settings
    return (_convolve(form, geometry, *inputs, *residuals),)


def _to_input(settings: tuple, residuals: Arrays, outputs: Arrays) -> Arrays:
    form, geometry, spatial, dtype = settings
    (kernel,), (dy,) = residuals, outputs
    back = _transposed(geometry, kernel.shape[:-1], spatial, dy.shape[1:-1])
    return (_convolve(form, back, dy, _flipped(kernel)).astype(dtype),)


def _of_kernel(settings: tuple, residuals: Arrays, inputs: Arrays) -> Arrays:
    form, geometry, *_ = settings
    return (_convolve(form, geometry, *residuals, *inputs),)


def _to_kernel(settings: tuple, residuals: Arrays, outputs: Arrays) -> Arrays:
    form, geometry, kernel_size, dtype = settings
    gradient = kernel_gradient_per_pixel if form == "per_pixel" else kernel_gradient
    (x,), (dy,) = residuals, outputs
    return (gradient(geometry, x, dy, kernel_size).astype(dtype),)


def _without_padding(geometry: Geometry) -> Geometry:
    strides, pairs, input_dilation, kernel_dilation = geometry
    return strides, ((0, 0),) * len(pairs), (1,) * len(input_dilation), kernel_dilation


def _flipped(kernel: Array) -> Array:
    return jnp.flip(kernel, axis=tuple(range(kernel.ndim - 1)))


def _transposed(
    geometry: Geometry,
    kernel_size: tuple[int, ...],
    inputs: tuple[Size, ...],
    outputs: tuple[Size, ...],
) -> Geometry:
    """Return the geometry that carries output gradients back to the input, the kernel flipped."""
    strides, pairs, input_dilation, kernel_dilation = geometry
    back = []
    for n, out, s, (low, _), di, k, dk in zip(
        inputs, outputs, strides, pairs, input_dilation, kernel_size, kernel_dilation, strict=True
    ):
        before = dilated(k, dk) - 1 - low
        needed = dilated(n, di) - 1 + dilated(k, dk)
        back.append((before, needed - before - dilated(out, s)))
    found = (input_dilation, tuple(back), strides, kernel_dilation)
    if known(*inputs, *outputs):
        return found
    return input_dilation, covered(found, outputs, kernel_size), strides, kernel_dilation
