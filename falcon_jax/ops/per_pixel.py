"""Depthwise convolution of maps of a few pixels, pixel by pixel: nothing is padded."""

import itertools
import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from falcon_jax.ops.accumulation import accumulator, add_up
from falcon_jax.ops.geometry import Geometry, output_sizes

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
