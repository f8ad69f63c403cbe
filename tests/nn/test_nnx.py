import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import falcon_jax as fj
from tests.nn.weights import WEIGHTS, draw

LAYERS = [fj.FalconConv, fj.DepthwiseSeparableConv]


def make(layer, *args, **options):
    return layer(*args, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("groups", [1, 2])
def test_shapes_of_the_parameters(groups):
    def shapes(layer):
        made = nnx.eval_shape(
            lambda: make(layer, 6, 10, (3, 2), rank=4, feature_group_count=groups)
        )
        return {
            path[-1]: leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(made, nnx.Param))
        }

    assert shapes(fj.FalconConv) == {
        "pointwise": (6 // groups, 4, 10),
        "depthwise": (3, 2, 4, 10),
        "bias": (10,),
    }
    assert shapes(fj.DepthwiseSeparableConv) == {
        "pointwise": (6 // groups, 4, 10),
        "depthwise": (3, 2, 6, 4),
        "bias": (10,),
    }


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strides": 2, "padding": "VALID"},
        {"strides": (1, 2), "padding": 1, "use_bias": False},
        {"kernel_dilation": 2, "feature_group_count": 2},
        {"padding": ((1, 0), (2, 1)), "input_dilation": (2, 1)},
        {"strides": None, "kernel_dilation": None, "input_dilation": None, "padding": "CIRCULAR"},
    ],
)
def test_arguments_are_those_of_nnx_conv(layer, options):
    args = (4, 6, (3, 3))

    def output(cls):
        return cls(*args, rngs=nnx.Rngs(0), **options)(jnp.ones((2, 9, 8, 4)))

    assert nnx.eval_shape(lambda: output(layer)) == nnx.eval_shape(lambda: output(nnx.Conv))


def test_strides_by_position_and_one_axis_by_a_number():
    a = nnx.eval_shape(lambda: make(fj.FalconConv, 4, 6, (3, 3), 2))
    assert a.spec.strides == (2, 2)
    b = nnx.eval_shape(lambda: make(fj.FalconConv, 4, 6, 3, padding="CAUSAL")(jnp.ones((2, 5, 4))))
    assert b.shape == (2, 5, 6)


@jax.jit
def run(layer, x):
    return layer(x)


GEOMETRIES = [
    ((3, 3), {}),
    ((3, 3), {"strides": 2, "padding": "VALID", "use_bias": False}),
    ((3, 2), {"strides": (1, 2), "padding": ((1, 0), (2, 1)), "kernel_dilation": (1, 2)}),
    ((3, 3), {"padding": 1, "input_dilation": 2, "feature_group_count": 2}),
    ((3, 3), {"padding": "CIRCULAR", "kernel_dilation": 2}),
    ((2, 3), {"padding": "REFLECT", "feature_group_count": 2}),
    ((3, 3), {"padding": "SAME_LOWER", "strides": 2}),
    (3, {"padding": "CAUSAL", "kernel_dilation": 2}),
    ((2, 2, 2), {"strides": 2}),
]


@pytest.mark.parametrize(
    ("layer", "kernel_size", "options"),
    [
        *((fj.FalconConv, *geometry) for geometry in GEOMETRIES),
        *((fj.DepthwiseSeparableConv, *geometry) for geometry in GEOMETRIES[1:8:2]),
    ],
)
def test_from_conv_at_full_rank_is_the_convolution(layer, kernel_size, options):
    conv = nnx.Conv(4, 6, kernel_size, **options, **WEIGHTS, rngs=nnx.Rngs(0))
    taps = int(np.prod(kernel_size))
    if layer is fj.FalconConv:
        # Inputs of one group suffice, too: the matrices are D^2 x M / g.
        taps = min(taps, conv.kernel.shape[-2])
    replacement = layer.from_conv(conv, rank=taps)
    assert type(replacement) is layer
    assert (replacement.bias is None) == (conv.bias is None)
    sides = {1: (9,), 2: (7, 8), 3: (4, 5, 4)}[conv.kernel.ndim - 2]
    x = draw(2, *sides, 4, seed=1)
    np.testing.assert_allclose(run(replacement, x), run(conv, x), atol=1e-5)


@pytest.mark.parametrize("layer", LAYERS)
def test_types_and_precision_are_carried_over_and_the_conv_is_not_changed(layer):
    conv = nnx.Conv(
        4,
        6,
        (3, 3),
        dtype=jnp.bfloat16,
        precision=jax.lax.Precision.HIGHEST,
        **WEIGHTS,
        rngs=nnx.Rngs(0),
    )
    before = jax.tree.map(np.array, nnx.state(conv))
    replacement = layer.from_conv(conv, rank=2)
    assert replacement.dtype == jnp.bfloat16
    assert replacement.precision == jax.lax.Precision.HIGHEST
    np.testing.assert_array_equal(replacement.bias[...], conv.bias[...])
    assert {p.dtype for p in replacement.params.values()} == {jnp.dtype(jnp.float32)}
    x = draw(2, 7, 8, 4, seed=1)
    assert run(replacement, x).dtype == jnp.bfloat16 == run(conv, x).dtype
    replacement.bias[...] = jnp.zeros(6)
    after = jax.tree.map(np.array, nnx.state(conv))
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))


@pytest.mark.parametrize("layer", LAYERS)
def test_bfloat16_parameters_and_computation(layer):
    def output(dtype):
        made = make(layer, 4, 6, (3, 3), param_dtype=jnp.bfloat16)
        assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(made))} == {jnp.dtype("bfloat16")}
        return made(jnp.ones((1, 7, 8, 4), dtype))

    # As in nnx.Conv: float32 inputs win where no dtype is given.
    assert nnx.eval_shape(lambda: output(jnp.float32)).dtype == jnp.float32
    assert nnx.eval_shape(lambda: output(jnp.bfloat16)).dtype == jnp.bfloat16
    conv = nnx.Conv(4, 6, (3, 3), param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0), **WEIGHTS)
    params = layer.from_conv(conv).params
    assert {value.dtype for value in params.values()} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("impl", ["separable", "grouped", "gep"])
def test_impl_reaches_the_method(impl):
    conv = nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0), **WEIGHTS)
    assert fj.FalconConv.from_conv(conv, 2, impl=impl).method == fj.Falcon(rank=2, impl=impl)


def test_bias_and_its_initialisation():
    params = {"pointwise": draw(4, 1, 6), "depthwise": draw(3, 3, 1, 6)}
    without = make(fj.FalconConv, 4, 6, (3, 3), use_bias=False, params=params)
    assert without.bias is None
    init = nnx.initializers.ones_init()
    ones = make(fj.FalconConv, 4, 6, (3, 3), bias_init=init, params=params)
    np.testing.assert_array_equal(ones.bias[...], np.ones(6))


@pytest.mark.parametrize("layer", LAYERS)
def test_a_training_step_under_nnx_jit_lowers_the_loss(layer):
    model = layer.from_conv(nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0), **WEIGHTS), rank=2)
    optimizer = nnx.Optimizer(model, optax.sgd(0.05), wrt=nnx.Param)
    x = draw(4, 7, 8, 4, seed=1)
    target = draw(4, 7, 8, 6, seed=2)

    @nnx.jit
    def step(model, optimizer):
        loss, gradient = nnx.value_and_grad(lambda m: jnp.mean((m(x) - target) ** 2))(model)
        optimizer.update(model, gradient)
        return loss, gradient

    first, gradient = step(model, optimizer)
    assert all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(gradient))
    for _ in range(4):
        last, _ = step(model, optimizer)
    assert float(last) < float(first)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": jnp.ones((3, 3, 4, 6))}, "masked kernel"),
        ({"conv_general_dilated": lambda *a, **k: None}, "own convolution function"),
        ({"promote_dtype": lambda values, dtype=None: values}, "own type promotion"),
        ({"preferred_element_type": jnp.float32}, "preferred_element_type"),
    ],
)
def test_convolutions_that_act_otherwise_are_refused(layer, options, message):
    conv = nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0), **WEIGHTS, **options)
    with pytest.raises(ValueError, match=message):
        layer.from_conv(conv)


@pytest.mark.parametrize("layer", LAYERS)
def test_what_the_method_cannot_do_is_refused(layer):
    with pytest.raises(ValueError, match="1x1 kernel has nothing to separate"):
        layer.from_conv(nnx.Conv(4, 6, (1, 1), rngs=nnx.Rngs(0), **WEIGHTS))
    with pytest.raises(ValueError, match="rank 10 is more than the 9 taps"):
        make(layer, 4, 6, (3, 3), rank=10)
    with pytest.raises(ValueError, match="random parameters need rngs"):
        layer(4, 6, (3, 3))
