import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

import falcon_jax as fj
from falcon_jax.ops.choice import falcon_form
from tests.nn.weights import draw
from tests.ops.test_depthwise import reference


def pointwise(x, kernel, groups):
    m, n = kernel.shape[0], kernel.shape[1] // groups
    parts = [x[..., g * m : (g + 1) * m] @ kernel[:, g * n : (g + 1) * n] for g in range(groups)]
    return np.concatenate(parts, axis=-1)


@settings(max_examples=10, deadline=None)
@given(
    first=st.sampled_from(["pointwise", "depthwise"]),
    rank=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
    axes=st.integers(1, 2),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    half=st.booleans(),
)
def test_matches_the_definition_in_float64(first, rank, groups, axes, stride, dilation, half):
    rng = np.random.default_rng(0)
    m, n, dtype = 4, 6, jnp.bfloat16 if half else jnp.float32
    shape = (3,) * axes + ((rank, n) if first == "pointwise" else (m, rank))
    x = jnp.asarray(rng.normal(size=(2, *(6, 5)[:axes], m)), dtype)
    d = jnp.asarray(rng.normal(size=shape), dtype)
    p = jnp.asarray(rng.normal(size=(m // groups, rank, n)), dtype)
    y = fj.separable_conv(
        x,
        d,
        p,
        first=first,
        strides=stride,
        padding=((1, 2),) * axes,
        kernel_dilation=dilation,
        feature_group_count=groups,
    )
    assert y.dtype == dtype
    x64, d64, p64 = (np.asarray(a, np.float64) for a in (x, d, p))
    ones = (1,) * axes
    options = {
        "strides": (stride,) * axes,
        "pads": ((1, 2),) * axes,
        "input_dilation": ones,
        "kernel_dilation": (dilation,) * axes,
    }
    if first == "pointwise":
        terms = (
            reference(pointwise(x64, p64[:, r], groups), d64[..., r, :], **options)
            for r in range(rank)
        )
    else:
        terms = (
            pointwise(reference(x64, d64[..., r], **options), p64[:, r], groups)
            for r in range(rank)
        )
    expected = sum(terms)
    tolerance = (0.03 if half else 1e-5) * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("first", ["pointwise", "depthwise"])
def test_one_term_may_go_without_its_axis(first):
    x = draw(2, 1, 5, 5, 4)
    d = draw(3, 3, 6 if first == "pointwise" else 4, seed=1)
    p = draw(4, 6, seed=2)
    long = d[..., None, :] if first == "pointwise" else d[..., None]
    y = fj.separable_conv(x, d, p, first=first)
    np.testing.assert_array_equal(y, fj.separable_conv(x, long, p[:, None], first=first))
    assert y.shape == (2, 1, 5, 5, 6)


def test_gradients_of_gradients():
    x = draw(1, 3, 3, 2)
    d = draw(3, 3, 2, seed=1)
    p = draw(2, 2, seed=2)
    check_grads(jax.jit(lambda *a: fj.separable_conv(*a)), (x, d, p), 2, ["rev"], 2e-2, 2e-2)


def test_wrong_arguments_are_named():
    x, d, p = jnp.ones((1, 4, 4, 3)), jnp.ones((3, 3, 5)), jnp.ones((3, 6))
    with pytest.raises(ValueError, match=r"depthwise of shape \(\*kernel_size, 1, 6\)"):
        fj.separable_conv(x, d, p)


def test_the_form_goes_by_shape_batch_and_rank():
    layer = {"taps": 9, "in_features": 64, "out_features": 64, "backend": "cpu"}
    assert falcon_form(points=1024, rank=1, **layer) == "separable"
    assert falcon_form(points=1024, rank=2, **layer) == "wide"
    assert falcon_form(points=32 * 1024, rank=2, **layer) == "separable"
    assert falcon_form(points=None, rank=2, **layer) == "separable"
    assert falcon_form(points=32 * 1024, rank=9, **layer) == "gep"
    assert falcon_form(points=16, rank=9, **layer) == "wide"
    assert falcon_form(points=32 * 1024, rank=1, **{**layer, "in_features": 3}) == "gep"
    assert falcon_form(points=1024, rank=9, **{**layer, "backend": "new"}) == "separable"
