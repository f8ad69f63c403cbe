"""Fits to intervals against a convex optimiser in float64."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from falcon_jax.solvers.intervals import Points, fit_to_intervals, moments_of
from falcon_jax.solvers.moments import dense_kernel

INPUTS, OUTPUTS, COUNT = 6, 3, 400


def problem(groups=1):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(groups, COUNT, INPUTS)) + 0.5
    kernel = rng.normal(size=(groups, INPUTS, OUTPUTS))
    y = np.einsum("gsi,gin->gsn", x, kernel) + rng.normal(size=(groups, COUNT, OUTPUTS)) - 0.5
    y = y.swapaxes(0, 1).reshape(COUNT, -1)
    lower, upper = np.where(y > 0, y, -np.inf), np.maximum(y, 0)
    upper[:20] = np.inf  # anything above is as good
    kernel = np.concatenate(list(kernel), axis=1)[None]
    return tuple(np.float32(a) for a in (x, y, lower, upper, kernel))


def distance(x, lower, upper, weights, bias):
    answers = np.einsum("gsi,gin->sgn", np.float64(x), weights).reshape(lower.shape) + bias
    return ((np.clip(answers, lower, upper) - answers) ** 2).sum() / COUNT


def fitted(x, y, lower, upper, kernel, use_bias, **options):
    points = Points(patches=jnp.asarray(x), lower=jnp.asarray(lower), upper=jnp.asarray(upper))
    moments = moments_of(points.patches, jnp.asarray(y))
    moments = moments if use_bias else moments.about_zero()
    kernel = jnp.asarray(kernel)

    def fit(moments, _):
        return dense_kernel(moments, kernel, ridge=1e-9)

    return fit_to_intervals(
        points,
        moments,
        fit(moments, None),
        fit=fit,
        kernel=lambda params: params,
        use_bias=use_bias,
        **options,
    )


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_error_falls_to_that_of_the_best_weights(use_bias, groups):
    x, y, lower, upper, kernel = problem(groups)
    params, bias, errors = fitted(x, y, lower, upper, kernel, use_bias, steps=300, tolerance=1e-7)
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))
    shape = (groups, INPUTS, OUTPUTS)
    weights = np.float64(params).reshape(INPUTS, groups, OUTPUTS).swapaxes(0, 1)
    found = distance(x, lower, upper, weights, bias)
    assert found == pytest.approx(errors[-1], rel=1e-4)

    def of(flat):
        rest = flat[-groups * OUTPUTS :] if use_bias else 0
        return distance(x, lower, upper, flat[: np.prod(shape)].reshape(shape), rest)

    size = np.prod(shape) + groups * OUTPUTS * use_bias
    best = scipy.optimize.minimize(of, np.zeros(size)).fun
    assert found <= best * (1 + 1e-3)
    assert use_bias or not bias.any()


def test_answers_that_are_all_decided_give_the_fit_to_them():
    x, y, *_, kernel = problem()
    params, bias, errors = fitted(x, y, y, y, kernel, True)
    design = np.concatenate([np.float64(x[0]), np.ones((COUNT, 1))], axis=1)
    wanted = np.linalg.lstsq(design, np.float64(y), rcond=None)[0]
    np.testing.assert_allclose(params[0], wanted[:-1], atol=1e-4)
    np.testing.assert_allclose(bias, wanted[-1], atol=1e-4)
    assert errors[-1] == pytest.approx(errors[0], rel=1e-4)
