"""Depthwise convolution in several forms, with its own backward pass.

A grouped ``lax`` convolution is 4 to 20 times slower on CPUs, forward and backward, than a sum of
shifted slices; see `falcon_jax.ops.shifted` and `falcon_jax.ops.per_pixel`.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from falcon_jax.names import no_such
from falcon_jax.ops.accumulation import add_up
from falcon_jax.ops.choice import DEPTHWISE_FORMS, DepthwiseForm, depthwise_form
from falcon_jax.ops.convolution import conv
from falcon_jax.ops.geometry import (
    Geometry,
    PaddingLike,
    PerAxis,
    canonical_padding,
    dilated,
    output_sizes,
    pad_boundary,
    padding_pairs,
    per_axis,
)
from falcon_jax.ops.linear import Arrays, linear_call
from falcon_jax.ops.per_pixel import kernel_gradient_per_pixel, sum_per_pixel
from falcon_jax.ops.shifted import kernel_gradient, padded_input, sum_of_taps


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
    outputs = output_sizes(geometry, x.shape[1:-1], kernel_size)
    if impl == "auto":
        impl = depthwise_form(
            points=max(math.prod(x.shape[1:-1]), math.prod(outputs)), taps=math.prod(kernel_size)
        )
    y: Array = (
        _grouped(geometry, x, kernel) if impl == "grouped" else _convolve(impl, geometry, x, kernel)
    )
    return y.reshape(*batch, *y.shape[1:])


def _grouped(geometry: Geometry, x: Array, kernel: Array) -> Array:
    strides, pairs, input_dilation, kernel_dilation = geometry
    dtype = jnp.result_type(x, kernel)
    return conv(
        x.astype(dtype),
        kernel[..., None, :].astype(dtype),
        strides=strides,
        padding=pairs,
        input_dilation=input_dilation,
        kernel_dilation=kernel_dilation,
        feature_group_count=x.shape[-1],
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _convolve(form: DepthwiseForm, geometry: Geometry, x: Array, kernel: Array) -> Array:
    """Return what is linear in x and in the kernel; each has a transpose of its own."""
    if form == "per_pixel":
        return sum_per_pixel(geometry, x, kernel)
    return sum_of_taps(geometry, padded_input(geometry, x), kernel)


@functools.partial(_convolve.defjvp, symbolic_zeros=True)
def _convolve_jvp(
    form: DepthwiseForm, geometry: Geometry, primals: tuple[Array, Array], tangents: tuple[Any, Any]
) -> tuple[Array, Array]:
    (x, kernel), (dx, dkernel) = primals, tangents
    terms: list[Array] = []
    if not isinstance(dx, SymbolicZero):
        settings = (form, geometry, x.shape[1:-1], x.dtype)
        terms += linear_call(_of_input, _to_input, settings, (kernel,), (dx,))
    if not isinstance(dkernel, SymbolicZero):
        if form == "shifted":  # the padded input is kept, not made anew for the backward pass
            x, geometry = padded_input(geometry, x), _without_padding(geometry)
        settings = (form, geometry, kernel.shape[:-1], kernel.dtype)
        terms += linear_call(_of_kernel, _to_kernel, settings, (x,), (dkernel,))
    y: Array = _convolve(form, geometry, x, kernel)
    return y, add_up(terms) if terms else jnp.zeros_like(y)


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
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
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
    return input_dilation, tuple(back), strides, kernel_dilation
