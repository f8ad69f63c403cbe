"""Public functions on arbitrary input: a right answer, or an exception that says what is wrong."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import falcon_jax as fj
from falcon_jax.ops.geometry import PADDING_NAMES

pytestmark = pytest.mark.usefixtures("without_hook")

RUNS = settings(max_examples=15, deadline=None, derandomize=True)
DTYPES = st.sampled_from(["float32", "bfloat16", "float16", "int32", "float64"])
SIZES = st.lists(st.sampled_from([0, 2, 3]), max_size=2)
WRONG_NUMBERS = [0, -1, 1.5, math.nan, math.inf, "2", None, True, (), (1.5, 1), ("1", 1), {}, 1j]


def draw(shape, dtype="float32", seed=0):
    """Small whole numbers: exact in every type, and so are their sums and products."""
    values = np.random.default_rng(seed).integers(-3, 4, tuple(shape))
    return values.astype(np.float64) if dtype == "float64" else jnp.asarray(values, dtype)


def float64(values):
    return np.asarray(values).astype(np.float64)


def refused(call, *words):
    """Check that a call is refused in a sentence of our own."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert len(message.split()) > 4 and "Traced" not in message
    assert all(word in message for word in words), message


@RUNS
@given(SIZES, SIZES, DTYPES)
def test_gep(rows, columns, dtype):
    d, p = draw(rows, dtype), draw(columns, dtype, seed=1)
    with jax.disable_jit():
        if not rows or not columns or rows[-1] != columns[0]:
            refused(lambda: fj.gep(d, p), str(tuple(rows)), str(tuple(columns)))
            return
        product = fj.gep(d, p)
    expected = float64(d)[(..., *(None,) * (len(columns) - 1))] * float64(p)
    assert np.array_equal(float64(product), expected)


@RUNS
@given(SIZES, st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), DTYPES)
def test_falcon_kernel(size, m, k, n, dtype):
    d, p = draw((*size, k, n), dtype), draw((m, k, n), dtype, seed=1)
    expected = np.einsum("...rn,mrn->...mn", float64(d), float64(p))
    assert np.array_equal(float64(fj.falcon_kernel(d, p)), expected)


@RUNS
@given(SIZES, st.integers(0, 2), st.integers(0, 2), st.integers(1, 2), st.integers(1, 3), DTYPES)
def test_separable_kernel(size, m, k, width, groups, dtype):
    d = draw((*size, groups * m, k), dtype)
    p = draw((m, k, groups * width), dtype, seed=1)
    kernel = fj.separable_kernel(d, p, feature_group_count=groups)
    for g in range(groups):
        columns = slice(g * width, (g + 1) * width)
        rows = float64(d)[..., g * m : (g + 1) * m, :]
        expected = np.einsum("...mr,mrn->...mn", rows, float64(p)[..., columns])
        assert np.array_equal(float64(kernel)[..., columns], expected)


@RUNS
@given(st.lists(st.integers(0, 3), max_size=4), st.lists(st.integers(0, 3), max_size=4))
def test_kernels_of_shapes_that_do_not_fit(depthwise, pointwise):
    d, p = np.ones(depthwise, np.float32), np.ones(pointwise, np.float32)
    fits = len(depthwise) > 1 and len(pointwise) == 3
    if not fits or depthwise[-2:] != pointwise[1:]:
        refused(lambda: fj.falcon_kernel(d, p), "falcon_kernel takes")
    if not fits or depthwise[-2:] != pointwise[:2]:
        refused(lambda: fj.separable_kernel(d, p), "separable_kernel takes")


@pytest.mark.parametrize("groups", [0, -1, 3, 2.0, None, "2", True])
def test_separable_kernel_of_wrong_groups(groups):
    d, p = np.ones((3, 3, 4, 2)), np.ones((2, 2, 8))
    refused(lambda: fj.separable_kernel(d, p, feature_group_count=groups), "separable_kernel takes")


@RUNS
@given(SIZES, DTYPES, st.sampled_from([1e-30, 1e-3, 1, 1e4, 1e30]))
def test_relative_error(shape, dtype, scale):
    k, a = draw(shape, dtype), draw(shape, dtype, seed=1)
    if dtype == "float64":
        k, a = k * scale, a * scale
    norm = np.linalg.norm(float64(k))
    error = np.linalg.norm(float64(k) - float64(a))
    if norm:
        assert float(fj.relative_error(k, a)) == pytest.approx(error / norm, rel=1e-5, abs=1e-6)
    assert np.isfinite(fj.relative_error(k, a))


def test_relative_error_of_what_cannot_be_compared():
    one = np.ones((2, 3), np.float32)
    for other in (np.ones(3), np.ones((2, 1)), np.ones((2, 3, 1)), 1.0, one * 1j):
        refused(lambda other=other: fj.relative_error(one, other), "one shape")
    refused(lambda: fj.relative_error(one, one * np.float32(np.nan)), "not finite")
    assert float(fj.relative_error([3, 4], [3, 4])) == 0  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=2),
    st.integers(0, 2),
    st.integers(0, 6),
    st.integers(1, 3),
    st.sampled_from([*PADDING_NAMES, 0, 1, -1, ((2, -1),), "FULL", 1.5]),
    st.integers(1, 2),
    st.integers(1, 2),
)
def test_depthwise_conv(size, channels, side, strides, padding, kernel_dilation, input_dilation):
    axes = len(size)
    padding = padding * axes if isinstance(padding, tuple) else padding
    geometry = {"strides": strides, "padding": padding}
    geometry |= {"kernel_dilation": kernel_dilation, "input_dilation": input_dilation}
    x, kernel = draw((2, *(side,) * axes, channels)), draw((*size, channels), seed=1)
    if padding in ("FULL", 1.5):
        refused(lambda: fj.depthwise_conv(x, kernel, **geometry), repr(padding), "SAME")
        return
    try:
        with jax.disable_jit():
            y = fj.depthwise_conv(x, kernel, **geometry)
    except ValueError as error:
        empty = side == 0 and ("empty axis" in str(error) or "takes more away" in str(error))
        assert empty or ("takes more away" in str(error) and side < 2)
        return
    spatial = fj.ops.output_shape(
        (side,) * axes,
        size,
        **{
            name: value if isinstance(value, (str, tuple)) else (value,) * axes
            for name, value in geometry.items()
            if name != "padding"
        },
        padding=((padding, padding),) * axes if isinstance(padding, int) else padding,
    )
    assert y.shape == (2, *spatial, channels)
    if isinstance(padding, str) or not y.size:
        return
    low, high = padding[0] if isinstance(padding, tuple) else (padding, padding)
    dilated = np.zeros((2, *((side - 1) * input_dilation + 1,) * axes, channels))
    dilated[(slice(None), *(slice(None, None, input_dilation),) * axes)] = float64(x)
    border = [(max(low, 0), max(high, 0))] * axes
    padded = np.pad(dilated, [(0, 0), *border, (0, 0)])
    inner = slice(max(-low, 0), padded.shape[1] - max(-high, 0))
    padded = padded[(slice(None), *(inner,) * axes)]
    for index in np.ndindex(*spatial):
        total = np.zeros((2, channels))
        for tap in np.ndindex(*size):
            at = (i * strides + t * kernel_dilation for i, t in zip(index, tap, strict=True))
            total += padded[(slice(None), *at)] * float64(kernel)[tap]
        assert np.array_equal(float64(y)[(slice(None), *index)], total)


@pytest.mark.parametrize("name", ["strides", "kernel_dilation", "input_dilation"])
def test_depthwise_conv_of_wrong_numbers(name):
    x, kernel = jnp.ones((1, 5, 5, 2)), jnp.ones((3, 3, 2))
    for wrong in WRONG_NUMBERS:
        if wrong is not None:
            refused(lambda wrong=wrong: fj.depthwise_conv(x, kernel, **{name: wrong}), name)


@pytest.mark.parametrize(
    "x, kernel", [((), ()), ((5, 2), (3, 3, 2)), ((5, 5, 2), (3, 3, 1)), ((5, 5, 2), (0, 3, 2))]
)
def test_depthwise_conv_of_shapes_that_do_not_fit(x, kernel):
    refused(lambda: fj.depthwise_conv(np.ones(x), np.ones(kernel)), "depthwise_conv")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "float64"])
def test_depthwise_conv_in_every_type(dtype):
    x, kernel = draw((2, 5, 2), dtype), draw((3, 2), dtype, seed=1)
    expected = lax.conv_general_dilated(
        draw((2, 5, 2)),
        draw((3, 2), seed=1)[:, None],
        (1,),
        "SAME",
        dimension_numbers=("NHC", "HIO", "NHC"),
        feature_group_count=2,
    )
    assert np.array_equal(float64(fj.depthwise_conv(x, kernel)), float64(expected))


SPEC = {"kernel_size": (3, 2), "in_features": 4, "out_features": 8}


@pytest.mark.parametrize(
    "field",
    [
        *("kernel_size", "in_features", "out_features", "strides", "kernel_dilation"),
        *("input_dilation", "feature_group_count"),
    ],
)
def test_specs_of_wrong_numbers(field):
    for wrong in [*WRONG_NUMBERS, (1, math.nan), (1, 2, 0), "33", 0.5]:
        if wrong is None and field in ("strides", "kernel_dilation", "input_dilation"):
            continue
        refused(lambda wrong=wrong: fj.ConvSpec(**SPEC | {field: wrong}))


@pytest.mark.parametrize(
    "padding",
    [None, True, 1.5, "full", "", (), (1,), (1, 1.5), ((1, 1), (1, None)), ((1, 1), "ab"), {}],
)
def test_specs_of_wrong_padding(padding):
    refused(lambda: fj.ConvSpec(**SPEC, padding=padding), "padding", repr(padding))


@pytest.mark.parametrize("use_bias", [None, 0, 1, "yes"])
def test_specs_of_wrong_bias(use_bias):
    refused(lambda: fj.ConvSpec(**SPEC, use_bias=use_bias), "use_bias")


def test_specs_take_the_numbers_of_numpy():
    spec = fj.ConvSpec(
        kernel_size=np.array([3, 2]),  # type: ignore[arg-type]
        in_features=np.int64(4),  # type: ignore[arg-type]
        out_features=np.int32(8),  # type: ignore[arg-type]
        strides=np.int64(2),  # type: ignore[arg-type]
        padding=np.array([[0, 1], [1, 2]]),  # type: ignore[arg-type]
    )
    assert spec == fj.ConvSpec(**SPEC, strides=2, padding=((0, 1), (1, 2)))
    assert all(type(n) is int for n in (*spec.kernel_size, *spec.strides, spec.in_features))


@pytest.mark.parametrize("spatial", [(), (3,), (3, 3, 3), (-1, 3)])
def test_output_shapes_of_wrong_sizes(spatial):
    refused(lambda: fj.ConvSpec(**SPEC).output_shape(spatial), "2 spatial axes")


@RUNS
@given(SIZES, DTYPES, st.integers(1, 8), st.sampled_from([1e-30, 1, 1e30]))
def test_quantize_linear(shape, dtype, bits, scale):
    values = draw(shape, dtype)
    if dtype == "float64":
        values = values * scale
    array = fj.quantize_linear(values, bits=bits)
    assert array.codes.shape == tuple(shape) and np.all(float64(array.codes) < 2**bits)
    if values.size:
        off = np.abs(float64(array.values()) - float64(values)).max()
        assert off <= float(array.scale) / 2 + 1e-6 * np.abs(float64(values)).max()


@pytest.mark.parametrize("bits", [0, 9, -1, 1.5, "8", None, True, math.nan, []])
def test_quantize_linear_to_wrong_bits(bits):
    refused(lambda: fj.quantize_linear(np.ones(3), bits=bits), "bits")


@pytest.mark.parametrize("values", [[np.nan], [np.inf], [-3e38, 3e38], [1j]])
def test_quantize_linear_of_what_has_no_grid(values):
    refused(lambda: fj.quantize_linear(np.array(values), bits=1))
