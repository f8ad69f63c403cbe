import jax.numpy as jnp
import numpy as np
import optax
import pytest

from falcon_jax.training.config import TrainConfig
from falcon_jax.training.optimizers import make_optimizer, make_schedule


def rates(steps_per_epoch, at, **settings):
    schedule = make_schedule(TrainConfig(**settings), steps_per_epoch)
    return [float(schedule(jnp.asarray(step))) for step in at]


def test_step_schedule_drops_at_its_boundaries():
    values = rates(4, [0, 7, 8, 11, 12, 19], epochs=5, boundaries=(2.0, 3.0), learning_rate=0.5)
    np.testing.assert_allclose(values, [0.5, 0.5, 0.05, 0.05, 0.005, 0.005], rtol=1e-6)


def test_step_schedule_as_the_paper_has_it():
    steps = 351  # 45,000 images, 128 a batch
    at = [0, 150 * steps - 1, 150 * steps, 250 * steps - 1, 250 * steps, 350 * steps - 1]
    np.testing.assert_allclose(rates(steps, at), [0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-6)


def test_boundaries_within_an_epoch_and_another_factor():
    values = rates(10, [14, 15], epochs=3, boundaries=(1.5,), factor=0.5, learning_rate=1.0)
    assert values == [1.0, 0.5]


def test_cosine_schedule():
    values = rates(5, [0, 5, 10, 15, 20], epochs=4, schedule="cosine", learning_rate=0.2)
    half = 0.1 * np.sqrt(0.5)
    np.testing.assert_allclose(
        values, [0.2, 0.1 + half, 0.1, 0.1 - half, 0.0], rtol=1e-6, atol=1e-8
    )


def test_constant_schedule():
    values = rates(5, [0, 3, 1000], epochs=4, schedule="constant", learning_rate=0.3)
    np.testing.assert_allclose(values, [0.3] * 3, rtol=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
def test_warmup_rises_in_a_line_to_the_highest_rate(schedule):
    values = rates(
        4,
        range(9),
        epochs=10,
        warmup_epochs=2.0,
        schedule=schedule,
        learning_rate=0.8,
        boundaries=(),
    )
    np.testing.assert_allclose(values, [*np.arange(8) * 0.1, 0.8], rtol=1e-6, atol=1e-8)


def test_cosine_after_a_warmup_ends_at_zero():
    values = rates(
        10, [10, 25, 40], epochs=4, warmup_epochs=1.0, schedule="cosine", learning_rate=0.4
    )
    np.testing.assert_allclose(values, [0.4, 0.2, 0.0], rtol=1e-6, atol=1e-7)


def test_warmup_of_part_of_an_epoch():
    values = rates(
        10, [0, 1, 4, 5], epochs=1, warmup_epochs=0.5, schedule="constant", learning_rate=1.0
    )
    np.testing.assert_allclose(values, [0.0, 0.2, 0.8, 1.0], rtol=1e-6)


def updated(optimizer, params, gradients):
    """Return the parameters after every step."""
    state, path = optimizer.init(params), []
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        path.append(np.asarray(params["w"]))
    return path


@pytest.fixture
def problem():
    random = np.random.default_rng(0)
    start = random.normal(size=(4, 3))
    return start, random.normal(size=(7, 4, 3))


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_equals_pytorchs_rule_in_float64(problem, nesterov):
    start, gradients = problem
    settings = TrainConfig(
        epochs=4,
        boundaries=(1.0, 2.0),
        learning_rate=0.1,
        momentum=0.9,
        weight_decay=0.05,
        nesterov=nesterov,
    )
    w, velocity, expected = start.copy(), np.zeros_like(start), []
    for step, gradient in enumerate(gradients):
        rate = 0.1 * 0.1 ** ((step >= 2) + (step >= 4))
        g = gradient + 0.05 * w
        velocity = 0.9 * velocity + g
        w = w - rate * (g + 0.9 * velocity if nesterov else velocity)
        expected.append(w)
    found = updated(
        make_optimizer(settings, 2),
        {"w": jnp.asarray(start, jnp.float32)},
        [{"w": jnp.asarray(g, jnp.float32)} for g in gradients],
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_adamw_decouples_weight_decay_in_float64(problem):
    start, gradients = problem
    settings = TrainConfig(
        epochs=4, optimizer="adamw", learning_rate=0.01, weight_decay=0.3, boundaries=(1.0,)
    )
    w, first, second, expected = start.copy(), 0.0, 0.0, []
    for step, gradient in enumerate(gradients):
        rate = 0.01 if step < 2 else 0.001
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        mean, square = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        w = w - rate * (mean / (np.sqrt(square) + 1e-8) + 0.3 * w)
        expected.append(w)
    found = updated(
        make_optimizer(settings, 2),
        {"w": jnp.asarray(start, jnp.float32)},
        [{"w": jnp.asarray(g, jnp.float32)} for g in gradients],
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
