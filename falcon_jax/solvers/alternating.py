"""Products of factors fitted in the metric of the data, by alternating least squares.

Each step is the exact minimum over one factor, the others fixed, so no step makes the error larger.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from falcon_jax.solvers.low_rank import best_terms
from falcon_jax.solvers.moments import Moments
from falcon_jax.solvers.quadratic import RIDGE, Quadratic, partial_traces, root

MOST_SWEEPS = 30
TOLERANCE = 1e-3  # of the error that a sweep takes away
SMALL = 128  # weights of a channel up to which random starts are tried, too
STARTS = 8
MANY_SWEEPS = 200  # of each of several starts
SMALL_TOLERANCE = 1e-4
_STEPS = 16  # of conjugate gradients
_CHUNK = 1 << 24  # numbers of a batch of normal matrices: 64 MB


def falcon_closed(
    problem: Quadratic, rank: int
) -> tuple[Float[np.ndarray, "m k n"], Float[np.ndarray, "taps k n"]]:
    """Return pointwise and depthwise factors that are best where A is a Kronecker product.

    ``S_t^1/2 W_n S_m^1/2 ~ U S V^T`` for every output channel n, with the leading k terms
    """
    t, m = problem.taps, problem.channels
    taps, channels = partial_traces(problem)
    (t_root, t_inverse), (m_root, m_inverse) = root(taps), root(channels)
    dense = problem.dense().reshape(t, m, -1).transpose(2, 0, 1)
    whitened = jnp.asarray((t_root @ dense @ m_root).transpose(1, 2, 0), jnp.float32)
    left, right = (np.asarray(f, np.float64) for f in best_terms(whitened, rank=rank))
    depthwise = np.einsum("tu,ukn->tkn", t_inverse, left)
    return np.einsum("ml,lkn->mkn", m_inverse, right), depthwise


def falcon_best(
    problem: Quadratic, rank: int
) -> tuple[Float[np.ndarray, "m k n"], Float[np.ndarray, "taps k n"]]:
    """Return the factors that `falcon_als` finds from `falcon_closed`.

    Of small kernels, every output channel takes the best of several starts.
    """
    start = falcon_closed(problem, rank)
    if problem.metric.shape[0] > SMALL:
        return falcon_als(problem, *start)[:2]
    rng = np.random.default_rng(0)
    pointwise, depthwise = start
    least = np.full(problem.outputs, np.inf)
    for _ in range(1 + STARTS):
        p, d, _ = falcon_als(problem, *start, sweeps=MANY_SWEEPS, tolerance=SMALL_TOLERANCE)
        error = problem.by_output(_weights(p, d))
        pointwise = np.where(error < least, p, pointwise)
        depthwise = np.where(error < least, d, depthwise)
        least = np.minimum(error, least)
        start = rng.normal(size=pointwise.shape), rng.normal(size=depthwise.shape)
    return pointwise, depthwise


def falcon_sweep(
    moments: Moments,
    kernel: Float[Array, "*kernel_size m n"],
    pointwise: Float[Array, "m k n"],
    depthwise: Float[Array, "taps k n"],
    *,
    ridge: float = RIDGE,
) -> tuple[Float[Array, "m k n"], Float[Array, "taps k n"]]:
    """Return better factors for moments, after one sweep in float32; groups side by side."""
    taps = depthwise.shape[0]
    groups = moments.second.shape[0]
    found = []
    for index in range(groups):
        n = kernel.shape[-1] // groups
        part = slice(index * n, (index + 1) * n)
        second, cross = moments.second[index], moments.cross[index]
        target = kernel[..., part].reshape(cross.shape)
        metric, linear = _pulled(second, cross, target, ridge)
        linear = linear.reshape(taps, -1, n)
        found.append(_sweep(metric, linear, pointwise[..., part], depthwise[..., part]))
    return (
        jnp.concatenate([p for p, _ in found], axis=-1),
        jnp.concatenate([d for _, d in found], axis=-1),
    )


@functools.partial(jax.jit, static_argnames="ridge")
def _pulled(second: Array, cross: Array, target: Array, ridge: float) -> tuple[Array, Array]:
    mean = jnp.trace(second) / second.shape[0]
    lam = jnp.where(mean > 0, ridge * mean, 1.0)
    return second + lam * jnp.eye(second.shape[0]), cross + lam * target.astype(jnp.float32)


def falcon_als(
    problem: Quadratic,
    pointwise: Float[np.ndarray, "m k n"],
    depthwise: Float[np.ndarray, "taps k n"],
    *,
    sweeps: int = MOST_SWEEPS,
    tolerance: float = TOLERANCE,
) -> tuple[Float[np.ndarray, "m k n"], Float[np.ndarray, "taps k n"], list[float]]:
    """Return better pointwise and depthwise factors, and the errors after every sweep."""
    t, m = problem.taps, problem.channels
    metric = jnp.asarray(problem.metric, jnp.float32)
    linear = jnp.asarray(problem.linear, jnp.float32).reshape(t, m, -1)
    best = jnp.asarray(pointwise, jnp.float32), jnp.asarray(depthwise, jnp.float32)
    errors = [problem(_weights(*best))]
    for _ in range(sweeps):
        found = _sweep(metric, linear, *best)
        error = problem(_weights(*found))
        # Rounding can make a step larger where there is nothing left to win.
        if not error < errors[-1]:
            break
        best = found
        errors.append(error)
        if errors[-2] - errors[-1] <= tolerance * abs(errors[-1]):
            break
    return np.asarray(best[0], np.float64), np.asarray(best[1], np.float64), errors


@jax.jit
def _sweep(metric: Array, linear: Array, pointwise: Array, depthwise: Array) -> tuple[Array, Array]:
    """Return the best pointwise factors, term after term, then the best depthwise ones."""
    t, m, n = linear.shape
    k = pointwise.shape[1]
    blocks = metric.reshape(t, m, t, m).transpose(0, 2, 1, 3).reshape(t * t, m * m)
    rest = linear - _applied(metric, pointwise, depthwise)
    # The normal matrices are near to multiples of one.
    inverse = jnp.linalg.inv(jnp.einsum("tmtk->mk", metric.reshape(t, m, t, m)))
    for r in range(k):
        p, d = pointwise[:, r], depthwise[:, r]
        # The gradient: what the term leaves, and the step that takes it to 0.
        gradient = jnp.einsum("tn,tmn->nm", d, rest)
        pairs = (d[:, None] * d[None]).reshape(t * t, n).T

        def step(row: tuple[Array, Array], blocks: Array = blocks) -> Array:
            pairs, gradient = row
            matrix = _product("bp,pq->bq", pairs, blocks).reshape(-1, m, m)
            return _descended(matrix, gradient, inverse)

        change = _mapped(step, (pairs, gradient), m * m).T
        pointwise = pointwise.at[:, r].set(p + change)
        if r < k - 1:
            rest = rest - _applied(metric, change[:, None], d[:, None])
    rest = linear - _applied(metric, pointwise, depthwise)
    tall = metric.reshape(t * m * t, m)

    def widths(row: tuple[Array, Array]) -> Array:
        p, rest = row  # (b, m, k), (b, t, m)
        half = _product("am,bmk->abk", tall, p).reshape(t, m, t, *p.shape[::2])
        matrix = _product("bmr,tmubs->brtsu", p, half).reshape(-1, k * t, k * t)
        return _solved(matrix, _product("bmr,btm->brt", p, rest).reshape(-1, k * t))

    rows = pointwise.transpose(2, 0, 1), rest.transpose(2, 0, 1)
    change = _mapped(widths, rows, t * m * t * k).reshape(n, k, t).transpose(2, 1, 0)
    return balanced(pointwise, depthwise + change)


_product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def _applied(metric: Array, pointwise: Array, depthwise: Array) -> Array:
    t, m, n = depthwise.shape[0], pointwise.shape[0], pointwise.shape[-1]
    weights = _product("tkn,mkn->tmn", depthwise, pointwise).reshape(t * m, n)
    return _product("ij,jn->in", metric, weights).reshape(t, m, n)


def _mapped(step: Callable[[Any], Array], rows: Any, numbers: int) -> Array:
    """Return a function's results for all rows, as many at a time as memory allows."""
    count = rows[0].shape[0]
    size = max(1, min(count, _CHUNK // numbers))
    return lax.map(lambda row: step(jax.tree.map(lambda a: a[None], row))[0], rows, batch_size=size)


def _descended(
    matrices: Float[Array, "b p p"], right: Float[Array, "b p"], inverse: Float[Array, "p p"]
) -> Float[Array, "b p"]:
    """Return near to the solutions of symmetric systems, by preconditioned conjugate gradients.

    Every step takes from the error, as an exact solution would: a batch of factorisations takes
    many times longer.
    """

    def dot(a: Array, b: Array) -> Array:
        return jnp.sum(a * b, axis=1, keepdims=True)

    def step(_: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        x, rest, direction, energy = state
        image = jnp.sum(matrices * direction[:, None], axis=2)
        curvature = dot(direction, image)
        length = jnp.where(curvature > 0, energy / jnp.where(curvature > 0, curvature, 1), 0)
        x, rest = x + length * direction, rest - length * image
        z = rest @ inverse
        following = dot(rest, z)
        turn = jnp.where(energy > 0, following / jnp.where(energy > 0, energy, 1), 0)
        return x, rest, z + turn * direction, following

    z = right @ inverse
    start = jnp.zeros_like(right), right, z, dot(right, z)
    return lax.fori_loop(0, _STEPS, step, start)[0]


def _solved(matrices: Float[Array, "b p p"], right: Float[Array, "b p"]) -> Float[Array, "b p"]:
    """Return the solutions of symmetric systems, positive semidefinite but for rounding."""
    size = matrices.shape[-1]
    trace = jnp.trace(matrices, axis1=-2, axis2=-1)
    # A factor of zeros has a matrix of zeros, and the solution 0.
    shift = jnp.where(trace > 0, 1e-6 * trace / size, 1)
    factor = lax.linalg.cholesky(
        matrices + shift[:, None, None] * jnp.eye(size)[None], symmetrize_input=False
    )
    solve = functools.partial(lax.linalg.triangular_solve, factor, left_side=True, lower=True)
    return solve(solve(right[..., None]), transpose_a=True)[..., 0]


def _weights(pointwise: Array | np.ndarray, depthwise: Array | np.ndarray) -> np.ndarray:
    p, d = np.asarray(pointwise, np.float64), np.asarray(depthwise, np.float64)
    weights = sum(d[:, None, r] * p[None, :, r] for r in range(p.shape[1]))
    return np.asarray(weights).reshape(-1, p.shape[2])


def balanced(pointwise: Array, depthwise: Array) -> tuple[Array, Array]:
    """Return factors of the same products whose norms are equal, term by term."""
    a, b = jnp.linalg.norm(pointwise, axis=0), jnp.linalg.norm(depthwise, axis=0)
    both = (a > 0) & (b > 0)
    gain = jnp.where(both, jnp.sqrt(jnp.where(both, b, 1) / jnp.where(both, a, 1)), 1)
    return pointwise * gain[None], depthwise / gain[None]
