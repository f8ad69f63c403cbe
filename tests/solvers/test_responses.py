"""Regressions of low rank against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from falcon_jax.solvers.responses import positive_part_regression, reduced_rank_regression
from tests.nn.weights import draw


def correlated(samples, n, *, seed=0, noise=0.3):
    """Responses, and targets that are a linear map of them with noise."""
    responses = np.float64(draw(samples, n, seed=seed)) @ np.float64(draw(n, n, seed=seed + 1)) + 2
    targets = responses @ np.float64(draw(n, n, seed=seed + 2)) / n
    return responses, targets + noise * np.float64(draw(samples, n, seed=seed + 3)) - 1


def predicted(factors, responses):
    left, right, offset = (np.float64(value) for value in factors)
    return responses @ left @ right + offset


def least_squares(responses, targets, rank, centred):
    """Return the least error by full least squares, then the fitted values' leading directions."""
    design = np.column_stack([responses, np.ones(len(responses))]) if centred else responses
    fitted = design @ np.linalg.lstsq(design, targets, rcond=None)[0]
    middle = fitted.mean(axis=0) if centred else 0
    _, _, vt = np.linalg.svd(fitted - middle, full_matrices=False)
    nearest = (fitted - middle) @ vt[:rank].T @ vt[:rank] + middle
    return ((targets - nearest) ** 2).sum()


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_map_is_the_best_of_its_rank(rank, centred):
    responses, targets = correlated(200, 6)
    factors = reduced_rank_regression(
        jnp.float32(responses), jnp.float32(targets), rank=rank, centred=centred
    )
    assert factors[0].shape == (6, rank) and factors[1].shape == (rank, 6)
    if not centred:
        np.testing.assert_array_equal(factors[2], 0)
    error = ((targets - predicted(factors, responses)) ** 2).sum()
    assert error == pytest.approx(least_squares(responses, targets, rank, centred), rel=1e-4)


def test_of_equal_responses_and_targets_the_principal_components():
    responses, _ = correlated(300, 8)
    left, right, offset = reduced_rank_regression(
        jnp.float32(responses), jnp.float32(responses), rank=3
    )
    middle = responses.mean(axis=0)
    _, _, vt = np.linalg.svd(responses - middle, full_matrices=False)
    projection = vt[:3].T @ vt[:3]
    np.testing.assert_allclose(left @ right, projection, atol=1e-4)
    np.testing.assert_allclose(offset, middle - middle @ projection, atol=1e-3)


def test_channels_that_never_answer_do_no_harm():
    responses, targets = correlated(100, 5)
    responses[:, 2] = 0
    responses[:, 4] = responses[:, 1]
    factors = reduced_rank_regression(jnp.float32(responses), jnp.float32(targets), rank=5)
    error = ((targets - predicted(factors, responses)) ** 2).sum()
    assert np.isfinite(error)
    assert error == pytest.approx(least_squares(responses, targets, 5, True), rel=1e-3)


def positive_error(factors, responses, targets):
    return ((np.maximum(targets, 0) - np.maximum(predicted(factors, responses), 0)) ** 2).sum()


@pytest.mark.parametrize("centred", [True, False])
def test_positive_parts_come_nearer_than_by_plain_regression(centred):
    responses, targets = correlated(500, 12)
    given = jnp.float32(responses), jnp.float32(targets)
    plain = positive_error(
        reduced_rank_regression(*given, rank=3, centred=centred), responses, targets
    )
    aware = positive_error(
        positive_part_regression(*given, rank=3, centred=centred), responses, targets
    )
    assert aware < 0.95 * plain


def test_the_auxiliary_step_is_the_minimum_of_each_entry():
    from falcon_jax.solvers.responses import _auxiliary

    y, target = np.float64(draw(40)), np.maximum(np.float64(draw(40, seed=1)), 0)
    grid = np.linspace(-6, 6, 24001)
    for penalty in (0.01, 1.0):
        costs = (target[:, None] - np.maximum(grid, 0)) ** 2 + penalty * (grid - y[:, None]) ** 2
        found = _auxiliary(jnp.float32(y), jnp.float32(target), jnp.float32(penalty))
        z = np.float64(found)
        cost = (target - np.maximum(z, 0)) ** 2 + penalty * (z - y) ** 2
        assert (cost <= costs.min(axis=1) + 1e-6).all()


def test_regressions_compile_under_vmap():
    responses, targets = correlated(60, 4)
    stack = jnp.stack([jnp.float32(responses)] * 2), jnp.stack([jnp.float32(targets)] * 2)
    left, _, _ = jax.vmap(lambda r, t: reduced_rank_regression(r, t, rank=2))(*stack)
    single, _, _ = reduced_rank_regression(stack[0][0], stack[1][0], rank=2)
    np.testing.assert_allclose(np.abs(left[1]), np.abs(single), rtol=1e-3, atol=1e-4)
