"""What a plain convolution survives, one under a method does: every method, NNX and Linen."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import export
from jax.experimental.jet import jet

import falcon_jax as fj

METHODS = [
    fj.Falcon(rank=2),
    fj.Falcon(rank=1, impl="separable"),
    fj.Falcon(rank=2, impl="wide"),
    fj.Falcon(rank=2, impl="grouped"),
    fj.Falcon(rank=2, impl="gep"),
    fj.DepthwiseSeparable(rank=2),
    fj.Tucker(rank=(3, 4)),
    fj.CP(rank=3),
    fj.TensorTrain(rank=3),
    fj.SpatialDecomposition(rank=3),
    fj.ChannelDecomposition(rank=3, inner=fj.Falcon(rank=1)),
    fj.Decoupled(terms=2, order="dw-pw"),
    fj.FilterSummary(ratio=2.0),
    fj.DifferentiableFilterSummary(ratio=2.0),
]
QUICK = (fj.Falcon, fj.DepthwiseSeparable, fj.Tucker, fj.FilterSummary)
EVERY = [
    m
    if isinstance(m, QUICK) and getattr(m, "impl", "auto") == "auto"
    else pytest.param(m, marks=pytest.mark.slow)
    for m in METHODS
]
IN_BOTH = [
    (framework, method)
    if isinstance(method, QUICK[: 4 if framework == "nnx" else 1])
    and getattr(method, "impl", "auto") == "auto"
    else pytest.param(framework, method, marks=pytest.mark.slow)
    for framework in ("nnx", "linen")
    for method in METHODS
]
# Those that need no transpose of a lax convolution, which has none for symbolic sizes.
OF_OUR_OWN = [m for m in METHODS if getattr(m, "impl", "") in ("separable", "wide")]
OF_OUR_OWN += [fj.CP(rank=3), fj.DepthwiseSeparable(rank=2)]
OTHERS = ["b, 9, 8", "b, 2*h, w", "3, h, h"]
GEOMETRIES = {
    "plain": {},
    "strides": {"strides": 2},
    "valid": {"padding": "VALID", "strides": (2, 1)},
    "pairs": {"padding": ((1, 0), (2, 1)), "strides": (1, 2)},
    "dilated": {"padding": "SAME", "kernel_dilation": 2},
}


class Standard(nn.Module):
    geometry: dict
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        return nn.Conv(8, (3, 3), dtype=self.dtype, **self.geometry)(x)


@functools.cache
def compressed(framework, method, dtype=None, **geometry) -> tuple[Any, Callable[..., Any]]:
    """Parameters and a function of them and x, of a convolution under a method."""
    if framework == "nnx":
        conv = nnx.Conv(6, 8, (3, 3), dtype=dtype, rngs=nnx.Rngs(0), **geometry)
        small = fj.compress(conv, fj.make_plan(conv, [fj.Rule(method=method)]))
        graphdef, state = nnx.split(small)
        return nnx.to_pure_dict(state), lambda s, x: nnx.merge(
            graphdef, nnx.State(dict(s)), copy=True
        )(x)
    module, x = Standard(geometry, dtype), jnp.ones((1, 9, 8, 6))
    variables = module.init(jax.random.key(0), x)
    plan = fj.make_plan(module.bind(variables), [fj.Rule(method=method)], x)
    small, variables = fj.compress(module.bind(variables), plan).unbind()
    apply: Any = small.apply
    return variables, apply


def drawn(*shape, dtype: Any = np.float32):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


def assert_near(found, expected, tolerance=1e-4):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = max(float(np.abs(b).max()), 1)
        np.testing.assert_allclose(a, b, atol=tolerance * scale, rtol=tolerance)


def check_jet(function, *primals, order=3):
    """Compare Taylor mode with forward mode, applied again and again."""
    rng = np.random.default_rng(1)
    known = [jnp.asarray(rng.normal(size=(3, *p.shape)), p.dtype) for p in primals]
    series = [tuple(terms[:order]) for terms in known]

    def along(t):
        pairs = zip(primals, known, strict=True)
        return function(*(p + t * (a + t * (b / 2 + t * c / 6)) for p, (a, b, c) in pairs))

    @jax.jit
    def expected(t):
        orders = [along]
        for _ in range(order):
            orders.append(lambda t, f=orders[-1]: jax.jvp(f, (t,), (jnp.ones_like(t),))[1])
        return [f(t) for f in orders]

    y, orders = jax.jit(lambda *primals: jet(function, primals, series))(*primals)
    assert_near([y, *orders], expected(jnp.zeros((), primals[0].dtype)), tolerance=1e-10)


def concrete(sizes):
    return [{"b": 2, "h": 5, "w": 7, "2*h": 10}.get(n) or int(n) for n in sizes.split(", ")]


def check_export(method, sizes, *geometries):
    for geometry in (GEOMETRIES[name] for name in geometries):
        params, function = compressed("nnx", method, **geometry)
        like = jax.ShapeDtypeStruct(export.symbolic_shape(f"{sizes}, 6"), jnp.float32)
        exported = export.export(jax.jit(lambda x, p=params, f=function: f(p, x)))(like)
        x = drawn(*concrete(sizes), 6)
        assert_near(exported.call(x), function(params, x))


def test_every_registered_method_is_here():
    assert {method.name for method in METHODS} == set(fj.method_names())


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_export_with_symbolic_sizes(method):
    check_export(method, "b, h, w", "strides")


@pytest.mark.parametrize("method", EVERY, ids=str)
def test_export_with_symbolic_sizes_of_every_geometry(method):
    check_export(method, "b, h, w", *sorted(set(GEOMETRIES) - {"strides"}))


@pytest.mark.parametrize(
    "method",
    [METHODS[0], *(pytest.param(method, marks=pytest.mark.slow) for method in METHODS[1:])],
    ids=str,
)
@pytest.mark.parametrize("sizes", OTHERS)
def test_export_with_other_symbolic_sizes(method, sizes):
    check_export(method, sizes, "strides")


@pytest.mark.parametrize(
    ("method", "geometry"),
    [
        (method, geometry)
        if geometry == "pairs" or (geometry, method) == ("dilated", OF_OUR_OWN[0])
        else pytest.param(method, geometry, marks=pytest.mark.slow)
        for method in OF_OUR_OWN
        for geometry in GEOMETRIES
    ],
    ids=str,
)
def test_export_of_gradients_with_symbolic_sizes(method, geometry):
    params, function = compressed("nnx", method, **GEOMETRIES[geometry])
    gradient = jax.jit(jax.grad(lambda p, x: (function(p, x) ** 2).sum(), argnums=(0, 1)))
    like = jax.ShapeDtypeStruct(export.symbolic_shape("b, h, w, 6"), jnp.float32)
    exported = export.export(gradient)(params, like)
    x = drawn(2, 5, 7, 6)
    assert_near(exported.call(params, x), gradient(params, x), tolerance=1e-3)


@pytest.mark.parametrize("method", METHODS[:1] + METHODS[4:7], ids=str)
def test_export_of_what_is_deployed_and_of_linen(method):
    like = jax.ShapeDtypeStruct(export.symbolic_shape("b, h, w, 6"), jnp.float32)
    x = drawn(3, 9, 8, 6)
    conv = nnx.Conv(6, 8, (3, 3), rngs=nnx.Rngs(0))
    small: Any = fj.compress(conv, fj.make_plan(conv, [fj.Rule(method=method)]))
    deployed: Any = fj.deploy(small, x)
    assert_near(export.export(deployed)(like).call(x), small(x))
    variables, apply = compressed("linen", method)
    exported = export.export(jax.jit(lambda x: apply(variables, x)))(like)
    assert_near(exported.call(x), apply(variables, x))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_exported_functions_take_the_smallest_maps(size):
    params, function = compressed("nnx", fj.Falcon(rank=1, impl="separable"), strides=2)
    like = jax.ShapeDtypeStruct(export.symbolic_shape("b, h, w, 6"), jnp.float32)
    exported = export.export(jax.jit(lambda x: function(params, x)))(like)
    x = drawn(1, size, size, 6)
    assert_near(exported.call(x), function(params, x))


@pytest.mark.parametrize("sizes", ["b, h, w", "a, b, h, w"])
@pytest.mark.parametrize("first", ["pointwise", "depthwise"])
def test_export_of_plain_functions_with_symbolic_sizes(first, sizes):
    depthwise, pointwise = drawn(3, 2, 2, 6), drawn(3, 2, 6)  # two groups, two terms
    if first == "depthwise":
        depthwise = drawn(3, 2, 6, 2)
    x = drawn(*[{"a": 2, "b": 3, "h": 5, "w": 4}[n] for n in sizes.split(", ")], 6)
    like = jax.ShapeDtypeStruct(export.symbolic_shape(f"{sizes}, 6"), jnp.float32)
    functions = [
        lambda x: fj.separable_conv(
            x, depthwise, pointwise, first=first, strides=2, feature_group_count=2
        ),
        lambda x: fj.depthwise_conv(x, drawn(3, 2, 6), strides=(1, 2), padding=((2, -1), (0, 1))),
        lambda x: fj.depthwise_conv(x, drawn(3, 2, 6), input_dilation=2, impl="grouped"),
        lambda x: fj.depthwise_conv(x, drawn(3, 3, 6), input_dilation=3, kernel_dilation=2),
    ]
    for function in functions:
        exported = export.export(jax.jit(function))(like)
        assert_near(exported.call(x), function(x))


def test_export_of_pooling_with_symbolic_sizes():
    for sizes in ("b, h, w", "b, 2*h, 2*w"):
        like = jax.ShapeDtypeStruct(export.symbolic_shape(f"{sizes}, 3"), jnp.float32)
        exported = export.export(jax.jit(fj.ops.max_pool_2x2))(like)
        x = drawn(2, 8, 6, 3)
        np.testing.assert_array_equal(exported.call(x), fj.ops.max_pool_2x2(x))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["b, h, w", "b, 32*h, 32*w"])
@pytest.mark.parametrize(
    "name", ["vgg16_cifar", pytest.param("resnet18_cifar", marks=pytest.mark.slow)]
)
def test_export_of_compressed_networks(name, sizes):
    model = fj.models.MODELS[name](rngs=nnx.Rngs(0))
    x = drawn(2, 32, 32, 3)
    small: Any = fj.compress(model, fj.make_plan(model, sample=x))
    small.eval()
    like = jax.ShapeDtypeStruct(export.symbolic_shape(f"{sizes}, 3"), jnp.float32)
    deployed: Any = fj.deploy(small, x)
    assert_near(export.export(deployed)(like).call(x), deployed(x))


@pytest.mark.parametrize(("framework", "method"), IN_BOTH, ids=str)
def test_no_transfer_outside_of_jit(method, framework):
    """Nor in what eager transformations call: constants belong to the layer's program."""
    x = drawn(2, 9, 8, 6)
    params, function = compressed(framework, method, padding="CIRCULAR", strides=2)
    expected, pull = jax.vjp(function, params, x)
    gradients = pull(expected)
    jax.clear_caches()
    with jax.transfer_guard("disallow"):
        y, pull = jax.vjp(function, params, x)
        found = (function(params, x), y, pull(y))
    assert_near(found, (expected, expected, gradients))


@pytest.mark.parametrize("framework", ["nnx", "linen"])
def test_no_transfer_by_vmap_and_forward_mode_outside_of_jit(framework):
    """By vmap and in forward mode, on small maps too."""
    for method, size in [(fj.Falcon(rank=2, impl="wide"), 2), (fj.DepthwiseSeparable(rank=2), 9)]:
        params, function = compressed(framework, method)
        x = drawn(2, 1, size, size, 6)
        first, second = x

        def call(x, f=function, p=params):
            return f(p, x)

        expected = jax.vmap(call)(x), jax.jvp(call, (first,), (second,))
        jax.clear_caches()
        with jax.transfer_guard("disallow"):
            found = jax.vmap(call)(x), jax.jvp(call, (first,), (second,))
        assert_near(found, expected)


@pytest.mark.parametrize(
    "method",
    [
        method
        if method in (METHODS[0], METHODS[-2])
        else pytest.param(method, marks=pytest.mark.slow)
        for method in METHODS
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("padding", "sizes", "constraints"),
    [("REFLECT", "b, h, w", ["h>=3", "w>=3"]), ("CIRCULAR", "b, 9, 8", [])],
)
def test_export_of_paddings_that_copy(method, padding, sizes, constraints):
    """Where a plain convolution can be exported: `jnp.pad` must know that the map is larger."""
    params, function = compressed("nnx", method, padding=padding, strides=2)
    shape = export.symbolic_shape(f"{sizes}, 6", constraints=constraints)
    exported = export.export(jax.jit(lambda x: function(params, x)))(
        jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    x = drawn(*concrete(sizes), 6)
    assert_near(exported.call(x), function(params, x))


@pytest.mark.parametrize(("framework", "method"), IN_BOTH, ids=str)
def test_double_precision_and_remat(method, framework):
    params, function = compressed(framework, method)
    with jax.enable_x64(True):
        params64 = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
        x = drawn(2, 5, 4, 6, dtype=np.float64)
        y = function(params64, x)
        assert y.dtype == jnp.float64
        assert_near(jax.checkpoint(function)(params64, x), y, tolerance=1e-12)


@pytest.mark.parametrize("method", EVERY, ids=str)
def test_linear_transpose(method):
    """Of what is linear itself, not of its derivative: `jax.vjp` takes that."""
    params, function = compressed("nnx", method, strides=2, use_bias=False)
    x = drawn(2, 5, 4, 6)
    y, pull = jax.vjp(lambda x: function(params, x), x)
    assert_near(jax.linear_transpose(lambda x: function(params, x), x)(y), pull(y))
    batches = jnp.asarray(np.stack([x, 2 * np.asarray(x)]))
    mapped = jax.linear_transpose(jax.vmap(lambda x: function(params, x)), batches)
    assert_near(mapped(jnp.stack([y, y]))[0][1], pull(y)[0])


@pytest.mark.parametrize("method", EVERY, ids=str)
def test_taylor_mode(method):
    """By `jax.experimental.jet`, in the inputs of a layer between two functions."""
    params, function = compressed("nnx", method, strides=2)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
        check_jet(
            lambda x: jnp.tanh(function(params, jnp.sin(x))), drawn(1, 5, 4, 6, dtype=np.float64)
        )


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "method", [METHODS[1], pytest.param(METHODS[5], marks=pytest.mark.slow)], ids=str
)
def test_taylor_mode_in_parameters_and_of_gradients(method, size):
    """In maps of a few pixels and in larger ones, whose kernels' gradients are loops."""
    params, function = compressed("nnx", method)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
        leaves, form = jax.tree.flatten(params)
        x = drawn(1, size, size, 6, dtype=np.float64)

        def gradient(x, *leaves):
            def loss(x, leaves):
                return (function(jax.tree.unflatten(form, leaves), x) ** 3).sum()

            found = jax.grad(loss, (0, 1))(x, leaves)
            return jnp.concatenate([a.reshape(-1) for a in jax.tree.leaves(found)])

        check_jet(lambda *leaves: function(jax.tree.unflatten(form, leaves), x), *leaves)
        check_jet(gradient, x, *leaves, order=2)


@pytest.mark.parametrize(("framework", "method"), IN_BOTH, ids=str)
def test_strict_promotion_and_no_transfer(method, framework):
    x = drawn(2, 9, 8, 6)
    for dtype in (None, jnp.bfloat16):
        params, function = compressed(framework, method, dtype)
        loss = jax.jit(jax.value_and_grad(lambda p, x, f=function: (f(p, x) ** 2).sum()))
        expected = loss(params, x)
        jax.clear_caches()  # all is traced anew; in later tests, too, so this is the last
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            with jax.transfer_guard("disallow"):
                found = loss(params, x)
            assert_near(found, expected)
            assert function(params, x).dtype == (dtype or jnp.float32)
