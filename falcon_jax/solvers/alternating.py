"""Kernels that are products of factors, fitted in the metric of the data factor by factor."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import lax
from jaxtyping import Array, Float

from falcon_jax.solvers.low_rank import best_terms
from falcon_jax.solvers.moments import RIDGE, Moments, Quadratic, partial_traces, root, solve

MOST_SWEEPS = 30
TOLERANCE = 1e-3  # of the error that a sweep takes away
SMALL = 128  # weights of a channel up to which random starts are tried, too
STARTS = 8
CHANNEL_STARTS = 40  # of FALCON, where every output channel takes the best
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
    for _ in range(1 + CHANNEL_STARTS):
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


Factors = dict[str, Array]
# Factors to the weights (*groups, inputs, outputs), or to what an outer factor maps to the outputs.
Body = Callable[[Factors], Float[Array, "*groups inputs outputs"]]
STEPS = 24  # of conjugate gradients for a factor
_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def low_rank(
    problem: Quadratic, rank: int
) -> tuple[Float[np.ndarray, "inputs rank"], Float[np.ndarray, "rank outputs"]]:
    """Return the best weights of a given rank, as a product; exact.

    With ``A = F F^T``, ``F^T (W - L R)`` is least where ``F^T L R`` is the truncated SVD of
    ``F^T W = F^-1 b``, W dense.
    """
    try:
        factor = np.linalg.cholesky(problem.metric)
        whitened = scipy.linalg.solve_triangular(factor, problem.linear, lower=True)
        u, s, v = np.linalg.svd(whitened, full_matrices=False)
        scale = np.sqrt(s[:rank])
        left = scipy.linalg.solve_triangular(factor, u[:, :rank] * scale, lower=True, trans=1)
    except np.linalg.LinAlgError:
        _, backward = root(problem.metric)
        u, s, v = np.linalg.svd(backward @ problem.linear, full_matrices=False)
        scale = np.sqrt(s[:rank])
        left = backward @ (u[:, :rank] * scale)
    return left, scale[:, None] * v[:rank]


def alternate(
    body: Body,
    factors: Mapping[str, Array | np.ndarray],
    problem: Quadratic | Sequence[Quadratic],
    *,
    outer: str | None = None,
    order: Sequence[str] | None = None,
    sweeps: int = 20,
    tolerance: float = 1e-3,
    at_once: int = 1,
) -> tuple[dict[str, np.ndarray], list[float]]:
    """Return factors with less error, and the errors after every sweep.

    Args:
        body: linear in each of the factors in ``order``; without the outer one.
        factors: to start from.
        problem: what weights cost; one for each group, if the body's weights have groups.
        outer: name of the factor ``(rank, outputs)`` that the body's weights are multiplied by.
        order: the factors that are fitted, all if None.
        sweeps: at most.
        tolerance: a sweep that takes away less of the error is the last.
        at_once: sweeps after each of which the error is not looked at; 1 with an outer factor.
    """
    names = tuple(name for name in (order or factors) if name != outer)
    if isinstance(problem, Quadratic):
        metric, linear = (jnp.asarray(a, jnp.float32) for a in (problem.metric, problem.linear))
    else:
        metric = jnp.stack([jnp.asarray(group.metric, jnp.float32) for group in problem])
        linear = jnp.stack([jnp.asarray(group.linear, jnp.float32) for group in problem])
    best = {name: jnp.asarray(value, jnp.float32) for name, value in factors.items()}

    def weights(factors: Factors) -> np.ndarray:
        first = np.asarray(body(factors), np.float64)
        return first if outer is None else first @ np.asarray(factors[outer], np.float64)

    def error_of(factors: Factors) -> float:
        found = weights(factors)
        if isinstance(problem, Quadratic):
            return problem(found)
        return sum(group(part) for group, part in zip(problem, found, strict=True))

    errors = [error_of(best)]
    for _ in range(sweeps // at_once):
        found = _sweeps(best, metric, linear, body=body, outer=outer, names=names, count=at_once)
        if outer is not None:
            assert isinstance(problem, Quadratic)
            first = np.asarray(body(found), np.float64)
            gram = first.T @ problem.metric @ first
            gram += np.eye(len(gram)) * (1e-10 * np.trace(gram) / len(gram))
            found[outer] = jnp.asarray(solve(gram, first.T @ problem.linear), jnp.float32)
        error = error_of(found)
        # Rounding can make a step larger where there is nothing left to win.
        if not error < errors[-1]:
            break
        best = found
        errors.append(error)
        if errors[-2] - errors[-1] <= tolerance * abs(errors[-1]):
            break
    return {name: np.asarray(value, np.float64) for name, value in best.items()}, errors


@functools.partial(jax.jit, static_argnames=("body", "outer", "names", "count"))
def _sweeps(
    factors: Factors,
    metric: Array,
    linear: Array,
    *,
    body: Body,
    outer: str | None,
    names: tuple[str, ...],
    count: int,
) -> Factors:
    step = functools.partial(
        _factor_sweep, metric=metric, linear=linear, body=body, outer=outer, names=names
    )
    if count == 1:
        return step(factors)
    return lax.fori_loop(0, count, lambda _, factors: step(factors), factors)


def _factor_sweep(
    factors: Factors,
    metric: Array,
    linear: Array,
    *,
    body: Body,
    outer: str | None,
    names: tuple[str, ...],
) -> Factors:
    if outer is not None:
        linear = _matmul(linear, factors[outer].T)

    def mixed(y: Array) -> Array:
        if outer is None:
            return y
        return _matmul(_matmul(y, factors[outer]), factors[outer].T)

    for name in names:
        rest = {key: value for key, value in factors.items() if key != name}

        def part(value: Array, name: str = name, rest: Factors = rest) -> Array:
            return body(rest | {name: value})

        value = factors[name]
        back = jax.linear_transpose(part, value)

        def normal(v: Array, part=part, back=back) -> Array:
            return back(_matmul(metric, mixed(part(v))))[0]

        gradient = back(linear)[0] - normal(value)
        factors = factors | {name: value + descended(normal, gradient, STEPS)}
    return factors


def descended(apply: Callable[[Array], Array], right: Array, steps: int) -> Array:
    """Return near to the solution of ``apply(x) = right``, apply symmetric, semidefinite."""

    def step(_: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        x, rest, direction, energy = state
        image = apply(direction)
        curvature = jnp.sum(direction * image)
        length = jnp.where(curvature > 0, energy / jnp.where(curvature > 0, curvature, 1), 0)
        x, rest = x + length * direction, rest - length * image
        following = jnp.sum(rest * rest)
        turn = jnp.where(energy > 0, following / jnp.where(energy > 0, energy, 1), 0)
        return x, rest, rest + turn * direction, following

    start = jnp.zeros_like(right), right, right, jnp.sum(right * right)
    return lax.fori_loop(0, steps, step, start)[0]


def separable_best(
    problem: Quadratic, depthwise: Float[np.ndarray, "taps m k"]
) -> tuple[Float[np.ndarray, "taps m k"], Float[np.ndarray, "m k n"]]:
    """Return the factors that `separable_als` finds; the best of several starts, if they are few.

    Args:
        problem: what weights cost.
        depthwise: factors to start from.
    """
    if problem.metric.shape[0] > SMALL:
        return separable_als(problem, depthwise)[:2]
    rng = np.random.default_rng(0)
    starts = [depthwise, *(rng.normal(size=depthwise.shape) for _ in range(STARTS))]
    options = {"sweeps": MANY_SWEEPS, "tolerance": SMALL_TOLERANCE}
    fits = [separable_als(problem, start, **options) for start in starts]
    return min(fits, key=lambda fit: fit[2][-1])[:2]


def separable_als(
    problem: Quadratic,
    depthwise: Float[np.ndarray, "taps m k"],
    *,
    sweeps: int = 20,
    tolerance: float = 1e-3,
) -> tuple[Float[np.ndarray, "taps m k"], Float[np.ndarray, "m k n"], list[float]]:
    """Return depthwise and pointwise factors of ``W[t, m, n] = sum_r d[t, m, r] p[m, r, n]``.

    The pointwise factors are one least-squares problem with N right-hand sides; the depthwise
    ones of a term another, whose matrix is ``A[t, m, u, m'] sum_n p[m, n] p[m', n]``.
    """
    t, m, k = depthwise.shape
    metric, linear = problem.metric.reshape(t, m, t, m), problem.linear.reshape(t, m, -1)

    def pointwise_of(d: np.ndarray) -> np.ndarray:
        gram = np.empty((m, k, m, k))
        for r in range(k):
            half = np.einsum("tm,tmuo->muo", d[:, :, r], metric)
            gram[:, r] = np.einsum("muo,uos->mos", half, d)
        right = np.einsum("tmr,tmn->mrn", d, linear, optimize=True)
        matrix = gram.reshape(m * k, m * k)
        # Terms that are nothing, or the same as others, leave it singular.
        matrix += np.eye(m * k) * (1e-10 * np.trace(matrix) / (m * k) or 1.0)
        return solve(matrix, right.reshape(m * k, -1)).reshape(m, k, -1)

    def weights(d: np.ndarray, p: np.ndarray) -> np.ndarray:
        return np.einsum("tmr,mrn->tmn", d, p, optimize=True).reshape(t * m, -1)

    pointwise = pointwise_of(depthwise)
    errors = [problem(weights(depthwise, pointwise))]
    for _ in range(sweeps):
        d = depthwise.copy()
        for r in range(k):
            others = [s for s in range(k) if s != r]
            rest = linear
            if others:
                rest = linear - (
                    problem.metric @ weights(d[:, :, others], pointwise[:, others])
                ).reshape(linear.shape)
            p = pointwise[:, r]
            matrix = (metric * (p @ p.T)[None, :, None]).reshape(t * m, t * m)
            matrix[np.diag_indices(t * m)] += 1e-12 * np.trace(matrix) / (t * m) or 1.0
            d[:, :, r] = solve(matrix, np.einsum("tmn,mn->tm", rest, p).reshape(-1, 1)).reshape(
                t, m
            )
        p = pointwise_of(d)
        error = problem(weights(d, p))
        if not error < errors[-1]:
            break
        depthwise, pointwise = d, p
        errors.append(error)
        if errors[-2] - errors[-1] <= tolerance * abs(errors[-1]):
            break
    return depthwise, pointwise, errors
