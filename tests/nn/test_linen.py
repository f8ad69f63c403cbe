import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import falcon_jax as fj
from tests.nn.weights import WEIGHTS, draw, normal

PAIRS = [
    (fj.linen.FalconConv, fj.FalconConv),
    (fj.linen.DepthwiseSeparableConv, fj.DepthwiseSeparableConv),
]
X = np.random.default_rng(0).normal(size=(2, 7, 8, 4)).astype(np.float32)


@pytest.mark.parametrize(("layer", "nnx_layer"), PAIRS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strides": 2, "padding": "VALID", "use_bias": False, "rank": 2},
        {"padding": ((1, 0), (2, 1)), "input_dilation": (2, 1), "feature_group_count": 2},
        {"kernel_dilation": 2, "padding": "CIRCULAR", "dtype": jnp.bfloat16},
    ],
)
def test_the_same_parameters_give_the_same_result_as_in_nnx(layer, nnx_layer, options):
    module = layer(6, (3, 3), **options)
    shapes = jax.eval_shape(module.init, jax.random.key(0), X)["params"]
    params = {
        name: draw(*value.shape, seed=seed) for seed, (name, value) in enumerate(shapes.items())
    }
    bias = params.get("bias")
    kernels = {name: value for name, value in params.items() if name != "bias"}
    other = nnx_layer(4, 6, (3, 3), params=kernels, bias=bias, rngs=nnx.Rngs(0), **options)
    y = jax.jit(module.apply)({"params": params}, X)
    expected = jax.jit(lambda layer, x: layer(x))(other, X)
    assert y.dtype == expected.dtype
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize(
    ("layer", "shape"), [(PAIRS[0][0], (3, 2, 5, 10)), (PAIRS[1][0], (3, 2, 4, 5))]
)
def test_initial_parameters(layer, shape):
    module = layer(10, (3, 2), rank=5, param_dtype=jnp.bfloat16)
    params = jax.eval_shape(module.init, jax.random.key(0), X)["params"]
    assert params["depthwise"].shape == shape
    assert params["pointwise"].shape == (4, 5, 10)
    assert params["bias"].shape == (10,)
    assert {value.dtype for value in params.values()} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(("layer", "nnx_layer"), PAIRS)
def test_a_trained_conv_moves_over(layer, nnx_layer):
    conv = nnx.Conv(4, 6, (3, 3), strides=2, rngs=nnx.Rngs(0), **WEIGHTS)
    fitted = nnx_layer.from_conv(conv, rank=9)
    params = {**fitted.params, "bias": fitted.bias[...]}
    module = layer(6, (3, 3), rank=9, strides=2)
    y = jax.jit(module.apply)({"params": params}, X)
    np.testing.assert_allclose(y, conv(jnp.asarray(X)), atol=1e-5)


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = fj.linen.FalconConv(6, (3, 3), rank=2, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = fj.linen.DepthwiseSeparableConv(6, (3, 3), strides=2, bias_init=normal)(x)
        return nn.Dense(3, kernel_init=normal)(x.mean(axis=(1, 2)))


def test_training_steps_lower_the_loss():
    network = Network()
    init = jax.jit(network.init, static_argnames="train")
    variables = init(jax.random.key(0), X, train=False)
    params, statistics = variables["params"], variables["batch_stats"]
    optimizer = optax.sgd(0.1)
    state = optimizer.init(params)

    @jax.jit
    def step(params, statistics, state):
        def loss(params):
            logits, changed = network.apply(
                {"params": params, "batch_stats": statistics},
                X,
                train=True,
                mutable=["batch_stats"],
            )
            target = jnp.arange(2)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
            return losses.mean(), changed["batch_stats"]

        (value, changed), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state_ = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), changed, state_, value

    losses = []
    for _ in range(5):
        params, statistics, state, value = step(params, statistics, state)
        losses.append(float(value))
    assert losses[-1] < losses[0]


def test_what_the_method_cannot_do_is_refused():
    with pytest.raises(ValueError, match="rank 10 is more than the 9 taps"):
        fj.linen.FalconConv(6, (3, 3), rank=10).init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="does not divide in_features=4"):
        fj.linen.FalconConv(6, (3, 3), feature_group_count=3).init(jax.random.key(0), X)
