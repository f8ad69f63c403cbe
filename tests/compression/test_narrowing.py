import numpy as np
import pytest
from flax import nnx

import falcon_jax as fj
from tests.compression.networks import Nested, Small, arrays, randomised


def test_every_array_is_the_leading_part_of_the_trained_one():
    trained = randomised(Small(nnx.Rngs(0), m=6, n=8))
    narrower = Small(nnx.Rngs(1), m=3, n=5)
    before = arrays(narrower)
    found, old = arrays(fj.narrow(trained, narrower)), arrays(trained)
    assert found["conv2/kernel"].shape == (3, 3, 3, 5)
    for name in old:
        if "rngs" in name or "count" in name:
            continue
        part = old[name][tuple(slice(size) for size in before[name].shape)]
        np.testing.assert_array_equal(found[name], part)
    for name, value in arrays(narrower).items():
        np.testing.assert_array_equal(value, before[name])


def test_narrowed_and_compressed():
    trained = fj.models.vgg8_cifar(rngs=nnx.Rngs(0))
    small = fj.narrow(trained, fj.models.vgg8_cifar(width=0.5, rngs=nnx.Rngs(1)))
    plan = fj.make_plan(small, [fj.Rule(method=fj.Falcon())], np.ones((2, 32, 32, 3), np.float32))
    assert {row.spec.out_features for row in plan.replaced} == {16, 32, 64}
    kernel = small.stages[1][0].conv.kernel[...]
    np.testing.assert_array_equal(kernel, trained.stages[1][0].conv.kernel[...][:, :, :16, :32])


def test_models_that_do_not_fit_into_each_other():
    with pytest.raises(ValueError, match=r"conv1/bias has shape .6,. in the narrower model"):
        fj.narrow(Small(nnx.Rngs(0)), Small(nnx.Rngs(0), m=6))
    with pytest.raises(ValueError, match="other variables than the trained one") as caught:
        fj.narrow(Small(nnx.Rngs(0)), Nested(nnx.Rngs(0)))
    assert "conv1/kernel is missing" in str(caught.value)
