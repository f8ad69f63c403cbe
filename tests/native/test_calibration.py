"""Calibration whose forward passes go through the kernels."""

import jax
import numpy as np
import pytest
from flax import nnx

import falcon_jax as fj
from falcon_jax.compression import observation
from tests.compression.networks import conv, images


class Block(nnx.Module):
    """A sum of two branches, as what comes after a layer is looked at, too."""

    def __init__(self, rngs):
        self.first = conv(3, 8, rngs=rngs)
        self.second = conv(8, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.first(x))
        return nnx.max_pool(jax.nn.relu(self.norm(self.second(x)) + x), (2, 2), strides=(2, 2))


@pytest.mark.usefixtures("built")
def test_what_layers_are_fitted_to_is_what_plain_jax_computes(monkeypatch):
    model, batches = Block(nnx.Rngs(0)), [images(8, seed=seed) for seed in range(3)]
    plan = fj.make_plan(model, [fj.Rule(method=fj.Falcon())], batches[0])
    small = fj.compress(model, plan)
    monkeypatch.setattr(observation, "_OFTEN", 1)
    passes = []
    with_native_steps = observation.with_native_steps
    monkeypatch.setattr(
        observation,
        "with_native_steps",
        lambda forward, **how: passes.append(forward) or with_native_steps(forward, **how),
    )
    # At all points, since which ones matter is told in bfloat16.
    by_kernels = fj.calibrate(model, small, plan, batches, points=10**6)
    assert passes
    monkeypatch.setattr(observation, "kernels_serve", lambda: False)
    plain = fj.calibrate(model, small, plan, batches, points=10**6)
    x = images(8, seed=3)
    np.testing.assert_allclose(by_kernels(x), plain(x), rtol=1e-2, atol=1e-3)
