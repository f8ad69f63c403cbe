"""Methods, plans and profiles on arbitrary input: right answers, or sentences."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import falcon_jax as fj
from tests.test_public_functions import refused

pytestmark = pytest.mark.usefixtures("without_hook")

SPEC = fj.ConvSpec(kernel_size=(3, 2), in_features=4, out_features=6, strides=(2, 1))
EXACT = {
    "channel_decomposition": {"rank": "full"},
    "cp": {"rank": 24},
    "decoupled": {"terms": "full"},
    "depthwise_separable": {"rank": "full"},
    "differentiable_filter_summary": {"ratio": 1},
    "falcon": {"rank": "full"},
    "filter_summary": {"ratio": 1},
    "spatial_decomposition": {"rank": "full"},
    "tensor_train": {"rank": "full"},
    "tucker": {"rank": "full"},
}
METHODS = {name: fj.get_method(name, **options) for name, options in EXACT.items()}
EVERY = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def trained(scale=1.0):
    """A kernel of one shape, so that little is compiled."""
    values = np.random.default_rng(0).normal(size=SPEC.kernel_shape)
    return (values * scale).astype(np.float32)


def distance(kernel, approximation):
    k, a = np.asarray(kernel, np.float64), np.asarray(approximation).astype(np.float64)
    assert k.shape == a.shape and np.isfinite(a).all()
    return np.linalg.norm(k - a) / (np.linalg.norm(k) or 1)


def test_every_method_is_here():
    assert tuple(METHODS) == fj.method_names()


@EVERY
def test_a_full_fit_is_the_kernel_at_every_scale(method):
    bound = 5e-3 if method.name == "cp" else 5e-6  # alternating least squares stop before
    for scale in (1, 1e-30, 1e30):
        params = fj.fit(trained(scale), method, spec=SPEC)
        assert distance(trained(scale), method.kernel(params, SPEC)) < bound
    zero = method.kernel(fj.fit(trained(0), method, spec=SPEC), SPEC)
    assert zero.shape == SPEC.kernel_shape and not np.any(zero)


@EVERY
def test_half_precision_and_float64_kernels(method):
    for dtype, bound in ((np.float64, 5e-3), (np.float16, 5e-3), (jnp.bfloat16, 3e-2)):
        kernel = trained().astype(dtype)
        params = fj.fit(kernel, method, spec=SPEC)
        expected = np.dtype(np.float32 if dtype is np.float64 else dtype)
        assert all(value.dtype == expected for value in params.values())
        assert distance(kernel.astype(np.float64), method.kernel(params, SPEC)) < bound


@EVERY
def test_apply_is_convolution_with_the_kernel(method):
    params = method.init(jax.random.key(1), SPEC)
    x = np.random.default_rng(2).normal(size=(2, 5, 4, 4)).astype(np.float32)
    y = np.asarray(method.apply(params, x, SPEC))
    kernel = np.asarray(method.kernel(params, SPEC), np.float64)
    padded = np.pad(x, [(0, 0), (1, 1), (0, 1), (0, 0)])  # SAME
    taps = [(i, j) for i in range(3) for j in range(2)]
    expected = sum(padded[:, i : i + 5 : 2, j : j + 4] @ kernel[i, j] for i, j in taps)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    points = method.cost(SPEC, x.shape)
    assert points.params == sum(value.size for value in params.values()) + SPEC.out_features


@EVERY
def test_batch_axes_of_any_number_and_length(method):
    params = method.init(jax.random.key(1), SPEC)
    for batch in ((), (0,), (2, 1)):
        y = method.apply(params, jnp.ones((*batch, 5, 4, 4)), SPEC)
        assert y.shape == (*batch, 3, 4, 6) and np.isfinite(y).all()


@EVERY
@pytest.mark.parametrize("shape", [(), (4,), (5, 4), (5, 4, 3), (0,)])
def test_inputs_that_do_not_fit(method, shape):
    params = method.init(jax.random.key(1), SPEC)
    refused(lambda: method.apply(params, jnp.ones(shape), SPEC), "2 spatial axes, 4 channels")
    refused(lambda: method.cost(SPEC, shape), "2 spatial axes, 4 channels")
    refused(lambda: fj.standard_cost(SPEC, shape), "2 spatial axes, 4 channels")


@EVERY
def test_kernels_that_do_not_fit(method):
    for shape in ((3, 2, 4), (2, 3, 4, 6), (3, 2, 4, 5), (3, 2, 0, 6), (), (6,)):
        for fit in (lambda k: fj.fit(k, method, spec=SPEC), lambda k: method.fit(k, SPEC)):
            refused(lambda fit=fit, shape=shape: fit(jnp.ones(shape)), "the kernel has shape")
    for dtype in ("int32", "uint8", "complex64", "bool"):
        kernel = jnp.ones(SPEC.kernel_shape, dtype)
        refused(lambda kernel=kernel: fj.fit(kernel, method, spec=SPEC), "floating-point", dtype)
    for value in (np.nan, np.inf, -np.inf):
        kernel = trained()
        kernel[0, 0, 0, 0] = value
        refused(lambda kernel=kernel: fj.fit(kernel, method, spec=SPEC), "not finite")


def test_fit_of_kernels_without_channels_and_wrong_arguments():
    for shape in ((3, 3, 0, 4), (3, 3, 4, 0), (0, 3, 4, 4), (3, 3), ()):
        refused(lambda shape=shape: fj.fit(np.ones(shape), fj.Falcon()))
    refused(lambda: fj.fit(trained(), "falcon"), "'falcon'")  # type: ignore[arg-type]
    refused(lambda: fj.fit(trained(), fj.Falcon(), "best"), "'best'")  # type: ignore[arg-type]
    settings = fj.AdamWSettings(steps=1)
    refused(lambda: fj.fit(trained(), fj.Falcon(), settings=settings), "settings are for")


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"steps": 1.5}, {"learning_rate": math.nan}, {"drops": (0.5,)}]
)
def test_wrong_settings_of_the_iteration(wrong):
    refused(lambda: fj.AdamWSettings(**wrong), "AdamW fitting needs")


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(METHODS)),
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from(["SAME", "VALID", "REFLECT", 0, 2]),
    st.integers(0, 4),
)
def test_support_is_a_reason_or_a_method_that_works(name, size, groups, m, n, padding, side):
    spec = fj.ConvSpec(
        kernel_size=size,
        in_features=groups * m,
        out_features=groups * n,
        feature_group_count=groups,
        padding=padding,
    )
    method = METHODS[name]
    shape = (*(side,) * len(size), spec.in_features)
    reason = method.supports(spec)
    if reason is not None:
        assert len(reason.split()) > 4
        refused(lambda: method.init(jax.random.key(0), spec), reason)
        refused(lambda: fj.fit(np.ones(spec.kernel_shape), method, spec=spec), reason)
        return
    params = jax.eval_shape(lambda key: method.init(key, spec), jax.random.key(0))
    kernel = jax.ShapeDtypeStruct(spec.kernel_shape, jnp.float32)
    fitted = jax.eval_shape(lambda kernel: method.fit(kernel, spec), kernel)
    assert {k: v.shape for k, v in params.items()} == {k: v.shape for k, v in fitted.items()}
    assert jax.eval_shape(lambda p: method.kernel(p, spec), params).shape == spec.kernel_shape
    cost = method.cost(spec, shape)
    assert cost.params == sum(p.size for p in params.values()) + spec.out_features
    assert cost.mult_adds >= 0
    if padding == "REFLECT" and side == 0:
        return
    x = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    y = jax.eval_shape(lambda p, x: method.apply(p, x, spec), params, x)
    assert y.shape == (2, *spec.output_shape(shape[:-1]), spec.out_features)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("filter_summary", "decoupled")]


@pytest.mark.parametrize("name", ["falcon", *SLOW])
def test_no_tracer_leaks_under_jit_vmap_and_grad(name):
    method, kernels = METHODS[name], jnp.stack([trained(), trained(0)])
    x = jnp.ones((1, 3, 3, 4))

    def loss(kernel):
        params = fj.fit(kernel, method, spec=SPEC)
        y = method.apply(params, x, SPEC)
        return jnp.sum(y) + fj.relative_error(kernel, method.kernel(params, SPEC))

    with jax.check_tracer_leaks():
        values = jax.jit(jax.vmap(loss))(kernels)
    assert values.shape == (2,) and np.isfinite(values).all()


def test_no_tracer_leaks_in_plain_functions():
    def all_of_them(d, p):
        kernel = fj.falcon_kernel(d, p)
        y = fj.depthwise_conv(jnp.ones((1, 4, 2)), d[:, 0, :2])
        return fj.gep(d, p[0].T).sum() + kernel.sum() + y.sum() + fj.quantize_linear(kernel).scale

    with jax.check_tracer_leaks():
        value = jax.jit(jax.vmap(all_of_them))(jnp.ones((2, 3, 2, 4)), jnp.ones((2, 2, 2, 4)))
    assert np.isfinite(value).all()


class Net(nnx.Module):
    def __init__(self, size, groups, m, n):
        self.conv = nnx.Conv(
            groups * m, groups * n, size, feature_group_count=groups, rngs=nnx.Rngs(0)
        )
        self.head = nnx.Linear(groups * n, 2, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.head(self.conv(x).mean(axis=(1, 2)))


@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    st.sampled_from(["falcon", "filter_summary"]),
    st.sampled_from([(1, 1), (3, 3)]),
    st.integers(1, 2),
)
def test_plans_and_profiles_of_small_networks(name, size, groups):
    model = Net(size, groups, 2, 2)
    x = jnp.ones((1, 4, 4, 2 * groups))
    plan = fj.make_plan(model, [fj.Rule(method=METHODS[name])], x)
    small = fj.compress(model, plan)
    assert fj.profile(small, x).params == plan.after.params
    assert small(x).shape == (1, 2)
    np.testing.assert_allclose(small(x), model(x), atol=1e-4)


def test_plans_of_what_cannot_be_planned():
    model = Net((3, 3), 1, 2, 2)
    refused(lambda: fj.make_plan(nnx.Linear(2, 2, rngs=nnx.Rngs(0))), "no convolution")
    refused(lambda: fj.make_plan(model, sample=3), "leading batch axis")
    refused(lambda: fj.make_plan(model, [fj.Rule(path="nothing", method=None)]), "no convolution")
    refused(lambda: fj.make_plan(model, solver="best"), "'best'")  # type: ignore[arg-type]
    refused(lambda: fj.profile(model, jnp.ones((1, 4, 4, 5))), "cannot be called on the sample")
    refused(lambda: fj.profile(model, None), "leading batch axis")
    refused(lambda: fj.Rule(path="(", method=None), "no regular expression")
    for wrong in ({"path": 3, "method": None}, {"method": "falcon"}, {"method": None, "where": 3}):
        refused(lambda wrong=wrong: fj.Rule(**wrong), "a rule has")
