"""Kernels that are products of factors, fitted in the metric of the data factor by factor."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import lax
from jaxtyping import Array, Float

from falcon_jax.solvers.low_rank import best_terms
from falcon_jax.solvers.moments import RIDGE, Moments, Quadratic, partial_traces, root, solve

MOST_SWEEPS = 30
TOLERANCE = 3e-3  # of the error that a sweep takes away
LARGE = 1024  # weights of a channel from which on a sweep takes long
LARGE_TOLERANCE = 1e-2
SMALL = 128  # weights of a channel up to which random starts are tried, too
STARTS = 8
CHANNEL_STARTS = 40  # of FALCON, where every output channel takes the best
MANY_SWEEPS = 200  # of each of several starts
SMALL_TOLERANCE = 1e-4
_STEPS, _SMALL_STEPS = 2, 16  # of conjugate gradients; of small kernels for every term
_CHUNK = 1 << 25  # numbers on the way to the normal matrices of some channels: 128 MB


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
    inputs = problem.metric.shape[0]
    if inputs > SMALL:
        tolerance = LARGE_TOLERANCE if inputs >= LARGE else TOLERANCE
        return falcon_als(problem, *start, tolerance=tolerance)[:2]
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


class _Metric(NamedTuple):
    """A with what is wanted of it in every sweep; near to ``by_tap x by_channel^-1``."""

    whole: Float[Array, "i i"]
    by_tap: Float[Array, "taps taps"]
    inverse: Float[Array, "m m"]


_State = tuple[Array, Array, Array]  # b - A w, pointwise and depthwise factors


def falcon_sweeps(
    moments: Moments,
    kernel: Float[Array, "*kernel_size m n"],
    pointwise: Float[Array, "m k n"],
    depthwise: Float[Array, "*kernel_size k n"],
    *,
    ridge: float = RIDGE,
) -> tuple[Float[Array, "m k n"], Float[Array, "*kernel_size k n"]]:
    """Return better factors for moments, after two sweeps in float32; group by group."""
    found = []
    for group in range(len(moments.input_mean)):
        metric, *state = _group_of(moments, kernel, pointwise, depthwise, group, ridge=ridge)
        for _ in range(2):
            state = _sweep(metric, *state)
        found.append(state[1:])
    p, d = (jnp.concatenate(part, axis=-1) for part in zip(*found, strict=True))
    return p, d.reshape(depthwise.shape)


@functools.partial(jax.jit, static_argnames="ridge")
def _group_of(
    moments: Moments,
    kernel: Float[Array, "*kernel_size m n"],
    pointwise: Float[Array, "m k n"],
    depthwise: Float[Array, "*kernel_size k n"],
    group: Array | int,
    *,
    ridge: float,
) -> tuple[_Metric, Array, Array, Array]:
    """Return the metric of a group, and the state that sweeps start from."""
    groups, inputs = moments.input_mean.shape
    taps = inputs // len(pointwise)

    def part(array: Array, rows: int) -> Array:
        whole = array.astype(jnp.float32).reshape(rows, -1, groups, array.shape[-1] // groups)
        return lax.dynamic_index_in_dim(whole, group, axis=2, keepdims=False)

    second, cross = moments.second[group], moments.cross[group]
    mean = jnp.trace(second) / inputs
    lam = jnp.where(mean > 0, ridge * mean, 1.0)
    linear = cross + lam * part(kernel, inputs)[:, 0]
    metric = _metric(second + lam * jnp.eye(inputs), taps)
    p, d = part(pointwise, len(pointwise)), part(depthwise, taps)
    return metric, linear.reshape(taps, len(p), -1) - _applied(metric.whole, p, d), p, d


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
    metric = _metric(jnp.asarray(problem.metric, jnp.float32), t)
    linear = jnp.asarray(problem.linear, jnp.float32).reshape(t, m, -1)
    best = jnp.asarray(pointwise, jnp.float32), jnp.asarray(depthwise, jnp.float32)
    rest = linear - _applied(metric.whole, *best)
    errors = [problem(_weights(*best))]
    for _ in range(sweeps):
        rest, *found = _sweep(metric, rest, *best)
        error = problem(_weights(*found))
        # Rounding can make a step larger where there is nothing left to win.
        if not error < errors[-1]:
            break
        best = found[0], found[1]
        errors.append(error)
        if errors[-2] - errors[-1] <= tolerance * abs(errors[-1]):
            break
    return np.asarray(best[0], np.float64), np.asarray(best[1], np.float64), errors


@functools.partial(jax.jit, static_argnames="taps")
def _metric(metric: Float[Array, "i i"], taps: int) -> _Metric:
    blocks = metric.reshape(taps, -1, taps, len(metric) // taps)
    by_channel = jnp.einsum("tmtk->mk", blocks)
    return _Metric(metric, jnp.einsum("tmum->tu", blocks), jnp.linalg.inv(by_channel))


@jax.jit
def _sweep(
    metric: _Metric,
    rest: Float[Array, "taps m n"],
    pointwise: Float[Array, "m k n"],
    depthwise: Float[Array, "taps k n"],
) -> _State:
    """Return better pointwise factors, then the depthwise ones that are best for them."""
    t, m, n = rest.shape
    k = pointwise.shape[1]
    steps = k * _SMALL_STEPS if t * m <= SMALL else _STEPS
    change, moved = _better_pointwise(metric, depthwise, rest, steps)
    pointwise, rest = pointwise + change, rest - moved
    size = max(1, _CHUNK // (k * t * m * t))  # channels at a time
    parts = [
        _best_depthwise(metric.whole, rest[..., i : i + size], pointwise[..., i : i + size])
        for i in range(0, n, size)
    ]
    change, moved = (jnp.concatenate(part, axis=-1) for part in zip(*parts, strict=True))
    return rest - moved, *balanced(pointwise, depthwise + change)


def _best_depthwise(
    metric: Float[Array, "i i"], rest: Float[Array, "taps m n"], pointwise: Float[Array, "m k n"]
) -> tuple[Float[Array, "taps k n"], Float[Array, "taps m n"]]:
    """Return a change to the best depthwise factors, and what the metric makes of it."""
    t, m, n = rest.shape
    k = pointwise.shape[1]
    half = _product("am,mx->ax", metric.reshape(t * m * t, m), pointwise.reshape(m, k * n))
    half = half.reshape(t, m, t, k, n)

    # As a sum of rows, which needs no other order of the axes.
    def added(row: Array | int, matrix: Array) -> Array:
        return matrix + half[None, :, row] * pointwise[row][:, None, None, None]

    matrix = lax.fori_loop(0, m, added, jnp.zeros((k, t, t, k, n)))
    matrix = matrix.transpose(4, 0, 1, 3, 2).reshape(n, k * t, k * t)
    right = jnp.sum(pointwise[:, :, None] * rest.swapaxes(0, 1)[:, None], axis=0)
    found = _solved(matrix, right.reshape(k * t, n).T).reshape(n, k, t).transpose(2, 1, 0)
    return found, jnp.sum(half * found[None, None], axis=(2, 3))


_product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


@jax.jit
def _applied(metric: Array, pointwise: Array, depthwise: Array) -> Array:
    t, m, n = depthwise.shape[0], pointwise.shape[0], pointwise.shape[-1]
    weights = _product("tkn,mkn->tmn", depthwise, pointwise).reshape(t * m, n)
    return _product("ij,jn->in", metric, weights).reshape(t, m, n)


def _better_pointwise(
    metric: _Metric,
    depthwise: Float[Array, "taps k n"],
    rest: Float[Array, "taps m n"],
    steps: int,
) -> tuple[Float[Array, "m k n"], Float[Array, "taps m n"]]:
    """Return a change of the pointwise factors, and what the metric makes of it.

    By conjugate gradients for every output channel: each step takes from the error, as an exact
    solution would, and costs one product with the metric; the normal matrices are never made.
    They would be easily inverted were the metric the product of its parts.
    """
    k = depthwise.shape[1]
    gram = _product("tkn,tu,uln->nkl", depthwise, metric.by_tap, depthwise)
    trace = jnp.trace(gram, axis1=1, axis2=2)
    shift = jnp.where(trace > 0, 1e-5 * trace, 1)
    inverse = jnp.linalg.inv(gram + shift[:, None, None] * jnp.eye(k)[None])

    def back(image: Float[Array, "taps m n"]) -> Float[Array, "m k n"]:
        return jnp.sum(depthwise[:, None] * image[:, :, None], axis=0)

    def scaled(left: Float[Array, "m k n"]) -> Float[Array, "m k n"]:
        z = _product("ij,jkn->ikn", metric.inverse, left)
        return _product("nkl,mln->mkn", inverse, z)

    def step(_: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        x, left, direction, energy, moved = state
        image = _applied(metric.whole, direction, depthwise)
        images = back(image)
        curvature = _dot(direction, images)
        length = jnp.where(curvature > 0, energy / jnp.where(curvature > 0, curvature, 1), 0)
        x, left, moved = x + length * direction, left - length * images, moved + length * image
        z = scaled(left)
        following = _dot(left, z)
        turn = jnp.where(energy > 0, following / jnp.where(energy > 0, energy, 1), 0)
        return x, left, z + turn * direction, following, moved

    gradient = back(rest)
    z = scaled(gradient)
    start = jnp.zeros_like(z), gradient, z, _dot(gradient, z), jnp.zeros_like(rest)
    x, _, _, _, moved = lax.fori_loop(0, steps, step, start)
    return x, moved


def _dot(a: Float[Array, "m k n"], b: Float[Array, "m k n"]) -> Float[Array, "1 1 n"]:
    return jnp.sum(a * b, axis=(0, 1), keepdims=True)


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
