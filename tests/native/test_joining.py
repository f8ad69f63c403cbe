"""Deployed models: what the kernels are given, and that the answers stay."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import export

import falcon_jax as fj
from falcon_jax.frameworks.tracing import inner_jaxprs
from falcon_jax.native.joining import with_native_steps
from falcon_jax.native.kernels import Step
from tests.compression.networks import Scanned, randomised


def kernels(function, *arrays):
    """Return settings of all kernels in a traced function, and counts of all other operations."""
    found, others = [], collections.Counter()

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if "kernel" in eqn.params:
                found.append(eqn.params["kernel"])
            else:
                others[eqn.primitive.name] += 1
            for inner in inner_jaxprs(tuple(eqn.params.values())):
                walk(inner)

    walk(jax.make_jaxpr(function)(*arrays).jaxpr)
    return found, others


def compare(model, x, **tolerances):
    """Check that the native function gives what the model gives; return its kernels."""
    y = fj.deploy(model, x, native=True)(x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **{"rtol": 2e-4, "atol": 2e-4, **tolerances}),
        y,
        model(x),
    )
    return kernels(fj.deploy(model, x, native=True), x)


def images(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def compressed(model, x, method):
    small = fj.compress(model, fj.make_plan(model, [fj.Rule(method=method)], x))
    small.eval()
    return small


class Block(nnx.Module):
    """Everything that a convolution can be followed by."""

    def __init__(self, rngs):
        self.first = nnx.Conv(3, 20, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(20, rngs=rngs)
        self.second = nnx.Conv(20, 20, (3, 3), use_bias=False, rngs=rngs)
        self.shortcut = nnx.Conv(20, 20, (1, 1), rngs=rngs)
        self.last = nnx.Conv(20, 5, (3, 3), strides=2, rngs=rngs)
        self.head = nnx.Linear(5, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.first(x)))
        x = nnx.relu(self.second(x) + self.shortcut(x))
        x = nnx.max_pool(nnx.relu(self.last(x)), (2, 2), strides=(2, 2))
        return self.head(x.mean(axis=(1, 2)))


@pytest.fixture(scope="module")
def block():
    model = randomised(Block(nnx.Rngs(0)))
    model.eval()
    return model


def test_a_network_is_its_layers(block):
    steps, others = compare(block, images(2, 12, 11, 3))
    assert [s.kind for s in steps if isinstance(s, Step)] == ["standard"] * 5
    assert [s.relu for s in steps if isinstance(s, Step)] == [True, False, True, True, False]
    assert not others["max"] and not others["add"] and not others["conv_general_dilated"]


@pytest.mark.parametrize("rank", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_layer_of_falcon_is_one_kernel(block, rank):
    steps, others = compare(
        compressed(block, images(1, 12, 11, 3), fj.Falcon(rank=rank)), images(2, 12, 11, 3)
    )
    both = [s for s in steps if s.kind == "pointwise_depthwise"]
    assert [s.terms for s in both[-2:]] == [rank, rank] and all(s.relu for s in both)
    assert not others["conv_general_dilated"] and not others["reduce_window_max"]
    assert both[-1].pool


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(fj.DepthwiseSeparable(rank=2), marks=pytest.mark.slow),
        pytest.param(fj.Decoupled(terms=2), marks=pytest.mark.slow),
        fj.Tucker(rank=3),
        pytest.param(fj.SpatialDecomposition(rank=3), marks=pytest.mark.slow),
        pytest.param(fj.FilterSummary(ratio=4.0), marks=pytest.mark.slow),
    ],
    ids=lambda method: method.label(),
)
def test_every_method(block, method):
    steps, _ = compare(compressed(block, images(1, 12, 11, 3), method), images(2, 12, 11, 3))
    assert len(steps) >= 5


def test_many_terms_are_one_dense_kernel(block):
    small = compressed(block, images(1, 12, 11, 3), fj.Falcon(rank="full"))
    steps, _ = compare(small, images(2, 12, 11, 3))
    assert {s.terms for s in steps if isinstance(s, Step)} == {1}


class Merging(nnx.Module):
    """Two branches side by side, one of them interpolated, as in U-nets."""

    def __init__(self, rngs, size):
        self.down = nnx.Conv(6, 10, (3, 3), strides=2, rngs=rngs)
        self.mix = nnx.Conv(16, 7, (size, size), rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.down(x))
        y = jax.image.resize(y, (*x.shape[:3], y.shape[-1]), "bilinear")
        return nnx.relu(self.mix(jnp.concatenate([y, x], axis=-1)))


def test_a_pointwise_convolution_stands_before_the_interpolation():
    x = images(1, 8, 12, 6)
    steps, others = compare(Merging(nnx.Rngs(0), 1), x)
    widths = [s.in_features for s in steps if isinstance(s, Step)]
    assert sorted(widths) == [6, 6, 10] and not others["concatenate"]


def test_strides_stay_behind_the_interpolation():
    model = Merging(nnx.Rngs(0), 1)
    model.mix.strides = (2, 2)
    compare(model, images(1, 8, 12, 6))


@pytest.mark.parametrize("method", [fj.Falcon(), None], ids=["falcon", "standard"])
def test_other_convolutions_of_branches_side_by_side(method):
    x = images(1, 8, 12, 6)
    model = Merging(nnx.Rngs(0), 3)
    _, others = compare(model if method is None else compressed(model, x, method), x)
    assert not others["concatenate"]


def test_unequal_padding_between_the_steps_keeps_them_apart():
    class Biased(nnx.Module):
        def __init__(self, rngs):
            self.pointwise = nnx.Conv(4, 8, (1, 1), rngs=rngs, bias_init=nnx.initializers.ones)
            self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)

        def __call__(self, x):
            return self.depthwise(self.pointwise(x))

    steps, _ = compare(Biased(nnx.Rngs(0)), images(1, 6, 6, 4))
    assert [s.kind for s in steps] == ["standard", "depthwise"]


def test_an_answer_that_is_used_twice_is_not_taken_apart():
    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(4, 8, (3, 3), rngs=rngs)
            self.mix = nnx.Conv(16, 3, (1, 1), rngs=rngs)

        def __call__(self, x):
            y = self.conv(x)
            return nnx.relu(y) + y, y, self.mix(jnp.concatenate([y, y], -1))

    compare(Twice(nnx.Rngs(0)), images(2, 6, 6, 4))


def test_what_the_kernels_do_not_know_is_as_it_was():
    class Odd(nnx.Module):
        def __init__(self, rngs):
            self.volume = nnx.Conv(2, 3, (3, 3, 3), rngs=rngs)
            self.grouped = nnx.Conv(6, 4, (3, 3), feature_group_count=2, rngs=rngs)
            self.dilated = nnx.Conv(4, 4, (3, 3), input_dilation=2, padding=1, rngs=rngs)
            self.multiplied = nnx.Conv(4, 8, (3, 3), feature_group_count=4, rngs=rngs)
            self.transposed = nnx.ConvTranspose(8, 4, (2, 2), strides=(2, 2), rngs=rngs)
            self.line = nnx.Conv(4, 6, (5,), padding="CAUSAL", rngs=rngs)

        def __call__(self, x):
            x = self.volume(x)
            b, *sizes, _ = x.shape
            x = x.reshape(b, sizes[0], sizes[1], -1)[..., :6]
            x = self.transposed(self.multiplied(self.dilated(self.grouped(x))))
            x = nnx.avg_pool(x, (3, 3), strides=(2, 2)) - x.min()
            return self.line(x.reshape(b, -1, 4)).astype(jnp.bfloat16)

    compare(Odd(nnx.Rngs(0)), images(2, 5, 6, 4, 2), rtol=2e-2, atol=2e-2)


def test_convolutions_inside_a_loop():
    model = Scanned(nnx.Rngs(0))
    x = images(2, 8, 8, 3)
    compare(model, x)


@pytest.mark.parametrize("reverse", [False, True])
def test_products_inside_a_loop(reverse):
    cell = nnx.SimpleCell(64, 64, rngs=nnx.Rngs(0))
    model = nnx.RNN(cell, reverse=reverse, return_carry=True)
    steps, others = compare(model, images(64, 3, 64))
    assert len(steps) == 2 and others["scan"] == 1 and not others["dot_general"]


def test_small_products_inside_a_loop_stay():
    model = nnx.RNN(nnx.SimpleCell(8, 8, rngs=nnx.Rngs(0)))
    steps, others = compare(model, images(2, 3, 8))
    assert not steps and others["dot_general"]


@pytest.mark.usefixtures("tiles")
def test_bfloat16_is_asked_for(block):
    x = images(2, 12, 11, 3)
    small = compressed(block, x, fj.Falcon(rank=2))
    function = fj.deploy(small, x, precision="bfloat16")
    steps, _ = kernels(function, x)
    assert all(s.bfloat16 for s in steps if isinstance(s, Step))
    wanted = np.asarray(small(x))
    assert not np.array_equal(function(x), wanted)
    np.testing.assert_allclose(function(x), wanted, rtol=0.03, atol=0.03 * np.abs(wanted).max())


def test_linen_and_large_batches():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.relu(nn.BatchNorm(not train)(nn.Conv(9, (3, 3))(x)))
            return nn.Dense(4)(nn.max_pool(x, (3, 3), (2, 2), "SAME").reshape(x.shape[0], -1))

    x = images(11, 8, 8, 3)
    model = Model().bind(Model().init(jax.random.key(0), x[:1]))
    function = fj.deploy(model, fj.Inputs(x[:4], train=False), chunk=4, native=True)
    np.testing.assert_allclose(function(x), model(x), rtol=2e-4, atol=2e-4)
    steps, _ = kernels(function, x)
    assert [(s.kind, s.pool is not None) for s in steps[:2]] == [
        ("standard", True),
        ("standard", False),
    ]


def test_what_is_exported_is_plain_jax(block):
    x = images(2, 12, 11, 3)
    function = fj.deploy(block, x, native=True)
    exported = export.export(function)(jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert "custom_call" not in exported.mlir_module()
    np.testing.assert_allclose(exported.call(x), block(x), rtol=2e-4, atol=2e-4)
    sizes = export.symbolic_shape("b, 12, 11, 3")
    exported = export.export(function)(jax.ShapeDtypeStruct(sizes, x.dtype))
    np.testing.assert_allclose(exported.call(x), block(x), rtol=2e-4, atol=2e-4)


def test_gradients_of_a_deployed_model(block):
    x = images(1, 12, 11, 3)
    native, plain = (fj.deploy(block, x, native=choice) for choice in (True, False))
    gradients = [jax.grad(lambda x, f=f: (f(x) ** 2).sum())(x) for f in (native, plain)]
    np.testing.assert_allclose(*gradients, rtol=2e-3, atol=2e-4)


def test_gradients_of_convolutions_are_convolutions(block):
    """As they are wanted where the gradient itself is given to the kernels."""

    def gradient(x):
        return jax.grad(lambda x: (block(x) ** 2).sum())(x)

    x = images(2, 12, 11, 3)
    native = with_native_steps(gradient)
    np.testing.assert_allclose(native(x), gradient(x), rtol=2e-3, atol=2e-4)
    steps, others = kernels(native, x)
    standard = [s for s in steps if isinstance(s, Step)]
    # Forwards the five of the block, and backwards but for the one with strides; the head twice.
    assert len(standard) == 5 + 3 + 1 and others["conv_general_dilated"] == 1


def test_the_bias_of_a_small_map_is_a_bias():
    """Constants that only repeat a row are not added point by point."""
    model = randomised(nnx.Conv(8, 20, (3, 3), rngs=nnx.Rngs(0)))
    function = fj.deploy(model, images(1, 6, 6, 8), native=True)
    jaxpr = jax.make_jaxpr(function)(images(1, 6, 6, 8)).jaxpr
    sizes = []
    while not sizes:
        sizes = [[v.aval.size for v in e.invars] for e in jaxpr.eqns if "kernel" in e.params]
        jaxpr = next((j for e in jaxpr.eqns for j in inner_jaxprs(tuple(e.params.values()))), jaxpr)
    ((*_, bias, residual, _),) = sizes
    assert (bias, residual) == (32, 0)


def test_traces_of_other_forms_are_not_taken(block):
    """What JAX has in its cache of a layer, in fast or in canonical forms, stays apart."""
    x = images(2, 12, 11, 3)
    before = kernels(fj.deploy(block, x, native=False), x)
    steps, _ = kernels(fj.deploy(block, x, native=True), x)
    assert steps and not before[0]
    assert kernels(fj.deploy(block, x, native=False), x) == before


def test_weights_that_an_outer_trace_computes(block):
    layer = block.second

    @jax.jit
    def scaled(kernel):
        graph, params = nnx.split(layer)
        params = jax.tree.map(lambda _: kernel, params)
        return fj.deploy(nnx.merge(graph, params), native=True)(images(2, 6, 6, 20))

    wanted = layer(images(2, 6, 6, 20))
    np.testing.assert_allclose(scaled(2 * layer.kernel[...]), 2 * wanted, rtol=2e-4, atol=2e-4)


def test_autotune_times_what_deploy_uses():
    x = images(1, 8, 8, 16)
    model = nnx.Sequential(nnx.Conv(16, 16, (3, 3), rngs=nnx.Rngs(0)))
    plan = fj.make_plan(model, [fj.Rule(method=fj.Falcon())], x)
    (row,) = fj.autotune(model, x, plan, only_faster=False, repeats=1).rows
    assert row.measured_ms is not None and min(row.measured_ms.values()) > 0
