import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from falcon_jax.training.network import Network
from tests.training.tiny import Tiny


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (16, 8, 8, 3))


def perturbed(model):
    """Give BatchNorm statistics that are not those of a new network."""
    norm = model.layers[1]
    norm.mean[...] = jnp.linspace(-0.1, 0.1, 6)
    norm.var[...] = jnp.linspace(0.5, 2.0, 6)
    return model


def test_paths_are_those_of_the_modules():
    _, params, statistics = Network.split(Tiny())
    assert set(params) == {
        "layers/0/kernel",
        "layers/0/bias",
        "layers/1/scale",
        "layers/1/bias",
        "head/kernel",
        "head/bias",
    }
    assert set(statistics) == {"layers/1/mean", "layers/1/var"}


def test_evaluation_equals_the_module(x):
    model = perturbed(Tiny())
    network, params, statistics = Network.split(model)
    model.eval()
    np.testing.assert_array_equal(network.apply(params, statistics, x), model(x))
    np.testing.assert_array_equal(network.merge(params, statistics)(x), model(x))


def test_evaluation_changes_with_the_arrays(x):
    network, params, statistics = Network.split(Tiny())
    params = params | {"head/bias": params["head/bias"] + 3}
    before = network.merge(*Network.split(Tiny())[1:])(x)
    np.testing.assert_allclose(network.apply(params, statistics, x), before + 3, rtol=1e-5)


def test_the_model_that_is_split_is_not_changed(x):
    model = Tiny()
    model.eval()
    before, counts = model(x), model.dropout.rngs.count[...]
    network, params, statistics = Network.split(model)
    network.apply_training(params, statistics, x, jax.random.key(0))
    np.testing.assert_array_equal(model(x), before)
    assert model.dropout.rngs is not None and model.dropout.rngs.count[...] == counts
    assert model.dropout.deterministic


def test_training_equals_the_module_without_dropout(x):
    model = perturbed(Tiny(dropout=0.0))
    network, params, statistics = Network.split(model)
    logits, new = network.apply_training(params, statistics, x, jax.random.key(0))
    model.train()
    np.testing.assert_allclose(logits, model(x), rtol=1e-6, atol=1e-6)
    norm = model.layers[1]
    np.testing.assert_allclose(new["layers/1/mean"], norm.mean[...], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(new["layers/1/var"], norm.var[...], rtol=1e-6)
    assert set(new) == set(statistics)
    assert not np.allclose(new["layers/1/mean"], statistics["layers/1/mean"])


def test_training_equals_the_module_with_the_same_dropout_key(x):
    model = Tiny(dropout=0.5)
    network, params, statistics = Network.split(model)
    key = jax.random.key(5)
    logits, _ = network.apply_training(params, statistics, x, key)
    model.train()
    kinds = network.random_tree[2]
    state = nnx.state(model, nnx.RngState)
    leaves = [
        jax.random.fold_in(key, i) if is_key else jnp.zeros((), jnp.uint32)
        for i, is_key in enumerate(kinds)
    ]
    nnx.update(model, jax.tree.unflatten(jax.tree.structure(state), leaves))
    np.testing.assert_allclose(logits, model(x), rtol=1e-6, atol=1e-6)


def test_dropout_drops_its_share_and_depends_on_the_key_alone(x):
    class Ones(nnx.Module):
        def __init__(self):
            self.dropout = nnx.Dropout(0.25, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.dropout(jnp.ones((16, 2500)))

    network, params, statistics = Network.split(Ones())
    runs = [
        network.apply_training(params, statistics, x, jax.random.key(seed))[0] for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[0] != runs[2]).any()
    assert set(np.unique(runs[0])) == {0.0, np.float32(4 / 3)}
    assert abs(float((runs[0] == 0).mean()) - 0.25) < 0.01
    np.testing.assert_array_equal(network.apply(params, statistics, x), 1.0)


def test_works_under_jit_and_grad(x):
    network, params, statistics = Network.split(Tiny())

    def loss(params):
        return network.apply_training(params, statistics, x, jax.random.key(0))[0].sum()

    gradient = jax.jit(jax.grad(loss))(params)
    np.testing.assert_allclose(gradient["head/bias"], np.full(10, 16.0), rtol=1e-6)


def test_state_without_batchnorm_or_dropout():
    _, params, statistics = Network.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    assert set(params) == {"kernel", "bias"} and statistics == {}


def test_a_module_called_value_does_not_take_the_place_of_its_parent():
    class Holder(nnx.Module):
        def __init__(self):
            self.value = nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
            self.kernel = nnx.Param(jnp.ones((2, 2)))

        def __call__(self, x):
            return self.value(x) @ self.kernel

    model = Holder()
    network, params, statistics = Network.split(model)
    assert len(params) == 2
    merged = network.merge(params, statistics)
    np.testing.assert_array_equal(merged.value.kernel[...], model.value.kernel[...])
