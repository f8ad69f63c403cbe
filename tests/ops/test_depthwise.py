import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.test_util import check_grads

import falcon_jax as fj
from falcon_jax.ops.choice import canonical_forms, depthwise_form
from falcon_jax.ops.geometry import output_shape
from tests.nn.weights import draw

NAMED = ["SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT"]


def reference(x, kernel, *, strides, pads, input_dilation, kernel_dilation):
    """Depthwise convolution in float64, tap by tap, from its definition."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    dilated = np.zeros(
        (
            x.shape[0],
            *((n - 1) * d + 1 for n, d in zip(x.shape[1:-1], input_dilation, strict=True)),
            x.shape[-1],
        )
    )
    dilated[(slice(None), *(slice(None, None, d) for d in input_dilation))] = x
    padded = np.pad(dilated, ((0, 0), *pads, (0, 0)))
    sizes = [
        (n - (k - 1) * dk - 1) // s + 1
        for n, k, dk, s in zip(
            padded.shape[1:-1], kernel.shape, kernel_dilation, strides, strict=False
        )
    ]
    y = np.zeros((x.shape[0], *sizes, x.shape[-1]))
    for tap in np.ndindex(kernel.shape[:-1]):
        window = tuple(
            slice(t * dk, t * dk + (n - 1) * s + 1, s)
            for t, dk, n, s in zip(tap, kernel_dilation, sizes, strides, strict=True)
        )
        y += padded[(slice(None), *window)] * kernel[tap]
    return y


geometries = st.fixed_dictionaries(
    {
        "strides": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "pads": st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 2),
        "input_dilation": st.tuples(st.integers(1, 3), st.integers(1, 2)),
        "kernel_dilation": st.tuples(st.integers(1, 2), st.integers(1, 3)),
    }
)


@settings(max_examples=25, deadline=None)
@given(geometry=geometries, kernel_size=st.tuples(st.integers(1, 3), st.integers(1, 3)))
def test_matches_the_definition_in_float64(geometry, kernel_size):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 7, 8, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(*kernel_size, 3)), jnp.float32)
    y = fj.depthwise_conv(x, kernel, padding=geometry["pads"], **without_pads(geometry))
    np.testing.assert_allclose(y, reference(x, kernel, **geometry), rtol=1e-5, atol=1e-5)


@settings(max_examples=8, deadline=None)
@given(
    geometry=geometries,
    impl=st.sampled_from(["per_pixel", "grouped"]),
    sides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_every_form_and_its_gradients_are_those_of_the_shifted_one(geometry, impl, sides):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, *sides, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 2, 3)), jnp.float32)
    options = {"padding": geometry["pads"], **without_pads(geometry)}
    if 0 in output_shape(sides, (3, 2), **options):
        return

    @jax.jit  # one program an example
    def results(x, kernel):
        def of(impl):
            y, vjp = jax.vjp(lambda *a: fj.depthwise_conv(*a, **options, impl=impl), x, kernel)
            return y, *vjp(jnp.cos(y))

        return of(impl), of("shifted")

    found, shifted = results(x, kernel)
    for ours, theirs in zip(found, shifted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    expected = reference(x, kernel, **geometry)
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-5)


def test_small_maps_take_the_form_per_pixel_and_its_second_gradient_is_right():
    assert depthwise_form(points=9, taps=9, backend="cpu") == "per_pixel"
    assert depthwise_form(points=10, taps=9, backend="cpu") == "shifted"
    assert depthwise_form(points=4, taps=9, backend="a new one") == "shifted"
    x = draw(2, 2, 2, 2)
    kernel = draw(3, 3, 2, seed=1)
    check_grads(
        jax.jit(lambda x, k: fj.depthwise_conv(x, k) ** 2), (x, kernel), 2, ["rev"], 2e-2, 2e-2
    )


def test_forward_mode_takes_the_grouped_form():
    x = draw(2, 4, 4, 2)
    kernel = draw(3, 3, 2, seed=1)
    check_grads(
        lambda x, k: fj.depthwise_conv(x, k, impl="grouped"), (x, kernel), 1, ["fwd"], 2e-2, 2e-2
    )


def test_vmap_of_the_gradient():
    x = draw(3, 2, 5, 5, 2)
    kernels = draw(3, 3, 3, 2, seed=1)
    gradient = jax.grad(lambda x, k: (fj.depthwise_conv(x, k) ** 2).sum(), (0, 1))
    mapped = jax.jit(jax.vmap(gradient))(x, kernels)
    for i in range(3):
        for ours, one in zip(mapped, gradient(x[i], kernels[i]), strict=True):
            np.testing.assert_allclose(ours[i], one, rtol=1e-4, atol=1e-4)


def without_pads(geometry):
    return {name: value for name, value in geometry.items() if name != "pads"}


@settings(max_examples=10, deadline=None)
@given(geometry=geometries, padding=st.sampled_from([*NAMED, "pads"]))
def test_gradients_match_those_of_a_grouped_convolution(geometry, padding):
    if padding == "REFLECT" and geometry["kernel_dilation"] != (1, 1):
        padding = "VALID"
    padding = geometry["pads"] if padding == "pads" else padding
    options = {"padding": padding, **without_pads(geometry)}
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 7, 8, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 2, 3)), jnp.float32)

    def grouped(x, kernel):
        return fj.ops.conv(x, kernel[..., None, :], feature_group_count=3, **options)

    sizes = output_shape((7, 8), (3, 2), **options)
    weights = jnp.asarray(rng.normal(size=(4, *sizes, 3)), jnp.float32)

    @jax.jit  # one program an example
    def results(x, kernel, weights):
        def of(function):
            y, vjp = jax.vjp(function, x, kernel)
            return y, vjp(weights)

        return of(lambda *a: fj.depthwise_conv(*a, **options)), of(grouped)

    (found, actual), (y, expected) = results(x, kernel, weights)
    np.testing.assert_allclose(found, y, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert y.shape[1:3] == sizes


@pytest.mark.parametrize("shape", [(5, 9, 4), (2, 5, 4, 6, 2), (1, 40, 3, 2)])
def test_any_number_of_spatial_axes_and_tall_maps(shape):
    axes = len(shape) - 2
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3,) * axes + shape[-1:]), jnp.float32)
    ones, pads = (1,) * axes, ((1, 1),) * axes
    y = fj.depthwise_conv(x, kernel, padding=pads)
    expected = reference(
        x, kernel, strides=ones, pads=pads, input_dilation=ones, kernel_dilation=ones
    )
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    check_grads(
        lambda x, k: fj.depthwise_conv(x, k, padding=pads), (x, kernel), 1, ["rev"], 2e-2, 2e-2
    )


def test_gradient_of_gradient():
    x = draw(2, 4, 4, 2)
    kernel = draw(3, 3, 2, seed=1)
    check_grads(
        jax.jit(lambda x, k: fj.depthwise_conv(x, k, strides=2) ** 2),
        (x, kernel),
        2,
        ["rev"],
        2e-2,
        2e-2,
    )


def test_gradient_of_gradient_where_the_input_is_dilated_and_cropped():
    x = draw(2, 4, 4, 2)
    kernel = draw(3, 3, 2, seed=1)
    options = {"padding": ((-1, 2), (1, -2)), "input_dilation": (2, 3)}

    def mixed(impl):
        def of_kernel(x, kernel):
            y = fj.depthwise_conv(x, kernel, impl=impl, **options)
            return (
                jax.grad(lambda k: (y * fj.depthwise_conv(x, k, impl=impl, **options)).sum())(
                    kernel
                )
                ** 2
            ).sum()

        return jax.jit(jax.grad(of_kernel, (0, 1)))(x, kernel)

    for ours, theirs in zip(mixed("shifted"), mixed("grouped"), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


def test_kernel_gradient_in_chunks_of_the_batch():
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(12, 64, 64, 16)), jnp.float32)  # more than one cache-full
    kernel = jnp.asarray(rng.normal(size=(3, 3, 16)), jnp.float32)
    ours = jax.grad(lambda k: (fj.depthwise_conv(x, k) ** 2).sum())(kernel)
    y = np.asarray(fj.depthwise_conv(x, kernel), np.float64)
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = np.array(
        [
            [2 * (padded[:, i : i + 64, j : j + 64] * y).sum(axis=(0, 1, 2)) for j in range(3)]
            for i in range(3)
        ]
    )
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_any_number_of_batch_axes(batch):
    x = draw(*batch, 5, 5, 3)
    kernel = draw(3, 3, 3, seed=1)
    y = fj.depthwise_conv(x, kernel)
    flat = fj.depthwise_conv(x.reshape(-1, 5, 5, 3), kernel)
    np.testing.assert_array_equal(y, flat.reshape(y.shape))
    assert y.shape == x.shape


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_sums_in_float32(dtype):
    x = draw(2, 8, 8, 4, dtype=dtype)
    kernel = draw(5, 5, 4, seed=1, dtype=dtype)
    y = fj.depthwise_conv(x, kernel)
    exact = fj.depthwise_conv(x.astype(jnp.float32), kernel.astype(jnp.float32))
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, exact.astype(dtype))


def test_composes_with_jit_and_vmap():
    x = draw(3, 2, 6, 6, 2)
    kernels = draw(3, 3, 3, 2, seed=1)
    mapped = jax.jit(jax.vmap(fj.depthwise_conv))(x, kernels)
    for i in range(3):
        np.testing.assert_allclose(
            mapped[i], fj.depthwise_conv(x[i], kernels[i]), rtol=1e-6, atol=1e-6
        )


def test_wrong_channels_are_named():
    with pytest.raises(ValueError, match=r"equal C; got \(1, 4, 4, 3\) and \(3, 3, 2\)"):
        fj.depthwise_conv(jnp.ones((1, 4, 4, 3)), jnp.ones((3, 3, 2)))


@pytest.mark.parametrize(("ceil_mode", "padding"), [(False, "VALID"), (True, "SAME")])
def test_max_pool_matches_reduce_window(ceil_mode, padding):
    x = draw(2, 7, 8, 3)
    expected = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), padding)
    np.testing.assert_array_equal(fj.ops.max_pool_2x2(x, ceil_mode=ceil_mode), expected)
    with canonical_forms():
        np.testing.assert_array_equal(fj.ops.max_pool_2x2(x, ceil_mode=ceil_mode), expected)
