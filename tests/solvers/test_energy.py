import jax
import jax.numpy as jnp
import numpy as np
import pytest

import falcon_jax as fj
from falcon_jax.solvers import kept_energy, smallest_rank
from tests.nn.weights import draw


def shares(matrices):
    """Kept energies in float64."""
    squares = np.linalg.svd(np.asarray(matrices, np.float64), compute_uv=False) ** 2
    return np.cumsum(squares.sum(0)) / squares.sum()


@pytest.mark.parametrize("shape", [(5, 9, 4), (3, 4, 9), (1, 1, 7), (6, 9, 64)])
@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_the_energy_of_every_rank_is_that_of_a_float64_svd(shape, scale):
    matrices = scale * draw(*shape)
    np.testing.assert_allclose(kept_energy(matrices), shares(matrices), atol=2e-6)


def test_zero_matrices_keep_everything():
    np.testing.assert_array_equal(kept_energy(jnp.zeros((2, 3, 4))), [1, 1, 1])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999, 1.0])
def test_the_smallest_rank_that_keeps_enough(share):
    matrices = draw(8, 9, 16, seed=1)
    expected = int(np.argmax(shares(matrices) >= share - 1e-9)) + 1
    assert smallest_rank(matrices[None], share) == expected


def test_every_layer_of_a_stack_keeps_enough():
    easy = jnp.ones((8, 9, 16))
    hard = draw(8, 9, 16, seed=1)
    assert smallest_rank(easy[None], 0.9) == 1
    assert smallest_rank(jnp.stack([easy, hard]), 0.9) == smallest_rank(hard[None], 0.9) > 1


@pytest.mark.parametrize("method", [fj.Falcon, fj.DepthwiseSeparable])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_method_decides_its_rank_by_the_kernel(method, groups):
    spec = fj.ConvSpec(
        kernel_size=(3, 3), in_features=6, out_features=8, feature_group_count=groups
    )
    kernel = draw(*spec.kernel_shape, seed=2)
    by_energy = method(rank=fj.Energy(0.8))
    rank = by_energy.for_layer(spec, kernel[None]).rank

    def error(rank):
        fitted = method(rank=rank)
        return fj.relative_error(kernel, fitted.kernel(fj.fit(kernel, fitted, spec=spec), spec))

    assert error(rank) ** 2 <= 0.2 < error(rank - 1) ** 2
    params = fj.fit(kernel, by_energy, spec=spec)
    assert fj.relative_error(kernel, by_energy.kernel(params, spec)) == pytest.approx(
        float(error(rank)), rel=1e-5
    )


@pytest.mark.parametrize("method", [fj.Falcon, fj.DepthwiseSeparable])
def test_full_rank_reproduces_the_kernel_with_as_few_terms_as_can_be(method):
    spec = fj.ConvSpec(kernel_size=(3, 3), in_features=4, out_features=5, use_bias=False)
    full = method(rank="full").for_layer(spec)
    assert full.rank == {fj.Falcon: 4, fj.DepthwiseSeparable: 5}[method]
    assert method(rank="full").cost(spec, (8, 8, 4)) == full.cost(spec, (8, 8, 4))
    kernel = draw(*spec.kernel_shape, seed=3)
    params = fj.fit(kernel, method(rank="full"))
    assert fj.relative_error(kernel, full.kernel(params, spec)) < 1e-5


def test_energy_needs_a_kernel_and_its_values():
    spec = fj.ConvSpec(kernel_size=(3, 3), in_features=4, out_features=5)
    by_energy = fj.Falcon(rank=fj.Energy(0.9))
    with pytest.raises(ValueError, match=r"Energy\(share=0.9\) needs a trained kernel"):
        by_energy.init(jax.random.key(0), spec)
    with pytest.raises(ValueError, match="cannot be found under jit"):
        jax.jit(lambda kernel: fj.fit(kernel, by_energy))(jnp.ones((3, 3, 4, 5)))


@pytest.mark.parametrize("share", [0, -0.1, 1.1, float("nan")])
def test_shares_are_above_nothing_and_at_most_everything(share):
    with pytest.raises(ValueError, match="above 0 and at most 1; got"):
        fj.Energy(share)
