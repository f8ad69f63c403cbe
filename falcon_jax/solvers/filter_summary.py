"""Filters as overlapping segments of one vector: gather, least squares, order of the filters."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int


def gather_segments(
    summary: Float[Array, " length"],
    locations: Int[np.ndarray, " n"] | Int[Array, " n"],
    size: int,
) -> Float[Array, "n {size}"]:
    """Return the segments of a vector that start at the given locations.

    ``F[c, k] = summary[(locations[c] + k) mod L]``

    Args:
        summary: vector of length L.
        locations: starts of the segments, from 0 to L - 1.
        size: length of the segments.

    Reference:
        FSNet (Yang et al., 2019), Section 3.1.
    """
    wrapped = jnp.pad(summary, (0, size), mode="wrap")
    # Slices of a whole segment: an accelerator gathers rows, not single entries.
    segment = jax.vmap(lambda start: lax.dynamic_slice_in_dim(wrapped, start, size))
    return segment(jnp.asarray(locations, jnp.int32))


def shared_means(
    filters: Float[Array, "n size"], locations: Int[np.ndarray, " n"], length: int
) -> Float[Array, " {length}"]:
    """Return the vector whose segments are nearest to the filters, in least squares.

    An entry is the mean of all filter entries that share it; 0 where no filter has one.

    Args:
        filters: N filters of K entries.
        locations: where each one's segment starts.
        length: L, entries of the vector.

    Returns:
        The vector, in the type of ``filters``.
    """
    dtype = jnp.promote_types(filters.dtype, jnp.float32)
    like = jax.ShapeDtypeStruct((length,), dtype)
    scatter = jax.linear_transpose(lambda s: gather_segments(s, locations, filters.shape[1]), like)
    (totals,) = scatter(filters.astype(dtype))
    (counts,) = scatter(jnp.ones(filters.shape, dtype))
    return (totals / jnp.maximum(counts, 1)).astype(filters.dtype)


def neighbour_order(
    filters: Float[np.ndarray, "layers n size"], locations: Int[np.ndarray, " n"], length: int
) -> tuple[int, ...] | None:
    """Return an order of filters in which they share a vector at less error, or None.

    Greedy, from filter 0 on: the filter whose beginning is nearest to the end of the one before,
    over the entries that the two would share.

    Args:
        filters: float64, N filters of K entries of every layer of a stack (one order for all).
        locations: where the N segments start, increasing.
        length: L, entries of the vector.

    Returns:
        The filters by increasing location; None if the order as it is has no greater error.
    """
    n = filters.shape[1]
    steps = np.diff(locations)
    distances = {int(step): _distances(filters, int(step)) for step in np.unique(steps)}
    order, left = [0], np.ones(n, bool)
    for step in steps:
        left[order[-1]] = False
        order.append(int(np.where(left, distances[int(step)][order[-1]], np.inf).argmin()))
    better = _kept(filters[:, order], locations, length) > _kept(filters, locations, length)
    return tuple(order) if better else None


def _distances(filters: np.ndarray, step: int) -> np.ndarray:
    """Return squared distances between the ends (rows) and the beginnings of filters."""
    n, size = filters.shape[1:]
    # A wrap-around of the paper's step has a negative one; nothing is compared there.
    shared = size - step if 0 <= step < size else 0
    ends = filters[:, :, size - shared :].transpose(1, 0, 2).reshape(n, -1)
    beginnings = filters[:, :, :shared].transpose(1, 0, 2).reshape(n, -1)
    squares = (ends**2).sum(1)[:, None] + (beginnings**2).sum(1)[None]
    return squares - 2 * ends @ beginnings.T


def _kept(filters: np.ndarray, locations: np.ndarray, length: int) -> float:
    """Return the squared norm of the least-squares segments."""
    positions = ((locations[:, None] + np.arange(filters.shape[2])) % length).ravel()
    counts = np.maximum(np.bincount(positions, minlength=length), 1)
    totals = (np.bincount(positions, layer.ravel(), minlength=length) for layer in filters)
    return sum(float((total**2 / counts).sum()) for total in totals)
