import numpy as np
from flax import nnx

from falcon_jax.compression import measure_latency
from tests.compression.networks import Small, arrays, images


def test_latency_is_positive_and_the_model_is_not_changed():
    model = Small(nnx.Rngs(0))
    before = arrays(model)
    assert 0 < measure_latency(model, images(), repeats=3) < 10_000
    for path, array in arrays(model).items():
        np.testing.assert_array_equal(array, before[path])
    assert not model.norm1.use_running_average
