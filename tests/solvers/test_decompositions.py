"""Tucker, CP and VBMF against TensorLy, float64 NumPy and planted answers."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from falcon_jax.solvers import cp_als, tucker2, vbmf_rank
from tests.nn.weights import draw


def trained(m, n, seed=0):
    """A kernel whose spectrum falls, as that of trained ones."""
    u, s, v = np.linalg.svd(
        np.random.default_rng(seed).normal(size=(9 * m, n)), full_matrices=False
    )
    falling = s[0] / np.arange(1, len(s) + 1)
    return ((u * falling) @ v).reshape(3, 3, m, n).astype(np.float32)


def relative(found, kernel):
    kernel = np.asarray(kernel, np.float64)
    return np.linalg.norm(found - kernel) / np.linalg.norm(kernel)


def tucker_error(kernel, rank_in, rank_out):
    m, n = kernel.shape[-2:]
    factors = tucker2(jnp.asarray(kernel).reshape(9, m, n), rank_in=rank_in, rank_out=rank_out)
    inner, core, outer = map(np.float64, factors)
    np.testing.assert_allclose(inner.T @ inner, np.eye(rank_in), atol=1e-5)
    np.testing.assert_allclose(outer @ outer.T, np.eye(rank_out), atol=1e-5)
    return relative(np.einsum("ma,tab,bn->tmn", inner, core, outer).reshape(kernel.shape), kernel)


def cp_error(kernel, rank):
    factors = map(np.float64, cp_als(jnp.asarray(kernel), rank=rank))
    return relative(np.einsum("ar,br,cr,dr->abcd", *factors), kernel)


@pytest.mark.parametrize(("rank_in", "rank_out"), [(2, 3), (4, 10), (12, 5)])
def test_tucker_is_at_most_one_percent_above_tensorly(rank_in, rank_out):
    import tensorly
    from tensorly.decomposition import partial_tucker

    kernel = trained(16, 24)
    (core, factors), _ = partial_tucker(
        kernel.astype(np.float64), rank=[rank_in, rank_out], modes=[2, 3], n_iter_max=200
    )
    theirs = relative(tensorly.tenalg.multi_mode_dot(core, factors, modes=[2, 3]), kernel)
    assert tucker_error(kernel, rank_in, rank_out) <= 1.01 * theirs


@pytest.mark.parametrize(("m", "n", "rank"), [(16, 24, 4), (16, 24, 20), (32, 32, 48)])
def test_cp_is_at_most_one_percent_above_tensorly(m, n, rank):
    import tensorly
    from tensorly.decomposition import parafac

    kernel = trained(m, n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorLy's, of more columns than an axis is long
        found = parafac(kernel.astype(np.float64), rank=rank, n_iter_max=200, tol=1e-6, init="svd")
    assert cp_error(kernel, rank) <= 1.01 * relative(tensorly.cp_to_tensor(found), kernel)


def test_tucker_of_full_rank_and_of_planted_rank():
    kernel = trained(6, 8)
    assert tucker_error(kernel, 6, 8) < 1e-5
    planted = np.einsum(
        "ijab,ma,bn->ijmn", draw(3, 3, 2, 3), draw(6, 2, seed=1), draw(3, 8, seed=2)
    )
    assert tucker_error(planted, 2, 3) < 1e-5
    assert tucker_error(planted, 1, 3) > 0.1


def test_cp_of_planted_rank():
    factors = [draw(size, 3, seed=i) for i, size in enumerate((3, 3, 8, 10))]
    assert cp_error(np.einsum("ar,br,cr,dr->abcd", *factors), 3) < 1e-3


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_any_scale(scale):
    kernel = trained(8, 8)
    assert cp_error(scale * kernel, 4) == pytest.approx(cp_error(kernel, 4), rel=1e-3)
    assert tucker_error(scale * kernel, 3, 3) == pytest.approx(tucker_error(kernel, 3, 3), rel=1e-5)


def test_zero_kernels_stay_zero():
    zero = jnp.zeros((9, 4, 5))
    assert not any(np.abs(core).max() for core in tucker2(zero, rank_in=2, rank_out=2)[1:2])
    found = jnp.einsum("tr,mr,nr->tmn", *cp_als(zero, rank=2))
    np.testing.assert_array_equal(found, zero)


def test_vmap_over_kernels():
    kernels = jnp.stack([trained(6, 6, seed) for seed in range(2)])
    stacked = jax.vmap(lambda k: tucker2(k.reshape(9, 6, 6), rank_in=3, rank_out=3))(kernels)
    for index, kernel in enumerate(kernels):
        inner, core, outer = (part[index] for part in stacked)
        found = np.einsum("ma,tab,bn->tmn", inner, core, outer).reshape(kernel.shape)
        assert relative(found, kernel) == pytest.approx(tucker_error(kernel, 3, 3), rel=1e-4)
    together = jax.vmap(lambda k: cp_als(k, rank=2))(kernels)
    found = np.einsum("ar,br,cr,dr->abcd", *(factor[1] for factor in together))
    assert relative(found, kernels[1]) == pytest.approx(cp_error(kernels[1], 2), rel=1e-3)


@pytest.mark.parametrize(
    ("shape", "rank"), [((64, 576), 5), ((128, 300), 20), ((30, 30), 3), ((100, 900), 0)]
)
@pytest.mark.parametrize("scale", [1, 1e-9])
def test_vbmf_finds_a_planted_rank_under_noise(shape, rank, scale):
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1]))
    noisy = scale * (signal + rng.normal(size=shape))
    assert vbmf_rank(noisy) == vbmf_rank(noisy.T) == rank


def test_vbmf_drops_what_noise_drowns():
    """Below the detection limit of Theorem 2, s < sqrt(M v x_limit), a component is noise."""
    rng = np.random.default_rng(1)
    rows, columns = 80, 400
    u, v = (
        np.linalg.qr(rng.normal(size=(rows, 1)))[0],
        np.linalg.qr(rng.normal(size=(columns, 1)))[0],
    )
    alpha = rows / columns
    tau = 2.5129 * np.sqrt(alpha)
    limit = np.sqrt(columns * (1 + tau) * (1 + alpha / tau))
    noise = rng.normal(size=(rows, columns))
    assert vbmf_rank(1.5 * limit * u @ v.T + noise) == 1
    assert vbmf_rank(0.5 * limit * u @ v.T + noise) == 0


def test_vbmf_of_degenerate_matrices():
    assert vbmf_rank(np.zeros((3, 5))) == 0
    assert vbmf_rank(np.ones((1, 5))) == 1
    assert vbmf_rank(np.ones((4, 5))) == 1
    with pytest.raises(ValueError, match="takes a matrix"):
        vbmf_rank(np.ones((2, 2, 2)))
    with pytest.raises(ValueError, match="not finite"):
        vbmf_rank(np.array([[1.0, np.nan], [0, 1]]))
