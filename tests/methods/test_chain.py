"""Spatial and channel decomposition: optimal factors, costs, inner methods."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import falcon_jax as fj
from falcon_jax.methods.registry import method_from
from tests.compression.networks import conv, images
from tests.methods.reference import float64, standard_conv
from tests.nn.weights import draw

GEOMETRIES = [
    {"kernel_size": (3, 3)},
    {"kernel_size": (3, 2), "strides": (2, 1), "padding": ((1, 0), (2, 1))},
    {"kernel_size": (2, 3), "padding": "CIRCULAR", "strides": 2},
    {"kernel_size": (3, 3), "padding": "VALID", "input_dilation": (2, 1)},
    {"kernel_size": (3, 3), "padding": "SAME", "strides": (2, 3), "kernel_dilation": (1, 2)},
]
INNER = fj.Decoupled(terms=2)
METHODS = [
    fj.SpatialDecomposition(rank=3),
    fj.ChannelDecomposition(rank=3),
    fj.SpatialDecomposition(rank=3, inner=INNER),
    fj.ChannelDecomposition(rank=3, inner=INNER),
    fj.ChannelDecomposition(rank=4, inner=fj.SpatialDecomposition(rank=2)),
]
VOLUME = {"kernel_size": (2, 1, 3), "padding": "SAME", "strides": (1, 2, 2)}
CASES = [
    (m, g)
    # What the stages get of a geometry, they get with inner methods or without.
    if m.inner is None or g is GEOMETRIES[-1] or (m, g) == (METHODS[2], GEOMETRIES[1])
    else pytest.param(m, g, marks=pytest.mark.slow)
    for m in METHODS
    for g in GEOMETRIES
] + [
    (METHODS[1], VOLUME),
    (METHODS[1], {"kernel_size": (3,), "padding": "CAUSAL", "kernel_dilation": 2}),
]


def spec_of(geometry, m=4, n=5):
    return fj.ConvSpec(in_features=m, out_features=n, use_bias=False, **geometry)


@pytest.mark.parametrize(("method", "geometry"), CASES, ids=str)
def test_apply_is_the_convolution_with_the_kernel(method, geometry):
    spec = spec_of(geometry)
    spatial = (7, 8, 6)[: len(spec.kernel_size)]
    x = draw(2, *spatial, 4)

    @jax.jit  # one program a case
    def drawn(key, x):
        params = method.init(key, spec)
        return params, method.kernel(params, spec), method.apply(params, x, spec)

    params, kernel, y = drawn(jax.random.key(0), x)
    expected = standard_conv(x, kernel, spec)
    np.testing.assert_allclose(y, expected, atol=1e-5 * max(np.abs(expected).max(), 1))
    assert method.cost(spec, (*spatial, 4)).params == sum(v.size for v in params.values())


@pytest.mark.parametrize("geometry", GEOMETRIES[:3], ids=str)  # a fit knows only the taps
@pytest.mark.parametrize(
    "method", [fj.SpatialDecomposition(rank="full"), fj.ChannelDecomposition(rank="full")]
)
def test_full_rank_reproduces_the_kernel(method, geometry):
    spec = spec_of(geometry)
    kernel = draw(*spec.kernel_shape)
    params = fj.fit(kernel, method, spec=spec)
    assert fj.relative_error(kernel, method.kernel(params, spec)) < 1e-5


@pytest.mark.parametrize("rank", [1, 4, 9])
@pytest.mark.parametrize(
    ("method", "matrix"),
    [
        (fj.SpatialDecomposition, lambda k: k.transpose(0, 2, 1, 3).reshape(18, 24)),
        (fj.ChannelDecomposition, lambda k: k.reshape(54, 8)),
    ],
)
@pytest.mark.parametrize("m", [6, 40])
def test_every_rank_is_optimal(method, matrix, rank, m):
    """m = 40: matrices of more than 32 rows, for which LAPACK stands in for rotations."""
    if method is fj.ChannelDecomposition:
        rank = min(rank, 8)
    kernel = draw(3, 3, m, 8)
    rows = (
        matrix
        if m == 6
        else {
            fj.SpatialDecomposition: lambda k: k.transpose(0, 2, 1, 3).reshape(120, 24),
            fj.ChannelDecomposition: lambda k: k.reshape(360, 8),
        }[method]
    )
    values = np.linalg.svd(rows(float64(kernel)), compute_uv=False)
    spec = fj.ConvSpec.of_kernel(kernel.shape)
    built = float64(method(rank=rank).kernel(fj.fit(kernel, method(rank=rank)), spec))
    error = np.linalg.norm(float64(kernel) - built)
    optimum = np.sqrt((values[rank:] ** 2).sum())
    assert error == pytest.approx(optimum, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("ratio", [1.5, 2.0, 3.7])
@pytest.mark.parametrize(("h", "w", "m", "n"), [(3, 3, 64, 128), (5, 3, 48, 40)])
def test_a_budget_is_the_authors_formula(ratio, h, w, m, n):
    spec = fj.ConvSpec(kernel_size=(h, w), in_features=m, out_features=n)
    spatial = fj.SpatialDecomposition(rank=fj.Budget(ratio)).for_layer(spec)
    assert spatial.rank == int(m * n * h * w / (ratio * (h * m + w * n)))
    channels = fj.ChannelDecomposition(rank=fj.Budget(ratio)).for_layer(spec)
    assert channels.rank == min(int(m * n * h * w / (ratio * (h * w * m + n))), n)


def test_mult_adds_of_the_stages():
    spec = fj.ConvSpec(kernel_size=(3, 3), in_features=8, out_features=12, strides=(2, 2))
    cost = fj.SpatialDecomposition(rank=5).cost(spec, (16, 10, 8))
    vertical, horizontal = 8 * 10 * 3 * 8 * 5, 8 * 5 * 3 * 5 * 12
    assert cost.mult_adds == vertical + horizontal + 8 * 5 * 12
    assert cost.params == 3 * 8 * 5 + 3 * 5 * 12 + 12
    cost = fj.ChannelDecomposition(rank=5).cost(spec, (16, 10, 8))
    assert cost.mult_adds == 8 * 5 * (9 * 8 * 5 + 5 * 12 + 12)
    inner = fj.ChannelDecomposition(rank=5, inner=fj.Decoupled(terms=2)).cost(spec, (16, 10, 8))
    decoupled = 2 * (160 * 8 * 5 + 40 * 9 * 5)
    assert inner.mult_adds == decoupled + 40 * (5 * 12 + 12)


def test_energy_gives_the_smallest_rank_that_keeps_it():
    kernel = draw(3, 3, 20, 24)
    spec = fj.ConvSpec.of_kernel(kernel.shape)
    values = np.linalg.svd(float64(kernel).transpose(0, 2, 1, 3).reshape(60, 72), compute_uv=False)
    shares = (values**2).cumsum() / (values**2).sum()
    decided = fj.SpatialDecomposition(rank=fj.Energy(0.9)).for_layer(spec, kernel[None])
    assert decided.rank == int(np.argmax(shares >= 0.9)) + 1


def test_inner_methods_get_the_factors():
    kernel = draw(3, 3, 12, 16)
    spec = fj.ConvSpec.of_kernel(kernel.shape)
    plain = fj.fit(kernel, fj.SpatialDecomposition(rank=6))
    both = fj.SpatialDecomposition(rank=6, inner=fj.Decoupled(energy=0.9))
    decided = both.for_layer(spec, kernel[None])
    inner = [fj.Decoupled(energy=0.9) for _ in range(2)]
    for (name, stage), method in zip(decided.specs(spec, 6).items(), inner, strict=True):
        expected = method.for_layer(stage, plain[name][None])
        assert expected in decided.inner
        found = {
            key.removeprefix(f"{name}_"): value
            for key, value in fj.fit(kernel, both).items()
            if key.startswith(name)
        }
        np.testing.assert_allclose(
            expected.kernel(found, stage),
            expected.kernel(fj.fit(plain[name], expected), stage),
            atol=1e-5,
        )


def test_plain_data_describes_the_same_method():
    kernel = draw(3, 3, 12, 16)
    spec = fj.ConvSpec.of_kernel(kernel.shape)
    method = fj.ChannelDecomposition(inner=fj.SpatialDecomposition(inner=fj.Decoupled(terms=2)))
    decided = method.for_layer(spec, kernel[None])
    for value in (fj.ChannelDecomposition(rank=3, inner=fj.Decoupled(terms=2)), decided):
        data = json.loads(json.dumps(value.options()))
        assert fj.get_method("channel_decomposition", **data) == value
    assert decided.label() == (
        "channel_decomposition 6 > spatial_decomposition 6 > decoupled pw-dw 2"
    )
    assert fj.SpatialDecomposition(inner="falcon").inner == fj.Falcon()
    given = {"method": "channel_decomposition", "budget": 2, "inner": {"method": "falcon"}}
    assert method_from(given) == fj.ChannelDecomposition(rank=fj.Budget(2), inner=fj.Falcon())


@pytest.mark.parametrize(
    ("method", "geometry", "reason"),
    [
        (fj.SpatialDecomposition(rank=13), {}, "rank 13 is more than 12"),
        (fj.ChannelDecomposition(rank=7), {}, "rank 7 is more than 6"),
        (fj.SpatialDecomposition(rank=fj.Budget(50.0)), {}, "rank 1 has 30"),
        (fj.SpatialDecomposition(rank=2), {"kernel_size": (3, 1)}, "3x1 kernel has no height"),
        (fj.SpatialDecomposition(rank=2), {"kernel_size": (3,)}, "3 kernel has no height"),
        (fj.ChannelDecomposition(rank=2), {"kernel_size": (1, 1)}, "pointwise already"),
        (fj.ChannelDecomposition(rank=2), {"feature_group_count": 2}, "for one feature group"),
        (
            fj.SpatialDecomposition(rank=2, inner=fj.Decoupled(terms=4)),
            {},
            r"its vertical convolution cannot be Decoupled\(.*rank 4 is more than the 3 taps",
        ),
        (
            fj.ChannelDecomposition(rank=2, inner=fj.FilterSummary(ratio=4.0)),
            {},
            "its spatial convolution cannot be FilterSummary.* the ratio can be at most 2",
        ),
    ],
)
def test_what_cannot_be_replaced_has_a_reason(method, geometry, reason):
    spec = spec_of({"kernel_size": (3, 3)} | geometry, 4, 6)
    with pytest.raises(ValueError, match=reason):
        method.init(jax.random.key(0), spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is a whole number of at least 1"),
        ({"inner": "falcn"}, "no method is called 'falcn'.*Did you mean 'falcon'"),
        ({"inner": [fj.Falcon()]}, "one method or None for each stage"),
        ({"inner": {"rank": 2}}, "the name of a method is missing"),
        ({"inner": {"method": "falcon", "terms": 2}}, "'falcon' has no setting terms"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fj.SpatialDecomposition(**options)


def test_gradients_and_jit():
    spec = spec_of({"kernel_size": (3, 3)})
    method = fj.SpatialDecomposition(rank=3, inner=fj.Decoupled(terms=2))
    kernel = draw(3, 3, 4, 5)
    fitted = jax.jit(lambda k: method.kernel(method.fit(k, spec), spec))(kernel)
    direct = method.kernel(method.fit(kernel, spec), spec)
    np.testing.assert_allclose(fitted, direct, atol=1e-5)
    params = method.init(jax.random.key(0), spec)
    x = draw(2, 6, 6, 4)
    gradients = jax.jit(jax.grad(lambda p: jnp.sum(method.apply(p, x, spec) ** 2)))(params)
    assert all(np.any(g != 0) for g in gradients.values())


SLOW = [
    fj.SpatialDecomposition(rank="full", inner=fj.Decoupled(terms=3)),
    fj.ChannelDecomposition(rank="full", inner=fj.SpatialDecomposition(rank="full")),
    fj.SpatialDecomposition(rank=fj.Energy(0.8), inner=fj.Decoupled(energy=0.9)),
]
CHAINS = [
    fj.ChannelDecomposition(rank="full"),
    *(pytest.param(method, marks=pytest.mark.slow) for method in SLOW),
]


@pytest.mark.parametrize("method", CHAINS, ids=str)
def test_whole_models_of_both_frameworks(method, tmp_path):
    model = nnx.Sequential(conv(3, 6, rngs=nnx.Rngs(0)), jax.nn.relu, conv(6, 5, rngs=nnx.Rngs(1)))
    module = nn.Sequential([nn.Conv(6, (3, 3)), nn.relu, nn.Conv(5, (3, 3))])
    variables = {
        "params": {
            f"layers_{i}": {
                "kernel": model.layers[i].kernel[...],
                "bias": model.layers[i].bias[...],
            }
            for i in (0, 2)
        }
    }
    x, rules = images(), [fj.Rule(method=method)]
    plan = fj.make_plan(model, rules, x)
    plan.save(tmp_path / "plan.json")
    assert fj.Plan.load(tmp_path / "plan.json") == plan
    small = fj.compress(model, plan)
    counted = fj.profile(small, x)
    assert (counted.params, counted.mult_adds) == (plan.after.params, plan.after.mult_adds)
    if method.rank == "full":
        assert all(row.error < 1e-5 for row in plan.replaced)
        np.testing.assert_allclose(small(x), model(x), atol=1e-4)
    fj.save_compressed(tmp_path / "model", small, plan)
    loaded = fj.load_compressed(tmp_path / "model", lambda: nnx.clone(model))
    np.testing.assert_array_equal(loaded(x), small(x))
    linen_plan = fj.make_plan(module.bind(variables), rules, x)
    assert linen_plan.after == plan.after
    compressed, params = fj.compress(module.bind(variables), linen_plan).unbind()
    np.testing.assert_allclose(compressed.apply(params, x), small(x), atol=1e-4)
