import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.jet import jet
from jax.test_util import check_grads

import falcon_jax as fj


def draw(shape=(4, 3, 5, 6), dtype=jnp.float32):
    rng = np.random.default_rng(0)
    arrays = rng.normal(1, 2, size=shape), rng.normal(size=shape[-1]), rng.normal(size=shape[-1])
    return tuple(jnp.asarray(a, dtype) for a in arrays)


def test_matches_the_definition_in_float64():
    x, scale, bias = draw()
    y, mean, variance = fj.ops.normalize_batch(x, scale, bias, epsilon=1e-3)
    x64 = np.asarray(x, np.float64)
    expected_mean, expected_variance = x64.mean(axis=(0, 1, 2)), x64.var(axis=(0, 1, 2))
    expected = (x64 - expected_mean) / np.sqrt(expected_variance + 1e-3)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-5)
    np.testing.assert_allclose(variance, expected_variance, rtol=1e-5)
    np.testing.assert_allclose(y, expected * np.asarray(scale) + np.asarray(bias), atol=1e-5)


def test_gradients_through_all_three_outputs_once_and_twice():
    arrays = draw((6, 2, 3))

    def outputs(x, scale, bias):
        y, mean, variance = fj.ops.normalize_batch(x, scale, bias, epsilon=1e-3)
        return y**2, mean**3, variance**2

    check_grads(jax.jit(outputs), arrays, 2, ["rev"], 3e-2, 3e-2)


def test_taylor_mode_is_that_of_flax():
    x, scale, bias = draw((6, 2, 3))
    series = tuple(jnp.cos(i * x) for i in (1, 2, 3))
    results = []
    for norm in (fj.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0))):
        norm.scale[...], norm.bias[...] = scale, bias
        graphdef, state = nnx.split(norm)

        def gradient(x, graphdef=graphdef, state=state):
            def loss(x):
                return (nnx.merge(graphdef, state, copy=True)(x) ** 3).sum()

            return jax.value_and_grad(loss)(x)

        results.append(jax.jit(lambda x, f=gradient: jet(f, (x,), (series,)))(x))
    for ours, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_the_module_trains_and_keeps_statistics_as_flax_does(dtype):
    x = draw()[0]
    ours = fj.BatchNorm(6, momentum=0.8, dtype=dtype, rngs=nnx.Rngs(0))
    theirs = nnx.BatchNorm(6, momentum=0.8, dtype=dtype, rngs=nnx.Rngs(0))
    results = []
    for norm in (ours, theirs):
        norm.scale[...], norm.bias[...] = draw()[1:]

        def loss(norm, x):
            y = norm(x)
            return (jnp.sin(y.astype(jnp.float32)) * x).sum(), y

        (_, y), gradients = nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(norm, x)
        norm.eval()
        results.append((y, jax.tree.leaves(gradients), norm.mean[...], norm.var[...], norm(x)))
    assert results[0][0].dtype == results[1][0].dtype
    tolerance = 1e-4 if dtype is None else 0.1
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


def test_what_it_does_not_do_itself_is_left_to_flax():
    x, mask = draw()[0], jnp.arange(4)[:, None, None, None] < 2
    for options, arguments in ({"use_scale": False}, {}), ({}, {"mask": mask}), ({"axis": 1}, {}):
        features = 3 if "axis" in options else 6
        ours = fj.BatchNorm(features, rngs=nnx.Rngs(0), **options)
        theirs = nnx.BatchNorm(features, rngs=nnx.Rngs(0), **options)
        np.testing.assert_allclose(ours(x, **arguments), theirs(x, **arguments), atol=1e-5)
        np.testing.assert_allclose(ours.mean[...], theirs.mean[...], atol=1e-6)
