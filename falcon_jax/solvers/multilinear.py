"""Kernels that are products of factors, fitted in the metric of the data factor by factor.

A kernel that is linear in each of its factors has an error that is quadratic in each of them: every
step minimises it over one factor, by conjugate gradients, so that no step makes it larger.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import lax
from jaxtyping import Array, Float

from falcon_jax.solvers.alternating import MANY_SWEEPS, SMALL, SMALL_TOLERANCE, STARTS
from falcon_jax.solvers.quadratic import Quadratic, root, solve

Factors = dict[str, Array]
# Factors to the weights (*groups, inputs, outputs), or to what an outer factor maps to the outputs.
Body = Callable[[Factors], Float[Array, "*groups inputs outputs"]]
STEPS = 24  # of conjugate gradients for a factor
_product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


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
        _sweep, metric=metric, linear=linear, body=body, outer=outer, names=names
    )
    if count == 1:
        return step(factors)
    return lax.fori_loop(0, count, lambda _, factors: step(factors), factors)


def _sweep(
    factors: Factors,
    metric: Array,
    linear: Array,
    *,
    body: Body,
    outer: str | None,
    names: tuple[str, ...],
) -> Factors:
    if outer is not None:
        linear = _product(linear, factors[outer].T)

    def mixed(y: Array) -> Array:
        if outer is None:
            return y
        return _product(_product(y, factors[outer]), factors[outer].T)

    for name in names:
        rest = {key: value for key, value in factors.items() if key != name}

        def part(value: Array, name: str = name, rest: Factors = rest) -> Array:
            return body(rest | {name: value})

        value = factors[name]
        back = jax.linear_transpose(part, value)

        def normal(v: Array, part=part, back=back) -> Array:
            return back(_product(metric, mixed(part(v))))[0]

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
