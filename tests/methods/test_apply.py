"""Every method's convolution against the standard one with the equivalent kernel, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

import falcon_jax as fj
from tests.methods.reference import built, float64, standard_conv
from tests.nn.weights import draw

VARIANTS = [
    functools.partial(fj.Falcon, impl="auto"),
    functools.partial(fj.Falcon, impl="separable"),
    functools.partial(fj.Falcon, impl="wide"),
    functools.partial(fj.Falcon, impl="grouped"),
    functools.partial(fj.Falcon, impl="gep"),
    fj.DepthwiseSeparable,
]
SIDES = {1: (13,), 2: (7, 9), 3: (5, 4, 6)}
NAMED = ["SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT"]


def geometries(axes):
    explicit = st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * axes)
    return st.fixed_dictionaries(
        {
            "kernel_size": st.tuples(*[st.integers(1, 3)] * (axes - 1), st.integers(2, 3)),
            "strides": st.tuples(*[st.integers(1, 3)] * axes),
            "padding": st.sampled_from(NAMED + ["CAUSAL"] * (axes == 1)) | explicit,
            "kernel_dilation": st.tuples(*[st.integers(1, 2)] * axes),
            "input_dilation": st.tuples(*[st.integers(1, 2)] * axes),
            "feature_group_count": st.sampled_from([1, 2]),
        }
    )


def spec_of(geometry):
    spec = fj.ConvSpec(in_features=4, out_features=6, use_bias=False, **geometry)
    assume(min(spec.output_shape(SIDES[len(spec.kernel_size)])) > 0)
    return spec


@functools.partial(jax.jit, static_argnames=("method", "spec"))
def apply(params, x, *, method, spec):
    return method.apply(params, x, spec)


def random_params(method, spec, seed=0):
    """Normal parameters of the shapes that the design fixes."""
    k, n = method.rank, spec.out_features
    falcon = isinstance(method, fj.Falcon)
    depthwise = (*spec.kernel_size, k, n) if falcon else (*spec.kernel_size, spec.in_features, k)
    return {
        "pointwise": draw(spec.group_in_features, k, n, seed=seed),
        "depthwise": draw(*depthwise, seed=seed + 1),
    }


def check_equal(method, spec, batch=(2,)):
    x = draw(*batch, *SIDES[len(spec.kernel_size)], 4)
    params = random_params(method, spec, seed=1)
    kernel = built(params, method, spec.feature_group_count)
    expected = standard_conv(x, kernel, spec)
    y = apply(params, x, method=method, spec=spec)
    assert y.shape[len(batch) : -1] == spec.output_shape(x.shape[len(batch) : -1])
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5 * max(np.abs(expected).max(), 1))


@settings(max_examples=12, deadline=None)
@given(geometry=geometries(2), variant=st.sampled_from(VARIANTS), rank=st.integers(1, 2))
def test_two_axes(geometry, variant, rank):
    check_equal(variant(rank=rank), spec_of(geometry))


@settings(max_examples=8, deadline=None)
@given(geometry=geometries(1), variant=st.sampled_from(VARIANTS), rank=st.integers(1, 2))
def test_one_axis(geometry, variant, rank):
    check_equal(variant(rank=rank), spec_of(geometry))


@settings(max_examples=6, deadline=None)
@given(geometry=geometries(3), variant=st.sampled_from(VARIANTS), rank=st.integers(1, 2))
def test_three_axes(geometry, variant, rank):
    check_equal(variant(rank=rank), spec_of(geometry))


HARD = {"kernel_size": (3, 2), "in_features": 4, "out_features": 6, "use_bias": False}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "geometry",
    [
        {"padding": "SAME", "strides": 2},
        {"padding": "CIRCULAR", "strides": (1, 2), "kernel_dilation": 2},
        {"padding": ((2, 0), (1, 3)), "input_dilation": (2, 1), "feature_group_count": 2},
    ],
)
def test_every_variant_on_a_few_geometries(variant, geometry):
    check_equal(variant(rank=2), fj.ConvSpec(**HARD, **geometry))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", [(), (2, 1, 3)])
def test_any_number_of_batch_axes(variant, batch):
    check_equal(variant(rank=1), fj.ConvSpec(**HARD), batch)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_kernel_is_that_of_the_theorems(variant):
    method = variant(rank=2)
    spec = fj.ConvSpec(**HARD, feature_group_count=2)
    params = random_params(method, spec)
    kernel = method.kernel(params, spec)
    assert kernel.shape == spec.kernel_shape
    np.testing.assert_allclose(kernel, built(params, method, 2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[3]])
def test_vmap_over_a_stack_of_parameters(variant):
    method, spec = variant(rank=2), fj.ConvSpec(**HARD)
    x = draw(2, 7, 9, 4)
    stack = jax.tree.map(
        lambda *values: jnp.stack(values), *(random_params(method, spec, seed) for seed in (0, 7))
    )
    y = jax.jit(jax.vmap(lambda params: method.apply(params, x, spec)))(stack)
    for index in range(2):
        params = {name: value[index] for name, value in stack.items()}
        expected = standard_conv(x, built(params, method), spec)
        np.testing.assert_allclose(y[index], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[3]])
def test_gradients(variant):
    method = variant(rank=2)
    spec = fj.ConvSpec(**HARD, strides=(2, 1), padding=1, feature_group_count=2)
    params = random_params(method, spec)
    x = draw(1, 3, 4, 4)
    run = jax.jit(lambda params, x: method.apply(params, x, spec))
    check_grads(run, (params, x), order=1, modes=("rev",), rtol=1e-2, atol=1e-2, eps=1e-2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_stays_bfloat16(variant):
    method, spec = variant(rank=2), fj.ConvSpec(**HARD)
    params = {k: v.astype(jnp.bfloat16) for k, v in random_params(method, spec).items()}
    x = draw(2, 7, 9, 4, dtype=jnp.bfloat16)
    y = apply(params, x, method=method, spec=spec)
    assert y.dtype == jnp.bfloat16
    expected = standard_conv(x, built(params, method), spec)
    assert np.linalg.norm(float64(y) - expected) < 2e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(9, 4), (2, 7, 9, 5)])
def test_inputs_that_do_not_fit_are_refused(variant, shape):
    method, spec = variant(rank=1), fj.ConvSpec(**HARD)
    with pytest.raises(ValueError, match=r"2 spatial axes, 4 channels\)"):
        method.apply(random_params(method, spec), jnp.ones(shape), spec)


@pytest.mark.parametrize(
    ("variant", "rank", "groups"),
    [(VARIANTS[0], 1, 1), (VARIANTS[0], 3, 2), (VARIANTS[3], 1, 1), (VARIANTS[3], 3, 2)],
)
def test_initialisation_keeps_the_variance_after_relu(variant, rank, groups):
    # He: every equivalent kernel has variance 2 / fan_in, so ReLU keeps the mean square.
    method = variant(rank=rank)
    spec = fj.ConvSpec(
        kernel_size=(3, 3), in_features=64, out_features=128, feature_group_count=groups
    )
    params = method.init(jax.random.key(rank), spec)
    assert {value.dtype for value in params.values()} == {jnp.dtype(jnp.float32)}
    fan_in = 9 * 64 // groups
    kernel = built(params, method, groups)
    assert kernel.var() * fan_in == pytest.approx(2, rel=0.15)
    assert abs(kernel.mean()) < 0.1 * kernel.std()
