"""Moments against float64 NumPy, over every kind of geometry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from falcon_jax import ops
from falcon_jax.ops.geometry import ConvSpec
from falcon_jax.solvers.patches import no_moments, update_moments

pytestmark = pytest.mark.slow

SPECS = [
    (
        ConvSpec(
            kernel_size=(3, 3), in_features=4, out_features=6, strides=2, feature_group_count=2
        ),
        (7, 8),
    ),
    (
        ConvSpec(
            kernel_size=(3, 2),
            in_features=2,
            out_features=3,
            padding="CIRCULAR",
            kernel_dilation=2,
            input_dilation=2,
        ),
        (7, 8),
    ),
    (
        ConvSpec(kernel_size=3, in_features=4, out_features=6, padding="CAUSAL", kernel_dilation=2),
        (9,),
    ),
    (
        ConvSpec(kernel_size=(2, 3, 3), in_features=2, out_features=3, padding="SAME_LOWER"),
        (4, 5, 5),
    ),
    (ConvSpec(kernel_size=(3, 3), in_features=4, out_features=6, padding=((1, 0), (2, 1))), (7, 8)),
]


def _random(spec, spatial, examples=5):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(2.0, 1.0, size=(examples, *spatial, spec.in_features)), "float32")
    kernel = jnp.asarray(rng.normal(size=spec.kernel_shape), "float32")
    y = ops.conv(x, kernel, **spec.geometry, feature_group_count=spec.feature_group_count)
    groups = spec.feature_group_count
    weights = kernel.reshape(-1, groups, spec.out_features // groups).swapaxes(0, 1)
    return x, y, weights


@pytest.mark.parametrize(("spec", "spatial"), SPECS)
def test_moments_of_a_convolutions_own_answers_give_its_kernel(spec, spatial):
    x, y, weights = _random(spec, spatial)
    moments = no_moments(spec)
    for part in (slice(0, 2), slice(2, 5)):
        moments = update_moments(moments, x[part], y[part], spec)
    rows = np.asarray(y, np.float64).reshape(-1, spec.out_features)
    assert float(moments.count) == len(rows)
    target = rows.reshape(len(rows), spec.feature_group_count, -1).swapaxes(0, 1)
    np.testing.assert_allclose(moments.target_mean, target.mean(1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(moments.variance, target.var(1), rtol=1e-4)
    # y = W^T x: cross = second W, and the means belong together.
    np.testing.assert_allclose(moments.second @ weights, moments.cross, rtol=1e-3, atol=2e-4)
    means = np.einsum("gin,gi->gn", weights, moments.input_mean)
    np.testing.assert_allclose(means, moments.target_mean, rtol=1e-4, atol=1e-4)


def test_sampled_and_weighted_points_are_the_same_points_of_inputs_and_targets():
    spec, spatial = SPECS[4]
    x, y, weights = _random(spec, spatial)
    start = no_moments(spec)
    sampled = update_moments(start, x, y, spec, points=4, key=jax.random.key(0))
    assert float(sampled.count) == 20
    np.testing.assert_allclose(sampled.second @ weights, sampled.cross, rtol=1e-3, atol=2e-4)
    # Weights of 0 and 1 leave points out.
    kept = np.zeros(y.shape[:-1], "float32")
    kept[:3] = 1
    weighted = update_moments(no_moments(spec), x, y, spec, weights=jnp.asarray(kept))
    fewer = update_moments(no_moments(spec), x[:3], y[:3], spec)
    for a, b in zip(jax.tree.leaves(weighted), jax.tree.leaves(fewer), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="needs a key"):
        update_moments(no_moments(spec), x, y, spec, points=4)
