"""Fits in the metric of the data against L-BFGS in float64 from random starts."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from falcon_jax.solvers.alternating import (
    alternate,
    falcon_als,
    falcon_best,
    falcon_closed,
    low_rank,
    separable_als,
)
from falcon_jax.solvers.moments import Quadratic

pytestmark = pytest.mark.slow

T, M, N = 4, 3, 4


def _problem(kind: str) -> Quadratic:
    rng = np.random.default_rng(1)
    points = 6 if kind == "few" else 200
    mix = rng.normal(size=(T * M, T * M)) * np.exp(-np.arange(T * M) / 5)[:, None]
    x = rng.normal(size=(points, T * M)) @ mix
    if kind == "dead":
        x.reshape(-1, T, M)[:, :, 1] = 0
    kernel = rng.normal(size=(T * M, N))
    y = x @ (kernel + 0.3 * rng.normal(size=kernel.shape))
    second = x.T @ x / points
    lam = 1e-4 * np.trace(second) / len(second)
    return Quadratic(
        taps=T,
        metric=second + lam * np.eye(T * M),
        linear=x.T @ y / points + lam * kernel,
        constant=float((y * y).sum() / points + lam * (kernel**2).sum()),
    )


@functools.partial(jax.jit, static_argnames=("weights", "shapes"))
@functools.partial(jax.value_and_grad, argnums=0)
def _error(flat, metric, linear, *, weights, shapes):
    sizes = np.cumsum([np.prod(s) for s in shapes])
    parts = jnp.split(flat, sizes[:-1])
    found = weights(*(p.reshape(s) for p, s in zip(parts, shapes, strict=True)))
    found = found.reshape(linear.shape)
    return jnp.sum(found * (metric @ found - 2 * linear))


def _best(problem, weights, shapes, starts=20):
    """Return the least error that L-BFGS finds from random starts."""
    rng = np.random.default_rng(2)
    size = sum(int(np.prod(s)) for s in shapes)
    with jax.enable_x64(True):
        metric, linear = jnp.asarray(problem.metric), jnp.asarray(problem.linear)

        def numbers(flat):
            found = _error(flat, metric, linear, weights=weights, shapes=shapes)
            return tuple(np.asarray(a, np.float64) for a in found)

        least = min(
            scipy.optimize.minimize(
                numbers, rng.normal(size=size), jac=True, options={"maxiter": 300}
            ).fun
            for _ in range(starts)
        )
    return least + problem.constant


def _product(left, right):
    return left @ right


def _falcon(pointwise, depthwise):
    return jnp.einsum("mkn,tkn->tmn", pointwise, depthwise)


def _separable(depthwise, pointwise):
    return jnp.einsum("tmk,mkn->tmn", depthwise, pointwise)


def _tucker2(inner, core, outer):
    return jnp.einsum("ma,tab,bn->tmn", inner, core, outer)


def _falls(errors):
    assert np.isfinite(errors).all()
    assert all(later <= earlier for earlier, later in itertools.pairwise(errors))


@pytest.mark.parametrize("kind", ["plain", "few", "dead"])
def test_dense_and_low_rank_are_exact(kind):
    problem = _problem(kind)
    dense = problem(problem.dense())
    assert dense == pytest.approx(problem(np.linalg.solve(problem.metric, problem.linear)), 1e-6)
    left, right = low_rank(problem, 2)
    # Independent: alternating exact solves from a random start, to the end.
    best = _best(problem, _product, ((T * M, 2), (2, N)), starts=4)
    assert problem(left @ right) <= best * (1 + 1e-5)
    whole = low_rank(problem, N)
    assert problem(whole[0] @ whole[1]) == pytest.approx(dense, 1e-6, 1e-6)


@pytest.mark.parametrize("kind", ["plain", "few", "dead"])
@pytest.mark.parametrize("rank", [1, 2])
def test_falcon_comes_near_to_the_best_of_many_starts(kind, rank):
    problem = _problem(kind)
    start = falcon_closed(problem, rank)
    *_, errors = falcon_als(problem, *start, sweeps=200, tolerance=1e-6)
    _falls(errors)
    # Fewer points than unknowns leave many local minima, which one start does not leave.
    pointwise, depthwise = falcon_best(problem, rank)
    weights = np.einsum("mkn,tkn->tmn", pointwise, depthwise).reshape(T * M, N)
    best = _best(problem, _falcon, ((M, rank, N), (T, rank, N)))
    assert problem(weights) <= 1.01 * best


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_falcon_of_large_kernels_comes_as_low_as_exact_alternating_steps(rank):
    taps, m, n = 9, 20, 3
    rng = np.random.default_rng(3)
    mix = rng.normal(size=(taps * m, taps * m)) * np.exp(-np.arange(taps * m) / 60)[:, None]
    x = rng.normal(size=(600, taps * m)) @ mix
    y = x @ rng.normal(size=(taps * m, n))
    problem = Quadratic(
        taps=taps,
        metric=x.T @ x / 600,
        linear=x.T @ y / 600,
        constant=float((y * y).sum() / 600),
    )
    start = falcon_closed(problem, rank)
    *found, errors = falcon_als(problem, *start, sweeps=300, tolerance=1e-5)
    _falls(errors)
    weights = np.einsum("mkn,tkn->tmn", *found).reshape(taps * m, n)
    assert errors[-1] == pytest.approx(problem(weights), 1e-9)
    # Independent: every output channel alone, each factor solved for in float64.
    metric, least = problem.metric.reshape(taps, m, taps, m), 0.0
    for channel in range(n):
        p, d = (factor[..., channel] for factor in start)
        right = problem.linear[:, channel].reshape(taps, m)
        for _ in range(300):
            matrix = np.einsum("tk,tmus,ul->mksl", d, metric, d, optimize=True)
            p = np.linalg.solve(matrix.reshape(m * rank, -1), (right.T @ d).ravel())
            p = p.reshape(m, rank)
            matrix = np.einsum("mk,tmus,sl->tkul", p, metric, p, optimize=True)
            d = np.linalg.solve(matrix.reshape(taps * rank, -1), (right @ p).ravel())
            d = d.reshape(taps, rank)
        error = x @ (d @ p.T).ravel() - y[:, channel]
        least += float(np.mean(error**2))
    # They can end in different local minima.
    assert errors[-1] <= 1.05 * least


@pytest.mark.parametrize("kind", ["plain", "few", "dead"])
def test_separable_comes_near_to_the_best_of_many_starts(kind):
    problem = _problem(kind)
    dense = problem.dense().reshape(T, M, N).transpose(1, 0, 2)
    start = np.linalg.svd(dense, full_matrices=False)[0][:, :, :1].transpose(1, 0, 2)
    *_, errors = separable_als(problem, start, sweeps=300, tolerance=1e-7)
    _falls(errors)
    best = _best(problem, _separable, ((T, M, 1), (M, 1, N)))
    assert errors[-1] <= 1.01 * best


def _tucker(factors):
    return jnp.einsum("ma,tab->tmb", factors["inner"], factors["core"]).reshape(T * M, -1)


@pytest.mark.parametrize("kind", ["plain", "dead"])
def test_tucker_comes_near_to_the_best_of_many_starts(kind):
    problem = _problem(kind)
    left, right = low_rank(problem, 3)
    blocks = left.reshape(T, M, 3)
    inner = np.linalg.svd(blocks.transpose(1, 0, 2).reshape(M, -1))[0][:, :2]
    starts = [{"inner": inner, "core": np.einsum("ma,tmb->tab", inner, blocks), "outer": right}]
    rng = np.random.default_rng(3)
    starts += [{n: rng.normal(size=v.shape) for n, v in starts[0].items()} for _ in range(10)]
    found = []
    for start in starts:
        _, errors = alternate(_tucker, start, problem, outer="outer", sweeps=200, tolerance=1e-6)
        _falls(errors)
        found.append(errors[-1])
    best = _best(problem, _tucker2, ((M, 2), (T, 2, 3), (3, N)))
    assert min(found) <= 1.01 * best
