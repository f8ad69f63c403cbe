"""Depthwise convolution as one sum of shifted slices, and its gradients.

The input is padded once; the taps are strided slices of it. XLA fuses their weighted sum into a
single loop, together with the loops of further convolutions whose results are summed. The gradient
of the input is again such a sum, with the kernel flipped; the gradient of the kernel is one
reduction per tap.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from falcon_jax.ops.accumulation import accumulator, add_up
from falcon_jax.ops.geometry import Geometry, pad, tap_slices

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
    per_image = max(math.prod(padded.shape[1:]), math.prod(dy.shape[1:]), 1)
    batch = dy.shape[0]
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
    unrolled = _largest_divisor(dy.shape[axis], at_most=at_most)

    def every(points: Array, start: int) -> Array:
        return lax.slice_in_dim(points, start, None, unrolled, axis).astype(dtype)

    parts = [every(dy, start) for start in range(unrolled)]
    sums = [
        add_up(every(points, start) * part for start, part in enumerate(parts))
        for points in tap_slices(geometry, padded, kernel_size)
    ]
    stacked = lax.optimization_barrier(jnp.stack(sums))
    rows = math.prod(stacked.shape[1:-1])
    columns = stacked.reshape(len(sums), rows, dy.shape[-1]).sum(axis=1)
    return columns.reshape(*kernel_size, dy.shape[-1])


def _largest_divisor(n: int, *, at_most: int) -> int:
    return next(d for d in range(max(min(n, at_most), 1), 0, -1) if n % d == 0)
