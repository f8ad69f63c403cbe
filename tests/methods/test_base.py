import math

import jax
import pytest

import falcon_jax as fj

METHODS = [
    fj.Falcon(rank=1),
    fj.Falcon(rank=3),
    fj.DepthwiseSeparable(),
    fj.DepthwiseSeparable(rank=2),
]


def spec_of(**changes):
    return fj.ConvSpec(
        **{"kernel_size": (3, 3), "in_features": 6, "out_features": 10, "padding": 1, **changes}
    )


@pytest.mark.parametrize("strides", [1, 2])
def test_costs_of_table_2(strides):
    h, m, n, d = 8, 6, 10, 3
    h_out = h // strides
    spec = spec_of(strides=strides, use_bias=False)
    standard = fj.standard_cost(spec, (h, h, m))
    assert standard == fj.Cost(params=d**2 * m * n, mult_adds=h_out**2 * d**2 * m * n)
    falcon = fj.Falcon().cost(spec, (h, h, m))
    assert falcon.params == m * n + d**2 * n
    assert falcon.mult_adds == h**2 * m * n + h_out**2 * d**2 * n
    separable = fj.DepthwiseSeparable().cost(spec, (h, h, m))
    assert separable.params == m * n + d**2 * m
    assert separable.mult_adds == h_out**2 * (m * n + d**2 * m)


def test_compression_and_reduction_rates_of_theorems_3_to_5():
    m, n, d, k = 64, 128, 3, 2
    spec = fj.ConvSpec(kernel_size=(d, d), in_features=m, out_features=n, strides=2, use_bias=False)
    standard = fj.standard_cost(spec, (16, 16, m))
    falcon, rank_k = (fj.Falcon(rank=r).cost(spec, (16, 16, m)) for r in (1, k))
    assert standard.params / falcon.params == pytest.approx(m * d**2 / (m + d**2))
    # Theorem 4: H' W' M D^2 / (H W M + H' W' D^2).
    assert standard.mult_adds / falcon.mult_adds == pytest.approx(
        64 * m * d**2 / (256 * m + 64 * d**2)
    )
    assert falcon.params / rank_k.params == pytest.approx(1 / k)
    assert falcon.mult_adds / rank_k.mult_adds == pytest.approx(1 / k)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel_size", [3, (3, 5), (3, 1, 2)])
def test_parameters_are_the_sizes_of_the_arrays(method, groups, kernel_size):
    spec = spec_of(kernel_size=kernel_size, padding=0, feature_group_count=groups)
    params = jax.eval_shape(lambda key: method.init(key, spec), jax.random.key(0))
    axes = len(spec.kernel_size)
    cost = method.cost(spec, (*(9,) * axes, 6))
    assert cost.params == sum(math.prod(p.shape) for p in params.values()) + 10


@pytest.mark.parametrize("groups", [1, 2])
def test_mult_adds_step_by_step(groups):
    spec = spec_of(strides=2, feature_group_count=groups)
    points_in, points_out, m = 8 * 6, 4 * 3, 6 // groups
    falcon = fj.Falcon(rank=2).cost(spec, (8, 6, 6)).mult_adds
    assert falcon == 2 * 10 * (points_in * m + points_out * 9) + points_out * 10
    separable = fj.DepthwiseSeparable(rank=2).cost(spec, (8, 6, 6)).mult_adds
    pointwise = 6 * 10 // groups
    assert separable == 2 * points_out * (6 * 9 + pointwise) + points_out * 10
    standard = fj.standard_cost(spec, (8, 6, 6))
    assert standard.mult_adds == points_out * (9 * m * 10 + 10)
    assert standard.params == 9 * m * 10 + 10


@pytest.mark.parametrize("method", METHODS)
def test_batch_axes_do_not_count(method):
    spec = spec_of()
    assert method.cost(spec, (8, 8, 6)) == method.cost(spec, (7, 5, 8, 8, 6))
    assert fj.standard_cost(spec, (8, 8, 6)) == fj.standard_cost(spec, (2, 8, 8, 6))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(8, 6), (8, 8, 5)])
def test_inputs_that_do_not_fit_are_refused(method, shape):
    with pytest.raises(ValueError, match=r"2 spatial axes, 6 channels\)"):
        method.cost(spec_of(), shape)


def test_costs_add_up():
    assert fj.Cost(params=1, mult_adds=2) + fj.Cost(params=3, mult_adds=4) == fj.Cost(
        params=4, mult_adds=6
    )


@pytest.mark.parametrize("method", METHODS)
def test_support_is_told_with_a_reason(method):
    assert method.supports(spec_of()) is None
    assert "1x1" in method.supports(spec_of(kernel_size=(1, 1)))
    too_few = spec_of(kernel_size=(1, 2), padding=0)
    if method.rank > 2:
        assert "more than the 2 taps" in method.supports(too_few)
        with pytest.raises(ValueError, match="cannot replace"):
            method.require(too_few)
    else:
        assert method.supports(too_few) is None
