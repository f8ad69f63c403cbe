import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import falcon_jax as fj
from tests.compression.networks import Small, arrays, conv, images, randomised

BATCHES = [images(seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def reestimated():
    model = randomised(Small(nnx.Rngs(0)))
    model.train()
    before = arrays(model)
    new = fj.reestimate_batchnorm(model, iter(BATCHES))
    assert not model.norm1.use_running_average  # the original is not changed
    for path, array in arrays(model).items():
        np.testing.assert_array_equal(array, before[path])
    return model, new


def expected_statistics(model):
    """Means over the batches of each batch's mean and variance, in float64."""
    statistics = {"norm1": [], "norm2": []}
    for x in BATCHES:
        for i in "12":
            norm = getattr(model, f"norm{i}")
            y = np.asarray(getattr(model, f"conv{i}")(x), np.float64)
            mean, var = y.mean(axis=(0, 1, 2)), y.var(axis=(0, 1, 2))
            statistics[f"norm{i}"].append((mean, var))
            scale, bias = (np.asarray(v[...], np.float64) for v in (norm.scale, norm.bias))
            y = (y - mean) / np.sqrt(var + 1e-5) * scale + bias
            x = jnp.asarray(np.maximum(y, 0), jnp.float32)
    return {name: np.mean(values, axis=0) for name, values in statistics.items()}


def test_statistics_are_those_of_numpy(reestimated):
    model, new = reestimated
    for name, (mean, var) in expected_statistics(model).items():
        norm = getattr(new, name)
        np.testing.assert_allclose(norm.mean[...], mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(norm.var[...], var, rtol=1e-4, atol=1e-5)


def test_nothing_else_changes(reestimated):
    model, new = reestimated
    before, after = arrays(model), arrays(new)
    assert before.keys() == after.keys()
    for path in before:
        if not path.endswith(("mean", "var")):
            np.testing.assert_array_equal(after[path], before[path], err_msg=path)
    assert (new.norm1.momentum, new.norm2.momentum) == (0.9, 0.8)
    assert new.norm1.use_running_average
    assert new.dropout.deterministic


def test_no_batch_is_refused():
    with pytest.raises(ValueError, match="at least one batch of inputs; got none"):
        fj.reestimate_batchnorm(Small(nnx.Rngs(0)), [])


def test_a_model_without_batchnorm_is_copied():
    model = conv(3, 4, rngs=nnx.Rngs(0))
    new = fj.reestimate_batchnorm(model, BATCHES)
    assert new is not model
    np.testing.assert_array_equal(new.kernel[...], model.kernel[...])


def test_inputs_as_tuples():
    class TwoInputs(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, a, b):
            return self.norm(a - b)

    a, b = BATCHES[:2]
    new = fj.reestimate_batchnorm(TwoInputs(nnx.Rngs(0)), [(a, b)])
    np.testing.assert_allclose(
        new.norm.mean[...], np.asarray(a - b, np.float64).mean(axis=(0, 1, 2)), atol=1e-6
    )
