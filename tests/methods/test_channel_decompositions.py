import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import falcon_jax as fj
from tests.compression.networks import forward
from tests.methods.reference import standard_conv
from tests.nn.weights import draw

GEOMETRIES = [
    {"kernel_size": (3, 3)},
    {"kernel_size": (3, 2), "strides": (2, 1), "padding": ((1, 0), (2, 1))},
    {"kernel_size": (3,), "padding": "CAUSAL", "kernel_dilation": 2},
    {"kernel_size": (2, 3), "padding": "CIRCULAR", "strides": 2},
    {"kernel_size": (3, 3), "padding": "VALID", "input_dilation": (2, 1)},
    {"kernel_size": (2, 1, 3), "padding": "SAME", "strides": (1, 2, 2)},
]
METHODS = [fj.Tucker(rank=(2, 3)), fj.Tucker(rank="full"), fj.CP(rank=2)]


def spec_of(geometry, m=4, n=5):
    return fj.ConvSpec(in_features=m, out_features=n, use_bias=False, **geometry)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_apply_is_the_convolution_with_the_kernel(method, geometry):
    spec = spec_of(geometry)
    params = method.init(jax.random.key(0), spec)
    x = draw(2, *(7, 8, 6)[: len(spec.kernel_size)], 4)
    expected = standard_conv(x, method.kernel(params, spec), spec)
    y = method.apply(params, x, spec)
    np.testing.assert_allclose(y, expected, atol=1e-5 * max(np.abs(expected).max(), 1))


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_costs_are_the_sizes_of_the_arrays_and_the_products(method, geometry):
    spec = spec_of(geometry)
    params = method.init(jax.random.key(0), spec)
    spatial = (7, 8, 6)[: len(spec.kernel_size)]
    cost = method.cost(spec, (*spatial, 4))
    assert cost.params == sum(value.size for value in params.values())
    out = spec.output_shape(spatial)
    inner, outer = params["inner"].size, params["outer"].size
    products = np.prod(spatial) * inner + np.prod(out) * outer
    if "core" in params:
        products += np.prod(out) * params["core"].size
    sizes = list(spatial)
    for axis in range(len(spatial)):
        if f"axis{axis}" in params:
            sizes[axis] = out[axis]
            products += np.prod(sizes) * params[f"axis{axis}"].size
    assert cost.mult_adds == products


def test_tucker_at_full_rank_reproduces_the_kernel():
    kernel = draw(3, 3, 4, 6)
    params = fj.fit(kernel, fj.Tucker(rank="full"))
    spec = fj.ConvSpec.of_kernel(kernel.shape)
    assert fj.relative_error(kernel, fj.Tucker(rank="full").kernel(params, spec)) < 1e-5


def test_cp_reproduces_a_kernel_of_its_rank():
    spec = spec_of({"kernel_size": (3, 3)}, 8, 9)
    method = fj.CP(rank=2)
    kernel = method.kernel(method.init(jax.random.key(1), spec), spec)
    assert fj.relative_error(kernel, method.kernel(fj.fit(kernel, method), spec)) < 1e-3


@pytest.mark.parametrize("ratio", [2.0, 8.0, 30.0])
@pytest.mark.parametrize("method", [fj.Tucker, fj.CP])
def test_a_budget_is_used_but_not_exceeded(method, ratio):
    spec = spec_of({"kernel_size": (3, 3)}, 32, 48)
    decided = method(rank=fj.Budget(ratio)).for_layer(spec)
    limit = 9 * 32 * 48 / ratio
    assert 0.85 * limit < decided.cost(spec, (8, 8, 32)).params <= limit


def test_ranks_by_vbmf_are_those_of_the_planted_kernel():
    spec = spec_of({"kernel_size": (3, 3)}, 64, 64)
    planted = fj.Tucker(rank=(5, 7))
    kernel = planted.kernel(planted.init(jax.random.key(2), spec), spec)
    kernel = kernel + 0.05 * jnp.std(kernel) * draw(*kernel.shape)
    assert fj.Tucker().for_layer(spec, kernel[None]).rank == (5, 7)
    assert fj.CP().for_layer(spec, kernel[None]).rank == 7
    noise = draw(*kernel.shape, seed=3)
    assert fj.Tucker().for_layer(spec, noise[None]).rank == (1, 1)
    assert fj.Tucker().for_layer(spec, jnp.stack([noise, kernel])).rank == (5, 7)


@pytest.mark.parametrize(
    "method", [fj.Tucker(rank=fj.Budget(4.0)), pytest.param(fj.CP(rank=8), marks=pytest.mark.slow)]
)
def test_whole_models(method, tmp_path):
    model = fj.models.vgg8_cifar(rngs=nnx.Rngs(0), width=0.25)
    x = draw(2, 16, 16, 3)
    rules = [
        fj.Rule(path="stages/0/0/conv", method=None),
        fj.Rule(path="stages/1/.*", method=None),
        fj.Rule(method=method),
    ]
    plan = fj.make_plan(model, rules, x)
    assert len(plan.replaced) == 3
    plan.save(tmp_path / "plan.json")
    assert fj.Plan.load(tmp_path / "plan.json") == plan
    small = fj.compress(model, plan)
    counted = fj.profile(small, x)
    assert (counted.params, counted.mult_adds) == (plan.after.params, plan.after.mult_adds)
    small.eval()
    assert np.isfinite(forward(small, x)).all()


@pytest.mark.parametrize(
    ("method", "geometry", "reason"),
    [
        (fj.Tucker(rank=(5, 2)), {}, "rank 5 is more than the 4 input channels"),
        (fj.Tucker(rank=(2, 7)), {}, "rank 7 is more than the 6 output channels"),
        (fj.Tucker(rank=5), {}, "rank 5 is more than the 4 input channels"),
        (fj.Tucker(rank=fj.Budget(100.0)), {}, "a budget of 2 parameters .* rank 1 has 19"),
        (fj.CP(rank=fj.Budget(100.0)), {}, "a budget of 2 parameters .* rank 1 has 16"),
        (fj.CP(rank=37), {}, "rank 37 is more than 36"),
        (fj.Tucker(), {"kernel_size": (1, 1)}, "nothing spatial"),
        (fj.CP(), {"kernel_size": (1, 1)}, "nothing spatial"),
        (fj.Tucker(), {"feature_group_count": 2}, "for one feature group"),
        (fj.CP(), {"feature_group_count": 2}, "for one feature group"),
    ],
)
def test_why_a_convolution_cannot_be_replaced(method, geometry, reason):
    spec = spec_of({"kernel_size": (3, 3), **geometry}, 4, 6)
    with pytest.raises(ValueError, match=reason):
        method.require(spec)


def test_settings_that_make_no_sense():
    for rank in (0, (1, 0), (1, 2, 3)):
        with pytest.raises(ValueError, match="numbers at least 1; got"):
            fj.Tucker(rank=rank)
    with pytest.raises(ValueError, match="'vbmf' or a Budget; got 0"):
        fj.CP(rank=0)
    with pytest.raises(ValueError, match=r"above 0; got 0"):
        fj.Budget(0)
    spec = spec_of({"kernel_size": (3, 3)})
    with pytest.raises(ValueError, match="VBMF needs a trained kernel"):
        fj.Tucker().init(jax.random.key(0), spec)
    with pytest.raises(ValueError, match="cannot be found under jit"):
        jax.jit(lambda k: fj.fit(k, fj.CP()))(draw(3, 3, 4, 5))


def test_lists_are_as_good_as_tuples():
    assert fj.get_method("tucker", rank=[2, 3]) == fj.Tucker(rank=(2, 3))
