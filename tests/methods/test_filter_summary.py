import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

import falcon_jax as fj
from tests.compression.networks import forward
from tests.methods.reference import float64, standard_conv
from tests.nn.weights import draw

GEOMETRIES = [
    {"kernel_size": (3, 2), "strides": (2, 1), "padding": ((1, 0), (2, 1))},
    {"kernel_size": (1, 1), "strides": 2},
    {"kernel_size": (3,), "padding": "CAUSAL", "kernel_dilation": 2},
    {"kernel_size": (3, 3), "feature_group_count": 2, "padding": "CIRCULAR"},
]
METHODS = [
    fj.FilterSummary(ratio=2.5),
    fj.FilterSummary(ratio=3, step="paper"),
    fj.FilterSummary(ratio=2.5, reorder=(4, 0, 5, 2, 1, 3)),
    fj.DifferentiableFilterSummary(ratio=2.5),
]


def spec_of(geometry, m=4, n=6):
    return fj.ConvSpec(in_features=m, out_features=n, use_bias=False, **geometry)


def locations_by_hand(n, length, step, order=None):
    """Python's whole numbers; where filter order[c] starts."""
    starts = [(c * length // (n if step == "even" else n - 1)) % length for c in range(n)]
    order = range(n) if order is None else order
    return [start for _, start in sorted(zip(order, starts, strict=True))]


def system(kernel_shape, ratio, step, order=None):
    """The matrix that takes a summary to the kernel in Flax's layout, entry by entry."""
    *size, m, n = kernel_shape
    k = m * math.prod(size)
    length = int(n * k / ratio)
    matrix = np.zeros((*kernel_shape, length))
    starts = locations_by_hand(n, length, step, order)
    for index in np.ndindex(*kernel_shape):
        *tap, channel, out = index
        flat = np.ravel_multi_index((channel, *tap), (m, *size))
        matrix[(*index, (starts[out] + flat) % length)] = 1
    return matrix.reshape(-1, length)


def params_of(method, spec):
    shapes = jax.eval_shape(lambda key: method.init(key, spec), jax.random.key(0))
    return {name: draw(*value.shape, seed=i) for i, (name, value) in enumerate(shapes.items())}


@pytest.mark.parametrize("step", ["even", "paper"])
@pytest.mark.parametrize("shape", [(1, 1, 8, 7), (3, 2, 3, 5), (5, 2, 4)])
@pytest.mark.parametrize("ratio", [1.0, 2.7])
def test_fits_are_the_least_squares(shape, step, ratio):
    kernel, method = draw(*shape), fj.FilterSummary(ratio=ratio, step=step)
    spec = fj.ConvSpec.of_kernel(shape)
    params = fj.fit(kernel, method)
    matrix = system(shape, ratio, step)
    expected, *_ = np.linalg.lstsq(matrix, float64(kernel).ravel(), rcond=None)
    np.testing.assert_allclose(params["summary"], expected, atol=1e-6)
    np.testing.assert_allclose(
        method.kernel(params, spec).ravel(), matrix @ expected, atol=1e-6, rtol=1e-5
    )


def test_fits_in_feature_groups_and_in_half_precision():
    spec = spec_of({"kernel_size": (3, 3), "feature_group_count": 2})
    method = fj.FilterSummary(ratio=3)
    kernel = draw(3, 3, 2, 6, dtype=jnp.bfloat16)
    summary = fj.fit(kernel, method, spec=spec)["summary"]
    assert summary.dtype == jnp.bfloat16
    matrix = system(kernel.shape, 3, "even")
    expected, *_ = np.linalg.lstsq(matrix, float64(kernel).ravel(), rcond=None)
    np.testing.assert_allclose(float64(summary), expected, rtol=4e-3)


def test_fits_under_jit_and_vmap_are_those_one_by_one():
    kernels, method = draw(2, 3, 3, 4, 6), fj.FilterSummary(ratio=3)
    together = jax.jit(jax.vmap(lambda kernel: fj.fit(kernel, method)))(kernels)["summary"]
    for kernel, summary in zip(kernels, together, strict=True):
        np.testing.assert_allclose(summary, fj.fit(kernel, method)["summary"], atol=1e-6)


def test_segments_of_a_large_layer_start_where_whole_numbers_say():
    # Rounded division goes wrong here: 511 * 589,824 is beyond float32.
    spec = fj.ConvSpec(kernel_size=(3, 3), in_features=512, out_features=512, use_bias=False)
    for step in ("even", "paper"):
        found = fj.FilterSummary(ratio=4.0, step=step).locations(spec)
        assert found.tolist() == locations_by_hand(512, 589_824, step)
    assert found[-1] == found[0] == 0


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_apply_is_the_convolution_with_the_kernel(method, geometry):
    spec = spec_of(geometry)
    params = params_of(method, spec)
    x = draw(2, *(7, 8)[: len(spec.kernel_size)], 4)
    kernel = method.kernel(params, spec)
    assert kernel.shape == spec.kernel_shape
    y = method.apply(params, x, spec)
    np.testing.assert_allclose(y, standard_conv(x, kernel, spec), atol=2e-5)
    if isinstance(method, fj.FilterSummary):
        order = method.reorder or None
        matrix = system(spec.kernel_shape, method.ratio, method.step, order)
        np.testing.assert_array_equal(kernel.ravel(), matrix @ float64(params["summary"]))


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_costs(method, geometry):
    spec = fj.ConvSpec(in_features=4, out_features=6, **geometry)
    shape = (*(7, 8)[: len(spec.kernel_size)], 4)
    cost = method.cost(spec, shape)
    assert cost.params == sum(p.size for p in params_of(method, spec).values()) + 6
    assert cost.mult_adds == fj.standard_cost(spec, shape).mult_adds


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_gradients(method):
    spec = spec_of({"kernel_size": (3, 3), "padding": "VALID"})
    params = params_of(method, spec)
    if "shift" in params:
        # Away from whole positions, where interpolation has a kink.
        share = method.locations(params, spec) % 1
        assert 0.02 < float(share.min()) < float(share.max()) < 0.98
    x = draw(1, 4, 4, 4, seed=5)
    run = jax.jit(lambda params, x: method.apply(params, x, spec))
    check_grads(run, (params, x), order=1, modes=("rev",), rtol=2e-2, atol=2e-2, eps=1e-3)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_initialisation(method):
    spec = spec_of({"kernel_size": (3, 3)}, 32)
    params = method.init(jax.random.key(0), spec)
    bound = 1 / math.sqrt(9 * 32)
    assert params["summary"].shape == (int(6 * 9 * 32 / method.ratio),)
    assert 0.98 * bound < float(np.abs(params["summary"]).max()) <= bound
    assert not np.any(params.get("shift", 0))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_options_are_plain_data(method):
    options = json.loads(json.dumps(method.options()))
    assert fj.get_method(method.name, **options) == method
    assert hash(fj.get_method(method.name, **options)) == hash(method)


def shuffled(step=9, n=8):
    """Filters that fit exactly in another order."""
    spec = fj.ConvSpec.of_kernel((3, 3, 2, n))
    order = tuple(np.random.default_rng(1).permutation(n).tolist())
    method = fj.FilterSummary(ratio=2.0, reorder=order)
    return spec, method.kernel({"summary": draw(step * n, seed=2)}, spec)


def test_reordered_filters_that_fit_together_are_reproduced():
    spec, kernel = shuffled()
    as_it_is = fj.FilterSummary(ratio=2.0)
    assert fj.relative_error(kernel, as_it_is.kernel(fj.fit(kernel, as_it_is), spec)) > 0.3
    method = fj.FilterSummary(ratio=2.0, reorder=True).for_layer(spec, kernel[None])
    assert fj.relative_error(kernel, method.kernel(fj.fit(kernel, method), spec)) < 1e-6
    assert method.for_layer(spec, kernel[None]) == method
    assert len(str(method)) < 60


@pytest.mark.parametrize("step", ["even", "paper"])
@pytest.mark.parametrize("seed", range(3))
def test_reordering_lowers_the_error(step, seed):
    kernel = draw(3, 3, 4, 16, seed=seed)
    spec = fj.ConvSpec.of_kernel(kernel.shape)
    errors = []
    for reorder in (False, True):
        method = fj.FilterSummary(step=step, reorder=reorder).for_layer(spec, kernel[None])
        errors.append(fj.relative_error(kernel, method.kernel(fj.fit(kernel, method), spec)))
    assert errors[1] < 0.99 * errors[0]


def test_an_order_that_is_no_better_is_not_taken():
    kernel = draw(3, 3, 4, 6)
    spec = fj.ConvSpec.of_kernel(kernel.shape)
    exact = fj.FilterSummary(ratio=1, reorder=True)
    assert exact.for_layer(spec, kernel[None]) == fj.FilterSummary(ratio=1)


def test_a_stack_of_layers_has_one_order():
    spec, kernel = shuffled()
    stack = jnp.stack([kernel, -2 * kernel])
    method = fj.FilterSummary(ratio=2.0, reorder=True).for_layer(spec, stack)
    for layer in stack:
        assert fj.relative_error(layer, method.kernel(fj.fit(layer, method), spec)) < 1e-6


def test_an_order_that_is_not_decided():
    spec, kernel = shuffled()
    method = fj.FilterSummary(ratio=2.0, reorder=True)
    assert method.for_layer(spec) == fj.FilterSummary(ratio=2.0)
    with pytest.raises(ValueError, match=r"use method\.for_layer\(spec, kernel\[None\]\)"):
        fj.fit(kernel, method)
    with pytest.raises(ValueError, match="cannot be found under jit"):
        jax.jit(lambda k: method.for_layer(spec, k).kernel(fj.fit(k[0], method), spec))(
            kernel[None]
        )


@pytest.mark.parametrize("shape", [(3, 3, 4, 6), (1, 1, 3, 8), (3, 3, 64, 64)])
def test_differentiable_starts_from_the_fit_at_even_locations(shape):
    kernel, spec = draw(*shape), fj.ConvSpec.of_kernel(shape)
    even, method = fj.FilterSummary(ratio=3), fj.DifferentiableFilterSummary(ratio=3)
    expected = even.kernel(fj.fit(kernel, even), spec)
    params = fj.fit(kernel, method)
    np.testing.assert_allclose(method.kernel(params, spec), expected, atol=1e-6)
    half = {name: value.astype(jnp.bfloat16) for name, value in params.items()}
    np.testing.assert_array_equal(
        method.kernel(half, spec), even.kernel({"summary": _turned_back(half, spec)}, spec)
    )


def _turned_back(params, spec):
    length = params["summary"].size
    return jnp.roll(params["summary"], -(length // (2 * spec.out_features)))


def test_differentiable_interpolates_between_whole_positions():
    spec, method = spec_of({"kernel_size": (3, 3)}), fj.DifferentiableFilterSummary(ratio=2.5)
    params = params_of(method, spec)
    summary, length = float64(params["summary"]), int(6 * 36 / 2.5)
    offset = length // 12
    starts = (np.array(locations_by_hand(6, length, "even")) + offset) / length
    logits = np.log(starts / (1 - starts)) + float64(params["shift"])
    expected = []
    for place in length / (1 + np.exp(-logits)):
        low, share = int(place), place % 1
        pairs = [summary[np.arange(at, at + 36) % length] for at in (low, low + 1)]
        expected.append((1 - share) * pairs[0] + share * pairs[1])
    expected = np.stack(expected).reshape(6, 4, 3, 3).transpose(2, 3, 1, 0)
    np.testing.assert_allclose(method.kernel(params, spec), expected, atol=1e-4)


def test_every_location_can_be_learned_from_the_start():
    kernel, method = draw(3, 3, 4, 6), fj.DifferentiableFilterSummary(ratio=3)
    spec, params = fj.ConvSpec.of_kernel(kernel.shape), fj.fit(kernel, method)
    gradient = jax.grad(lambda p: jnp.sum((method.kernel(p, spec) - kernel) ** 2))(params)
    assert float(np.abs(gradient["shift"]).min()) > 1e-2


@pytest.mark.parametrize(
    "method",
    [
        fj.FilterSummary(ratio=4, reorder=True),
        pytest.param(fj.DifferentiableFilterSummary(ratio=4), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_whole_models(method, tmp_path):
    model = fj.models.VGG(((8,), (16, 16)), num_classes=10, hidden=8, rngs=nnx.Rngs(0))
    x = draw(2, 8, 8, 3)
    plan = fj.make_plan(model, [fj.Rule(method=method)], x)
    assert len(plan.replaced) == 3
    assert all(0 < row.error < 1 for row in plan.replaced)
    plan.save(tmp_path / "plan.json")
    assert fj.Plan.load(tmp_path / "plan.json") == plan
    small = fj.compress(model, plan)
    counted = fj.profile(small, x)
    assert (counted.params, counted.mult_adds) == (plan.after.params, plan.after.mult_adds)
    assert counted.mult_adds == plan.before.mult_adds
    floats = jax.tree.leaves(nnx.state(small, nnx.Param))
    assert {leaf.dtype for leaf in floats} == {jnp.dtype(jnp.float32)}
    for row in plan.replaced[:2]:
        trained = dict(nnx.iter_modules(model))[_parts(row.path)].kernel[...]
        layer = dict(nnx.iter_modules(small))[_parts(row.path)]
        error = fj.relative_error(trained, layer.method.kernel(layer.params, row.spec))
        assert float(error) == pytest.approx(row.error, rel=1e-4)
    small.eval()
    assert np.isfinite(forward(small, x)).all()


def _parts(path):
    return tuple(int(part) if part.isdigit() else part for part in path.split("/"))


@pytest.mark.parametrize("method_class", [fj.FilterSummary, fj.DifferentiableFilterSummary])
def test_why_a_convolution_cannot_be_replaced(method_class):
    spec = spec_of({"kernel_size": (3, 3)})
    assert method_class(ratio=6).supports(spec) is None
    for ratio, length in ((6.1, 35), (1000.0, 0)):
        reason = f"leaves {length} weights, fewer than the 36 of one filter; .* at most 6"
        with pytest.raises(ValueError, match=reason):
            method_class(ratio=ratio).require(spec)
    model = fj.models.vgg8_cifar(rngs=nnx.Rngs(0), width=0.25)
    plan = fj.make_plan(model, [fj.Rule(method=method_class(ratio=10))], solver="random")
    stays = {row.path: row.reason for row in plan.rows if row.method is None}
    assert all("ratio can be at most 8" in reason for reason in stays.values())
    assert set(stays) == {"stages/0/0/conv", "stages/0/1/conv"}


def test_settings_that_make_no_sense():
    for ratio in (0.9, 0, -1.0, math.nan, math.inf, True):
        for method_class in (fj.FilterSummary, fj.DifferentiableFilterSummary):
            with pytest.raises(ValueError, match="finite number of at least 1; got"):
                method_class(ratio=ratio)
    for reorder in ((0, 0, 1), (), (1, 2)):
        with pytest.raises(ValueError, match="every filter's number once; got"):
            fj.FilterSummary(reorder=reorder)
    spec = spec_of({"kernel_size": (3, 3)})
    with pytest.raises(ValueError, match="reorder has 2 filters, the convolution 6"):
        fj.FilterSummary(reorder=(1, 0)).require(spec)
