"""Compiled kernels against sums in float64, written down as they are defined."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from falcon_jax.native.kernels import HALVES, AlongAxis, MaxPool, Step, pack_rows, run


def convolution(x, kernel, step):
    """Return the sum over taps and channels, in float64; kernel (*size, M, N), or (*size, N)."""
    (top, bottom), (left, right) = step.padding
    x = np.pad(x.astype(np.float64), ((0, 0), (top, bottom), (left, right), (0, 0)))
    b, h, w, n = step.convolved((x.shape[0], *x.shape[1:3], step.in_features))
    h = (x.shape[1] - (kernel.shape[0] - 1) * step.dilation[0] - 1) // step.strides[0] + 1
    w = (x.shape[2] - (kernel.shape[1] - 1) * step.dilation[1] - 1) // step.strides[1] + 1
    y = np.zeros((b, h, w, n))
    for i, j in itertools.product(*map(range, kernel.shape[:2])):
        rows, columns = i * step.dilation[0], j * step.dilation[1]
        part = x[:, rows :: step.strides[0], columns :: step.strides[1]][:, :h, :w]
        y += part * kernel[i, j] if kernel.ndim == 3 else part @ kernel[i, j].astype(np.float64)
    return y


def expected(step, x, weights, depthwise, bias, residual, inner):
    if step.kind == "standard":
        kernel = weights.reshape(*step.kernel_size, step.in_features, -1)
    elif step.kind == "depthwise":
        kernel = depthwise[..., 0, :]
    else:
        kernel = np.einsum("ijkn,mkn->ijmn", depthwise, weights, dtype=np.float64)
    y = convolution(x, kernel, step) + bias
    if inner is not None:
        for r, z in enumerate(np.split(inner, step.terms, axis=-1)):
            y += convolution(z, depthwise[..., r, :], step)
    y = y if residual is None else y + residual
    y = np.maximum(y, 0) if step.relu else y
    return maxima(y, step.pool) if step.pool else y


def maxima(x, pool):
    x = np.pad(x, ((0, 0), *pool.padding, (0, 0)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(x, pool.window, axis=(1, 2))
    return windows[:, :: pool.strides[0], :: pool.strides[1]].max((-1, -2))


def operands(step, shape, *, residual=False, inner=False, seed=0):
    """Return input, weights and depthwise kernel as they are, and what the kernel takes."""
    r = np.random.default_rng(seed)
    m, k, n = step.in_features, step.terms, step.out_features
    depth = m * (np.prod(step.kernel_size) if step.kind == "standard" else 1)
    x = r.normal(size=(*shape, m)).astype(np.float32)
    weights = (r.normal(size=(depth, k, n)) / np.sqrt(depth)).astype(np.float32)
    depthwise = r.normal(size=(*step.kernel_size, k, n)).astype(np.float32)
    bias = r.normal(size=n).astype(np.float32)
    added = r.normal(size=step.convolved(x.shape)).astype(np.float32) if residual else None
    between = r.normal(size=(*shape, k * n)).astype(np.float32) if inner else None
    if step.bfloat16:
        x, weights = (a.astype(jnp.bfloat16).astype(np.float32) for a in (x, weights))
    none = np.zeros(0, np.float32)
    packed = (
        x,
        none if step.kind == "depthwise" else step.packed(weights),
        none if step.kind == "standard" else pack_rows(depthwise),
        pack_rows(bias),
        none if added is None else added,
        none if between is None else between,
    )
    return (x, weights, depthwise, bias, added, between), packed


def step(kind, m, n, **settings):
    return Step(kind=kind, in_features=m, out_features=n, **{"kernel_size": (3, 3), **settings})


SAME = ((1, 1), (1, 1))
CASES = {
    "pointwise": (step("standard", 5, 7, kernel_size=(1, 1)), (2, 3, 5)),
    "pointwise, strides": (step("standard", 5, 70, kernel_size=(1, 1), strides=(2, 2)), (1, 7, 5)),
    "product of one row": (step("standard", 300, 130, kernel_size=(1, 1)), (1, 1, 1)),
    "3x3, many channels": (step("standard", 20, 33, padding=SAME), (2, 9, 7)),
    "3x3, few channels": (step("standard", 3, 65, padding=SAME), (2, 9, 7)),
    "stem, pooled": (
        step(
            "standard",
            3,
            64,
            kernel_size=(7, 7),
            strides=(2, 2),
            padding=((3, 3), (3, 3)),
            relu=True,
            pool=MaxPool(window=(3, 3), strides=(2, 2), padding=((1, 1), (1, 1))),
        ),
        (2, 63, 46),
    ),
    "3x3, pooled": (step("standard", 20, 150, padding=SAME, pool=HALVES), (1, 21, 33)),
    "pointwise, pooled": (
        step(
            "standard",
            9,
            17,
            kernel_size=(1, 1),
            pool=MaxPool(window=(1, 2), strides=(3, 1), padding=((2, 0), (1, 0))),
        ),
        (3, 8, 5),
    ),
    "3x3, full vectors": (step("standard", 20, 64, padding=SAME, relu=True), (1, 9, 24)),
    "3x3, many rows": (step("standard", 17, 80, padding=SAME), (3, 20, 33)),
    "3x3, strides": (
        step("standard", 18, 32, strides=(2, 2), padding=((0, 1), (2, 1))),
        (2, 11, 40),
    ),
    "dilation, few channels": (
        step("standard", 3, 20, dilation=(1, 3), padding=((1, 1), (3, 3))),
        (1, 8, 25),
    ),
    "7x7, strides": (
        step("standard", 3, 64, kernel_size=(7, 7), strides=(2, 2), padding=((3, 3), (3, 3))),
        (1, 23, 30),
    ),
    "dilation": (step("standard", 17, 20, dilation=(2, 3), padding=((2, 1), (3, 4))), (1, 11, 13)),
    "rank 1": (step("pointwise_depthwise", 9, 40, padding=SAME, relu=True), (2, 13, 17)),
    "one row": (step("pointwise_depthwise", 9, 40, padding=SAME), (1, 1, 9)),
    "rank 3": (step("pointwise_depthwise", 9, 100, terms=3, padding=SAME), (1, 6, 5)),
    "rank 2, strides": (
        step("pointwise_depthwise", 8, 16, terms=2, strides=(2, 2), padding=((0, 1), (0, 1))),
        (2, 12, 9),
    ),
    "5x3, no padding": (step("pointwise_depthwise", 6, 20, kernel_size=(5, 3)), (1, 9, 8)),
    "rank 1, dilation": (
        step("pointwise_depthwise", 6, 20, dilation=(3, 2), padding=((3, 3), (2, 2))),
        (1, 10, 9),
    ),
    "many panels": (step("pointwise_depthwise", 33, 200, padding=SAME, relu=True), (1, 40, 21)),
    "long rows": (step("pointwise_depthwise", 4, 130, padding=SAME), (1, 6, 700)),
    "padding beyond the map": (
        step("pointwise_depthwise", 3, 5, kernel_size=(5, 5), padding=((4, 4), (4, 4))),
        (1, 1, 2),
    ),
    "pooled": (
        step("pointwise_depthwise", 9, 40, padding=SAME, relu=True, pool=HALVES),
        (2, 11, 9),
    ),
    "depthwise": (step("depthwise", 37, 37, padding=SAME, relu=True), (2, 8, 9)),
    "depthwise, strides": (
        step("depthwise", 80, 80, kernel_size=(5, 5), strides=(2, 1), padding=((2, 2), (2, 2))),
        (1, 11, 9),
    ),
    "depthwise, pooled": (step("depthwise", 37, 37, padding=SAME, pool=HALVES), (1, 9, 8)),
    "pooled, long": (step("depthwise", 16, 16, padding=SAME, pool=HALVES), (1, 70, 60)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_what_it_says(name):
    kernel, shape = CASES[name]
    for added in (False, True):
        inner = added and kernel.kind == "pointwise_depthwise"
        given, packed = operands(kernel, shape, residual=added, inner=inner)
        np.testing.assert_allclose(
            run(kernel, *packed), expected(kernel, *given), rtol=1e-4, atol=1e-4
        )


QUICK = ("product of one row", "3x3, many channels", "7x7, strides", "rank 3", "rank 2, strides")


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_rounded_numbers_are_multiplied_exactly(name):
    kernel, shape = CASES[name]
    kernel = dataclasses.replace(kernel, bfloat16=True)
    for added in (False, True):
        inner = added and kernel.kind == "pointwise_depthwise"
        given, packed = operands(kernel, shape, residual=added, inner=inner)
        np.testing.assert_allclose(
            run(kernel, *packed), expected(kernel, *given), rtol=1e-4, atol=1e-4
        )


@pytest.mark.usefixtures("tiles")
def test_inputs_are_rounded_to_the_nearest():
    kernel, shape = CASES["3x3, many channels"]
    kernel = dataclasses.replace(kernel, bfloat16=True)
    _, (x, *rest) = operands(kernel, shape)
    noise = 1 + 2.0**-9 * np.random.default_rng(1).uniform(-0.99, 0.99, x.shape)
    np.testing.assert_array_equal(
        run(kernel, (x * noise).astype(np.float32), *rest), run(kernel, x, *rest)
    )


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("name", ["dilation", "rank 2, strides", "depthwise, pooled"])
def test_plain_jax_gives_the_same(name, bfloat16, request):
    kernel, shape = CASES[name]
    kernel = dataclasses.replace(kernel, bfloat16=bfloat16)
    if bfloat16:
        request.getfixturevalue("tiles")
    inner = kernel.kind == "pointwise_depthwise"
    _, packed = operands(kernel, shape, residual=True, inner=inner)
    wanted = run(kernel, *packed)
    np.testing.assert_allclose(
        kernel.plain(*map(jnp.asarray, packed)), wanted, rtol=1e-4, atol=1e-4
    )


def test_nan_stays_nan():
    kernel, shape = CASES["rank 1"]
    _, packed = operands(kernel, shape)
    packed[0][0, 5, 5, 0] = np.nan
    y = np.asarray(run(kernel, *packed))
    assert np.isnan(y[0, 4:7, 4:7]).all()
    assert np.isfinite(y[1]).all()
    pooled = np.asarray(run(MaxPool(window=(2, 2), strides=(2, 2)), y))
    assert np.isnan(pooled[0, 2:4, 2:4]).all()


@pytest.mark.parametrize("padding", [((0, 0), (0, 0)), ((1, 0), (1, 2))])
@pytest.mark.parametrize(
    ("window", "strides"), [((2, 2), (2, 2)), ((3, 3), (2, 2)), ((2, 3), (1, 2))]
)
def test_maxima(window, strides, padding):
    x = np.random.default_rng(0).normal(size=(2, 9, 8, 21)).astype(np.float32)
    pool = MaxPool(window=window, strides=strides, padding=padding)
    np.testing.assert_array_equal(run(pool, x), maxima(x, pool))


def test_sums_along_an_axis():
    r = np.random.default_rng(0)
    x = r.normal(size=(3, 5, 19)).astype(np.float32)
    weights = r.normal(size=(7, 2)).astype(np.float32)
    places = r.integers(0, 5, size=(7, 2)).astype(np.int32)
    wanted = np.einsum("aitb,it->aib", x[:, places].astype(np.float64), weights)
    np.testing.assert_allclose(
        run(AlongAxis(size=7), x, weights, places), wanted, rtol=1e-5, atol=1e-5
    )


def test_transformations_give_what_plain_jax_gives():
    kernel, shape = CASES["rank 2, strides"]
    _, (x, *rest) = operands(kernel, shape, residual=True)
    *weights, residual, inner = map(jnp.asarray, rest)

    def native(x):
        return run(kernel, x, *weights, residual, inner)

    def plain(x):
        return kernel.plain(x, *weights, residual, inner)

    xs = jnp.stack([x, 2 * x, -x])
    np.testing.assert_allclose(
        jax.jit(jax.vmap(native))(xs), jax.vmap(plain)(xs), rtol=1e-4, atol=1e-4
    )
    of_native, of_plain = (
        jax.grad(lambda x, f=f: (f(x) ** 2).sum())(xs[0]) for f in (native, plain)
    )
    np.testing.assert_allclose(of_native, of_plain, rtol=1e-4, atol=1e-4)
    by_weights = jax.vmap(lambda b: run(kernel, x, *weights[:2], b, residual, inner))
    biases = jnp.stack([weights[2], 2 * weights[2]])
    wanted = jnp.stack([kernel.plain(xs[0], *weights[:2], b, residual, inner) for b in biases])
    np.testing.assert_allclose(by_weights(biases), wanted, rtol=1e-4, atol=1e-4)


def test_empty_batches_have_empty_answers():
    kernel, _ = CASES["rank 1"]
    _, (_, *rest) = operands(kernel, (1, 13, 17))
    assert run(kernel, np.zeros((0, 13, 17, 9), np.float32), *rest).shape == (0, 13, 17, 40)
