import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import falcon_jax as fj


@pytest.mark.parametrize(
    ("d_shape", "p_shape"),
    [((4,), (4,)), ((3, 3, 4), (4, 5)), ((2, 4), (4, 3, 2)), ((2, 3, 2, 6), (6, 1, 4, 3))],
)
def test_gep_is_definition_1_entry_by_entry(d_shape, p_shape):
    rng = np.random.default_rng(0)
    d, p = rng.normal(size=d_shape), rng.normal(size=p_shape)
    expected = np.zeros((*d_shape, *p_shape[1:]))
    for index in itertools.product(*map(range, expected.shape)):
        i, j = index[: len(d_shape)], index[len(d_shape) - 1 :]
        expected[index] = d[i] * p[j]
    result = fj.gep(jnp.asarray(d, jnp.float32), jnp.asarray(p, jnp.float32))
    np.testing.assert_allclose(result, expected, rtol=1e-6)


@pytest.mark.parametrize(("d_shape", "p_shape"), [((3, 4), (5, 4)), ((), (1,)), ((1,), ())])
def test_gep_says_what_does_not_fit(d_shape, p_shape):
    with pytest.raises(ValueError, match="last axis of d and the first axis of p"):
        fj.gep(jnp.ones(d_shape), jnp.ones(p_shape))


def test_falcon_kernel_is_the_transposed_gep_of_theorem_1():
    rng = np.random.default_rng(1)
    depthwise = jnp.asarray(rng.normal(size=(3, 2, 1, 5)), jnp.float32)
    pointwise = jnp.asarray(rng.normal(size=(4, 1, 5)), jnp.float32)
    by_gep = fj.gep(depthwise[:, :, 0], pointwise[:, 0].T).transpose(0, 1, 3, 2)
    np.testing.assert_allclose(fj.falcon_kernel(depthwise, pointwise), by_gep, rtol=1e-6)


def test_rank_k_kernel_is_the_sum_of_its_terms():
    rng = np.random.default_rng(2)
    depthwise, pointwise = rng.normal(size=(3, 3, 3, 5)), rng.normal(size=(4, 3, 5))
    expected = np.zeros((3, 3, 4, 5))
    for i, j, m, n, r in itertools.product(range(3), range(3), range(4), range(5), range(3)):
        expected[i, j, m, n] += depthwise[i, j, r, n] * pointwise[m, r, n]
    kernel = fj.falcon_kernel(
        jnp.asarray(depthwise, jnp.float32), jnp.asarray(pointwise, jnp.float32)
    )
    np.testing.assert_allclose(kernel, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
def test_separable_kernel_entry_by_entry(groups):
    rng = np.random.default_rng(3)
    m, n, k = 4, 6, 2
    depthwise, pointwise = rng.normal(size=(3, m, k)), rng.normal(size=(m // groups, k, n))
    expected = np.zeros((3, m // groups, n))
    for i, a, b, r in itertools.product(range(3), range(m // groups), range(n), range(k)):
        channel = b // (n // groups) * (m // groups) + a
        expected[i, a, b] += depthwise[i, channel, r] * pointwise[a, r, b]
    kernel = fj.separable_kernel(
        jnp.asarray(depthwise, jnp.float32),
        jnp.asarray(pointwise, jnp.float32),
        feature_group_count=groups,
    )
    np.testing.assert_allclose(kernel, expected, rtol=1e-5, atol=1e-6)


def test_gep_works_under_jit_vmap_and_grad():
    d, p = jnp.ones((2, 3, 4)), jnp.ones((2, 4, 5))
    assert jax.jit(jax.vmap(fj.gep))(d, p).shape == (2, 3, 4, 5)
    gradient = jax.grad(lambda d: fj.gep(d, p[0]).sum())(d[0])
    np.testing.assert_array_equal(gradient, np.full((3, 4), 5.0))
