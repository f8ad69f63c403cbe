import jax
import jax.numpy as jnp
import numpy as np
import pytest

import falcon_jax as fj
from falcon_jax.solvers.rank_selection import mean_kept_energy
from tests.nn.weights import draw

SPEC = fj.ConvSpec(kernel_size=(3, 3), in_features=6, out_features=8, use_bias=False)
ORDERS = ("pw-dw", "dw-pw")


def squares(kernel, order):
    """Squared singular values of every filter's matrix, in float64."""
    flat = np.asarray(kernel, np.float64).reshape(9, *kernel.shape[-2:])
    matrices = flat.transpose(2, 0, 1) if order == "pw-dw" else flat.transpose(1, 0, 2)
    return np.linalg.svd(matrices, compute_uv=False) ** 2


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("terms", [1, 2, 4])
def test_every_number_of_terms_is_optimal(order, terms):
    kernel = draw(3, 3, 6, 8)
    method = fj.Decoupled(order=order, terms=terms)
    found = fj.relative_error(kernel, method.kernel(fj.fit(kernel, method), SPEC))
    discarded = squares(kernel, order)[:, terms:].sum()
    assert found == pytest.approx(np.sqrt(discarded / np.sum(np.float64(kernel) ** 2)), rel=1e-5)


@pytest.mark.parametrize(("order", "exact"), [("pw-dw", 6), ("dw-pw", 8)])
def test_as_many_terms_as_can_be_are_exact(order, exact):
    kernel = draw(3, 3, 6, 8)
    method = fj.Decoupled(order=order, terms="full")
    assert method.for_layer(SPEC).terms == exact
    assert fj.relative_error(kernel, method.kernel(fj.fit(kernel, method), SPEC)) < 1e-5


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("energy", [0.5, 0.8, 0.95])
def test_terms_by_the_energy_that_filters_keep_on_average(order, energy):
    kernel = draw(3, 3, 6, 8) * jnp.arange(8.0).reshape(
        1, 1, 1, 8
    )  # filters of unequal size, one of them zero
    found = squares(kernel, order)
    found = found[found.sum(axis=1) > 0]
    shares = (found.cumsum(axis=1) / found.sum(axis=1, keepdims=True)).mean(axis=0)
    expected = int(np.argmax(shares >= energy)) + 1
    method = fj.Decoupled(order=order, energy=energy).for_layer(SPEC, kernel[None])
    assert (method.terms, method.energy) == (expected, None)


def test_zero_matrices_do_not_count():
    matrices = jnp.stack([jnp.diag(jnp.array([2.0, 1.0])), jnp.zeros((2, 2))])
    np.testing.assert_allclose(mean_kept_energy(matrices), [0.8, 1.0], atol=1e-6)
    np.testing.assert_array_equal(mean_kept_energy(jnp.zeros((3, 2, 2))), [1, 1])


@pytest.mark.parametrize(
    ("order", "same"), [("pw-dw", fj.Falcon(rank=2)), ("dw-pw", fj.DepthwiseSeparable(rank=2))]
)
def test_it_is_the_mathematics_of_falcon_and_dpconv(order, same):
    kernel, x = draw(3, 3, 6, 8), draw(2, 7, 7, 6)
    method = fj.Decoupled(order=order, terms=2)
    params = fj.fit(kernel, method)
    jax.tree.map(np.testing.assert_array_equal, params, fj.fit(kernel, same))
    np.testing.assert_array_equal(method.apply(params, x, SPEC), same.apply(params, x, SPEC))
    assert method.cost(SPEC, x.shape) == same.cost(SPEC, x.shape)
    assert fj.get_method("decoupled", **method.options()) == method


def test_settings_that_make_no_sense():
    assert fj.Decoupled() == fj.Decoupled(energy=0.95)
    with pytest.raises(ValueError, match="either terms or energy"):
        fj.Decoupled(terms=2, energy=0.9)
    with pytest.raises(ValueError, match=r"at most 1; got 1\.5"):
        fj.Decoupled(energy=1.5)
    with pytest.raises(ValueError, match=r"at least 1.*got 0"):
        fj.Decoupled(terms=0)
    with pytest.raises(ValueError, match="rank 10 is more than the 9 taps"):
        fj.Decoupled(terms=10).require(SPEC)
    with pytest.raises(ValueError, match="need a trained kernel"):
        fj.Decoupled().init(jax.random.key(0), SPEC)
