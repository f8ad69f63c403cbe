import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from falcon_jax.solvers import best_low_rank, leading_terms
from tests.nn.weights import draw


def side_by_side(a, *, rank):
    """The same by `leading_terms`, which takes and gives the batch last."""
    left, right = leading_terms(jnp.moveaxis(a, 0, 2), rank=rank)
    return left.transpose(2, 0, 1), right.transpose(2, 1, 0)


FACTORS = [best_low_rank, side_by_side]


@pytest.fixture(params=FACTORS)
def factor(request):
    return request.param


def svd_error(a, rank):
    """Error of the best approximation, from a float64 SVD."""
    values = np.linalg.svd(np.asarray(a, np.float64), compute_uv=False)
    return np.sqrt((values[:, rank:] ** 2).sum())


def our_error(factor, a, rank):
    left, right = factor(a, rank=rank)
    product = np.asarray(left, np.float64) @ np.asarray(right, np.float64)
    return np.linalg.norm(np.asarray(a, np.float64) - product)


def spectrum(values, batch=8, q=40, seed=0):
    rng = np.random.default_rng(seed)
    p = len(values)
    u = np.linalg.qr(rng.normal(size=(batch, p, p)))[0]
    v = np.linalg.qr(rng.normal(size=(batch, q, p)))[0]
    return jnp.asarray((u * np.asarray(values)) @ v.swapaxes(1, 2), jnp.float32)


@pytest.mark.parametrize(
    ("factor", "shape", "rank"),
    [
        (factor, shape, rank)
        # A few terms and rows: compiling grows with them.
        if factor is best_low_rank or shape[1:] not in ((9, 64), (27, 27))
        else pytest.param(factor, shape, rank, marks=pytest.mark.slow)
        for factor in FACTORS
        for shape in [(64, 9, 3), (32, 9, 64), (16, 25, 40), (4, 27, 27)]
        for rank in {1, 2, min(shape[1:]) - 1, min(shape[1:])}
        if factor is best_low_rank or rank <= 9
    ],
)
def test_error_is_the_optimum_of_eckart_and_young(factor, shape, rank):
    a = draw(*shape)
    rounding = 1e-5 * float(np.linalg.norm(a))
    optimum = svd_error(a, rank)
    assert our_error(factor, a, rank) == pytest.approx(optimum, rel=1e-5, abs=rounding)


@pytest.mark.parametrize(
    "values",
    [
        10.0 ** -np.arange(6),  # falls fast
        np.ones(6),  # all equal
        [3, 3, 2, 2, 2, 1],
        [1, 1, 1, 0, 0, 0],  # rank deficient
        [5, 0, 0, 0, 0, 0],
        1 + 1e-6 * np.arange(6),  # nearly equal
    ],
)
def test_difficult_spectra(factor, values):
    a = spectrum(values)
    norm = np.linalg.norm(a)
    for rank in (1, 3, 5):
        assert our_error(factor, a, rank) <= svd_error(a, rank) * (1 + 1e-5) + 3e-6 * norm


@pytest.mark.parametrize("scale", [1e-20, 1e-9, 1.0, 1e20])
def test_any_scale_and_balanced_factors(factor, scale):
    a = draw(5, 9, 12, seed=1) * scale
    left, right = factor(a, rank=4)
    assert np.isfinite(left).all() and np.isfinite(right).all()
    scaled = np.asarray(a, np.float64) / scale
    error = our_error(factor, a, 4) / scale
    assert error == pytest.approx(svd_error(scaled, 4), rel=1e-5)
    values = np.linalg.svd(scaled, compute_uv=False)[:, :4]
    root = np.sqrt(scale)
    np.testing.assert_allclose(np.linalg.norm(left / root, axis=1) ** 2, values, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(right / root, axis=2) ** 2, values, rtol=1e-5)


def test_zero_matrices_and_terms_beyond_the_rank_are_zero(factor):
    a = jnp.concatenate([jnp.zeros((1, 9, 4)), draw(1, 9, 4)])
    left, right = factor(a, rank=9)
    assert left.shape == (2, 9, 9)
    assert right.shape == (2, 9, 4)
    assert not left[0].any()
    assert not right[0].any()
    assert not left[1, :, 4:].any()
    np.testing.assert_allclose(left[1] @ right[1], a[1], atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_factored_in_float32(factor, dtype):
    a = draw(4, 4, 16, dtype=dtype)
    left, right = factor(a, rank=4)
    assert left.dtype == right.dtype == dtype
    left, right, a = (np.asarray(values, np.float32) for values in (left, right, a))
    assert np.abs(left @ right - a).max() < 10 * jnp.finfo(dtype).eps


def test_gradients_numerically(factor):
    a = draw(3, 4, 6, seed=2)

    @jax.jit
    def loss(a):
        left, right = factor(jnp.asarray(a), rank=2)
        return jnp.sin(left @ right).sum()

    check_grads(loss, (a,), order=1, modes=["fwd", "rev"], atol=3e-2, rtol=3e-2)
    gradient = jax.grad(loss)(jnp.zeros_like(a))
    assert np.isfinite(gradient).all()


def test_works_under_jit_and_vmap(factor):
    a = draw(2, 5, 9, 12, seed=3)
    mapped = jax.jit(jax.vmap(lambda a: factor(a, rank=3)))(a)
    for i in range(2):
        left, right = factor(a[i], rank=3)
        np.testing.assert_allclose(
            np.asarray(mapped[0][i]) @ mapped[1][i], np.asarray(left) @ right, atol=1e-5
        )


@pytest.mark.parametrize(
    "factor", [best_low_rank, pytest.param(side_by_side, marks=pytest.mark.slow)]
)
def test_many_fits_in_one_program_do_not_stall(factor):
    stacks = [draw(32, 9, 16, seed=i) for i in range(16)]
    fits = jax.jit(lambda stacks: [factor(a, rank=2)[0] for a in stacks])(stacks)
    assert all(np.isfinite(left).all() for left in fits)
