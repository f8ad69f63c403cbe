import jax
import jax.numpy as jnp
import numpy as np
import pytest

import falcon_jax as fj
from falcon_jax.solvers import AdamWSettings, fit_adamw
from tests.nn.weights import draw


def numpy_adamw(target, params, gradient, *, steps, learning_rate, drops, weight_decay):
    """AdamW as Loshchilov and Hutter define it, in float64."""
    params = {name: np.asarray(p, np.float64) for name, p in params.items()}
    first = {name: np.zeros_like(p) for name, p in params.items()}
    second = {name: np.zeros_like(p) for name, p in params.items()}
    for step in range(1, steps + 1):
        rate = learning_rate * 0.1 ** sum(step > drop for drop in drops)
        gradients = gradient(target, params)
        for name, g in gradients.items():
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g * g
            update = first[name] / (1 - 0.9**step)
            update /= np.sqrt(second[name] / (1 - 0.999**step)) + 1e-8
            params[name] = params[name] - rate * (update + weight_decay * params[name])
    return params


def test_follows_adamw_step_by_step():
    rng = np.random.default_rng(0)
    target, start = rng.normal(size=(5, 4)), {"a": rng.normal(size=5), "b": rng.normal(size=4)}

    def gradient(target, params):
        residual = 2 * (np.outer(params["a"], params["b"]) - target) / target.size
        return {"a": residual @ params["b"], "b": params["a"] @ residual}

    options = {"steps": 30, "learning_rate": 0.05, "drops": (10, 20), "weight_decay": 0.01}
    expected = numpy_adamw(target, start, gradient, **options)
    params, losses = fit_adamw(
        jnp.asarray(target, jnp.float32),
        {name: jnp.asarray(p, jnp.float32) for name, p in start.items()},
        lambda p: jnp.outer(p["a"], p["b"]),
        AdamWSettings(**options),
    )
    assert losses.shape == (30,)
    for name in expected:
        np.testing.assert_allclose(params[name], expected[name], rtol=2e-4, atol=1e-5)


def test_trains_every_term_and_comes_near_the_exact_fit():
    kernel = draw(3, 3, 8, 6)
    method = fj.Falcon(rank=3)
    spec = fj.ConvSpec.of_kernel(kernel.shape)
    start = method.init(jax.random.key(1), spec)
    fitted = fj.fit(
        kernel,
        method,
        "adamw",
        key=jax.random.key(1),
        settings=AdamWSettings(steps=1000, learning_rate=0.02),
    )
    for name in start:
        moved = jnp.abs(fitted[name] - start[name]).reshape(-1, 3, start[name].shape[-1])
        assert bool((moved.max(axis=(0, 2)) > 0.01).all()), name
    exact = fj.fit(kernel, method)
    error = fj.relative_error(kernel, method.kernel(fitted, spec))
    optimum = fj.relative_error(kernel, method.kernel(exact, spec))
    assert float(optimum) <= float(error) + 1e-6
    assert float(error) < 1.05 * float(optimum)


def test_vmaps_over_kernels():
    kernels = draw(3, 3, 3, 4, 5)
    settings = AdamWSettings(steps=5)

    def fit(kernel):
        return fj.fit(kernel, fj.Falcon(), "adamw", settings=settings)

    together = jax.jit(jax.vmap(fit))(kernels)
    for i in range(3):
        alone = fit(kernels[i])
        for name in alone:
            np.testing.assert_allclose(together[name][i], alone[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"learning_rate": 0.0}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match="steps >= 1, learning_rate > 0"):
        AdamWSettings(**wrong)
