import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import falcon_jax as fj
from falcon_jax.methods.fit import check_solver
from tests.methods.reference import built, fit_error, optimum
from tests.nn.weights import draw

METHODS = [fj.Falcon, fj.DepthwiseSeparable]

SHAPES_AND_RANKS = [
    ((3, 3, 3, 64), (1, 4)),
    ((3, 3, 64, 64), (1, 2, 8)),
    ((5, 5, 16, 24), (3,)),
    ((1, 7, 8, 8), (6,)),
    ((3, 16, 16), (1,)),
    ((3, 3, 3, 4, 6), (2,)),
]


def random_kernel(shape, seed=0):
    return draw(*shape, seed=seed)


def settle(params):
    """Wait for the arrays: one fit at a time on the few cores of the test machine."""
    return {name: np.asarray(value.astype(jnp.float32)) for name, value in params.items()}


@pytest.mark.parametrize("method_class", METHODS)
@pytest.mark.parametrize(
    ("shape", "rank"), [(shape, rank) for shape, ranks in SHAPES_AND_RANKS for rank in ranks]
)
def test_the_exact_fit_reaches_the_optimum_of_a_float64_svd(method_class, shape, rank):
    kernel, method = random_kernel(shape), method_class(rank=rank)
    params = settle(fj.fit(kernel, method))
    norm = np.linalg.norm(kernel)
    expected = optimum(kernel, method)
    error = fit_error(kernel, params, method)
    if expected < 1e-6 * norm:  # ranks from which on every kernel of this shape is exact
        assert error < 1e-5 * norm
    else:
        assert error == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method_class", METHODS)
@pytest.mark.parametrize("shape", [shape for shape, _ in SHAPES_AND_RANKS])
def test_as_many_terms_as_taps_reproduce_any_kernel(method_class, shape):
    kernel, method = random_kernel(shape, seed=1), method_class(rank=math.prod(shape[:-2]))
    params = settle(fj.fit(kernel, method))
    np.testing.assert_allclose(built(params, method), kernel, atol=1e-5)


@pytest.mark.parametrize("method_class", METHODS)
def test_the_fit_stands_inside_each_group(method_class):
    groups, kernel, method = 2, random_kernel((3, 3, 4, 8)), method_class(rank=2)
    spec = fj.ConvSpec(
        kernel_size=(3, 3), in_features=8, out_features=8, feature_group_count=groups
    )
    params = settle(fj.fit(kernel, method, spec=spec))
    assert fit_error(kernel, params, method, groups) == pytest.approx(
        optimum(kernel, method, groups), rel=1e-5
    )
    width = 8 // groups
    for group in range(groups):
        part = kernel[..., group * width : (group + 1) * width]
        alone = settle(fj.fit(part, method))
        np.testing.assert_allclose(
            built(params, method, groups)[..., group * width : (group + 1) * width],
            built(alone, method),
            atol=1e-5,
        )


@pytest.mark.parametrize("method_class", METHODS)
def test_zero_channels_give_zero_factors_and_leave_the_others_alone(method_class):
    kernel = random_kernel((3, 3, 9, 9))
    kernel = kernel.at[..., 3].set(0).at[:, :, 5].set(0)
    method = method_class(rank=2)
    params = settle(fj.fit(kernel, method))
    result = built(params, method)
    assert all(np.isfinite(value).all() for value in params.values())
    assert not result[..., 3].any()
    assert not result[:, :, 5].any()
    assert fit_error(kernel, params, method) == pytest.approx(optimum(kernel, method), rel=1e-5)


@pytest.mark.parametrize("method_class", METHODS)
def test_a_zero_kernel_gives_zeros(method_class):
    params = settle(fj.fit(jnp.zeros((3, 3, 9, 9)), method_class(rank=2)))
    assert not any(value.any() for value in params.values())


@pytest.mark.parametrize("method_class", METHODS)
@pytest.mark.parametrize("rank", [1, 2])
def test_repeated_singular_values(method_class, rank):
    rng = np.random.default_rng(0)
    blocks = [np.linalg.qr(rng.normal(size=(9, 9)))[0] for _ in range(9)]
    stacked = np.stack(blocks, axis=-1 if method_class is fj.Falcon else 1)
    kernel = jnp.asarray(stacked.reshape(3, 3, 9, 9), jnp.float32)
    method = method_class(rank=rank)
    params = settle(fj.fit(kernel, method))
    # Nine singular values of one in each of nine matrices.
    assert fit_error(kernel, params, method) == pytest.approx(math.sqrt(9 * (9 - rank)), rel=1e-5)


@pytest.mark.parametrize("method_class", METHODS)
@pytest.mark.parametrize("rank", [1, 2, 9])
def test_rank_deficient_kernels(method_class, rank):
    rng = np.random.default_rng(3)
    depthwise = rng.normal(size=(3, 3, 2, 9))
    if method_class is not fj.Falcon:
        depthwise = depthwise.swapaxes(2, 3)
    factors = {"depthwise": depthwise, "pointwise": rng.normal(size=(9, 2, 9))}
    kernel = jnp.asarray(built(factors, method_class(rank=2)), jnp.float32)
    method = method_class(rank=rank)
    params = settle(fj.fit(kernel, method))
    assert all(np.isfinite(value).all() for value in params.values())
    norm = np.linalg.norm(kernel)
    if rank == 1:
        assert fit_error(kernel, params, method) == pytest.approx(optimum(kernel, method), rel=1e-5)
    else:
        assert fit_error(kernel, params, method) < 1e-5 * norm


@pytest.mark.parametrize("method_class", METHODS)
@pytest.mark.parametrize("exponent", [-20, -9, 0, 20])
def test_scales(method_class, exponent):
    scale = 10.0**exponent
    kernel = random_kernel((3, 3, 9, 9)) * scale
    method = method_class(rank=2)
    params = settle(fj.fit(kernel, method))
    assert fit_error(kernel, params, method) == pytest.approx(optimum(kernel, method), rel=1e-5)
    # Split evenly: both factors grow with the square root of the scale.
    for value in params.values():
        assert 0.01 < np.abs(value).max() / math.sqrt(scale) < 100
    relative = fj.relative_error(
        kernel, method.kernel(fj.fit(kernel, method), fj.ConvSpec.of_kernel(kernel.shape))
    )
    expected = optimum(np.asarray(kernel, np.float64) / scale, method)
    norm = np.linalg.norm(np.asarray(kernel, np.float64) / scale)
    assert float(relative) == pytest.approx(expected / norm, rel=1e-5)


@pytest.mark.parametrize("method_class", METHODS)
def test_channels_of_very_different_scale(method_class):
    scales = 10.0 ** np.linspace(-18, 18, 9)
    axis = (1, 1, 1, 9) if method_class is fj.Falcon else (1, 1, 9, 1)
    kernel = random_kernel((3, 3, 9, 9)) * jnp.asarray(scales, jnp.float32).reshape(axis)
    method = method_class(rank=2)
    params = settle(fj.fit(kernel, method))
    difference = np.asarray(kernel, np.float64) - built(params, method)
    axes = (0, 1, 2) if method_class is fj.Falcon else (0, 1, 3)
    errors = np.sqrt((difference**2).sum(axis=axes))
    for channel in range(9):
        part = kernel[..., channel : channel + 1]
        if method_class is not fj.Falcon:
            part = kernel[:, :, channel : channel + 1]
        assert errors[channel] == pytest.approx(optimum(part, method), rel=1e-5)


@pytest.mark.parametrize(
    ("method_class", "dtype"),
    [(fj.Falcon, jnp.bfloat16), (fj.Falcon, jnp.float16), (fj.DepthwiseSeparable, jnp.bfloat16)],
)
def test_half_precision_kernels(method_class, dtype):
    kernel = random_kernel((3, 3, 9, 9)).astype(dtype)
    for rank in (1, 9):
        method = method_class(rank=rank)
        params = fj.fit(kernel, method)
        assert {value.dtype for value in params.values()} == {jnp.dtype(dtype)}
        rounding = float(jnp.finfo(dtype).eps) * np.linalg.norm(np.asarray(kernel, np.float32))
        error = fit_error(kernel, settle(params), method)
        assert optimum(kernel, method) * (1 - 1e-5) <= error
        assert error <= math.hypot(optimum(kernel, method), rounding)


@pytest.mark.parametrize("method_class", METHODS)
def test_a_stack_of_kernels_under_vmap_and_jit(method_class):
    kernels = random_kernel((3, 3, 4, 4))
    method = method_class(rank=1)
    together = settle(jax.jit(jax.vmap(lambda kernel: fj.fit(kernel, method)))(kernels))
    for index in range(3):
        params = {name: value[index] for name, value in together.items()}
        assert fit_error(kernels[index], params, method) == pytest.approx(
            optimum(kernels[index], method), rel=1e-5
        )


@pytest.mark.parametrize("method_class", METHODS)
def test_gradients_go_through_the_fit(method_class):
    rng = np.random.default_rng(0)
    # Well separated singular values, where the derivative is well conditioned.
    kernel = jnp.asarray(rng.normal(size=(3, 4, 4)), jnp.float32)
    spec = fj.ConvSpec.of_kernel(kernel.shape)
    method = method_class(rank=1)

    def rebuilt(kernel):
        return method.kernel(fj.fit(kernel, method, spec=spec), spec)

    check_grads(rebuilt, (kernel,), order=1, modes=("rev",), rtol=2e-2, atol=2e-2, eps=1e-2)


def test_random_is_the_initialisation_in_the_type_of_the_kernel():
    kernel, method = jnp.ones((3, 3, 4, 8), jnp.bfloat16), fj.Falcon(rank=2)
    params = fj.fit(kernel, method, "random", key=jax.random.key(7))
    initial = method.init(jax.random.key(7), fj.ConvSpec.of_kernel(kernel.shape))
    for name, value in params.items():
        assert value.dtype == jnp.bfloat16
        np.testing.assert_array_equal(value, initial[name].astype(jnp.bfloat16))


def test_adamw_starts_from_its_key_and_takes_the_steps_of_its_settings():
    kernel, method = random_kernel((3, 3, 4, 8)), fj.Falcon(rank=2)
    settings = fj.AdamWSettings(steps=3)
    for seed in range(2):
        key = jax.random.key(seed)
        start = method.init(key, fj.ConvSpec.of_kernel(kernel.shape))
        fitted = fj.fit(kernel, method, "adamw", key=key, settings=settings)
        moved = np.abs(fitted["pointwise"] - start["pointwise"]).max()
        assert 0 < moved < 1.1 * 3 * settings.learning_rate


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("solver", ["exact", "adamw", "random"])
def test_kernels_that_are_not_finite_are_refused(value, solver):
    kernel = jnp.ones((3, 3, 4, 8)).at[1, 1, 2, 3].set(value)
    with pytest.raises(ValueError, match="kernel holds values that are not finite"):
        fj.fit(kernel, fj.Falcon(), solver)


def test_a_kernel_of_another_spec_is_refused_with_both_shapes():
    spec = fj.ConvSpec(kernel_size=(3, 3), in_features=8, out_features=8, feature_group_count=2)
    with pytest.raises(ValueError, match=r"\(3, 3, 8, 8\).*\(3, 3, 4, 8\)"):
        fj.fit(jnp.ones((3, 3, 8, 8)), fj.Falcon(), spec=spec)
    with pytest.raises(ValueError, match=r"three axes or more; got \(8, 8\)"):
        fj.fit(jnp.ones((8, 8)), fj.Falcon())


@pytest.mark.parametrize("method_class", METHODS)
def test_more_terms_than_taps_are_refused(method_class):
    with pytest.raises(ValueError, match="rank 10 is more than the 9 taps"):
        fj.fit(jnp.ones((3, 3, 4, 8)), method_class(rank=10))


def test_a_pointwise_kernel_is_refused():
    with pytest.raises(ValueError, match="1x1 kernel has nothing to separate"):
        fj.fit(jnp.ones((1, 1, 4, 8)), fj.Falcon())


def test_an_unknown_solver_is_refused_and_the_known_ones_are_named():
    with pytest.raises(ValueError, match="exact, adamw, random; got 'svd'"):
        check_solver("svd")


@pytest.mark.parametrize("solver", ["exact", "random"])
def test_settings_are_of_adamw_only(solver):
    with pytest.raises(ValueError, match="settings are for solver='adamw'"):
        fj.fit(jnp.ones((3, 3, 4, 8)), fj.Falcon(), solver, settings=fj.AdamWSettings())


def test_relative_error_is_that_of_float64():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 3, 4, 8))
    expected = np.linalg.norm(a - b) / np.linalg.norm(a)
    a32, b32 = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    for scale in (1e-30, 1.0, 1e30):
        assert float(fj.relative_error(a32 * scale, b32 * scale)) == pytest.approx(
            expected, rel=1e-5
        )
    zeros = jnp.zeros((3, 3, 4, 8))
    assert float(fj.relative_error(zeros, zeros)) == 0
    ends = [(jnp.full(4, sign * 3.4e38), jnp.full(4, -1e38)) for sign in (1, -1)]
    ends.append((jnp.asarray(np.full(4, 1e-40, np.float32)), jnp.zeros(4)))
    for (a, b), expected in zip(ends, (4.4 / 3.4, 2.4 / 3.4, 1), strict=True):
        assert float(fj.relative_error(a, b)) == pytest.approx(expected, rel=1e-5)


EXTREMES = [("float32", 3.4e38), ("float32", 1e-40), ("bfloat16", 3.3e38), ("float16", 6.5e4)]
LINEAR = [
    fj.Falcon(),
    fj.DepthwiseSeparable(rank=4),
    fj.CP(rank=3),
    fj.Tucker(rank=(2, 3)),
    fj.FilterSummary(),
    fj.DifferentiableFilterSummary(),
    fj.SpatialDecomposition(rank=2, inner=fj.Falcon()),
]


def extreme_kernel(scale, dtype):
    kernel = np.random.default_rng(0).normal(size=(3, 3, 4, 6))
    return jnp.asarray((kernel / np.abs(kernel).max() * scale).astype(jnp.dtype(dtype)))


def error_of(params, kernel, method):
    """Return the relative error, in float64, at a scale where nothing is out of range."""
    spec = fj.ConvSpec.of_kernel(kernel.shape)
    wide = {name: np.asarray(value, np.float64) for name, value in params.items()}
    assert all(np.isfinite(value).all() for value in wide.values())
    k = np.asarray(kernel, np.float64)
    exponent = int(np.log2(np.abs(k).max()))
    name = method.factors(spec)[0]
    with jax.enable_x64(True):
        scaled = wide | {name: np.ldexp(wide[name], -exponent)}
        found = method.kernel({n: jnp.asarray(v) for n, v in scaled.items()}, spec)
    k = np.ldexp(k, -exponent)
    return np.linalg.norm(k - np.asarray(found)) / np.linalg.norm(k)


@pytest.mark.parametrize("method", LINEAR, ids=lambda method: method.label())
def test_kernels_at_the_ends_of_their_type_are_fitted_as_any_other(method):
    plain = extreme_kernel(1, "float32")
    expected = error_of(fj.fit(plain, method), plain, method)
    for dtype, scale in EXTREMES:
        kernel = extreme_kernel(scale, dtype)
        params = fj.fit(kernel, method)
        assert {value.dtype for value in params.values()} == {jnp.dtype(dtype)}
        assert error_of(params, kernel, method) == pytest.approx(expected, rel=0.01)


def test_traced_and_stacked_kernels_at_the_ends_of_their_type():
    large, small = extreme_kernel(3.4e38, "float32"), extreme_kernel(1e-30, "float32")
    method = fj.Falcon()
    together = jax.jit(jax.vmap(lambda kernel: fj.fit(kernel, method)))(jnp.stack([large, small]))
    for index, kernel in enumerate([large, small]):
        params = {name: value[index] for name, value in together.items()}
        expected = error_of(fj.fit(kernel, method), kernel, method)
        assert error_of(params, kernel, method) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("exponent", [126, -120, -140])
def test_adamw_fits_extreme_kernels_as_those_of_unit_size(exponent):
    unit, method = extreme_kernel(0.9, "float32"), fj.Tucker(rank=2)
    settings = fj.AdamWSettings(steps=2)
    kernel = jnp.asarray(np.ldexp(np.asarray(unit), exponent))
    params = fj.fit(kernel, method, "adamw", settings=settings)
    expected = error_of(fj.fit(unit, method, "adamw", settings=settings), unit, method)
    assert error_of(params, kernel, method) == pytest.approx(expected, rel=1e-2)


def test_a_rank_by_energy_does_not_depend_on_the_scale():
    method, ranks = fj.Falcon(rank=fj.Energy(0.9)), set()
    for scale in (1, 3.4e38, 1e-40):
        kernel = extreme_kernel(scale, "float32")
        ranks.add(method.for_layer(fj.ConvSpec.of_kernel(kernel.shape), kernel[None]).rank)
    matrices = np.float64(extreme_kernel(1, "float32")).reshape(9, 4, 6).transpose(2, 0, 1)
    energies = (np.linalg.svd(matrices, compute_uv=False) ** 2).sum(axis=0)
    kept = np.cumsum(energies) / energies.sum()
    assert ranks == {int(np.argmax(kept >= 0.9)) + 1}


def test_parameters_out_of_range_are_refused_where_no_factors_are_known():
    class Doubling(fj.FilterSummary):
        def factors(self, spec):
            return ()

        def fit(self, kernel, spec):
            return {"summary": 2 * super().fit(kernel, spec)["summary"]}

    with pytest.raises(ValueError, match=r"are not finite in float16.*a wider type"):
        fj.fit(jnp.full((3, 3, 4, 8), 6e4, jnp.float16), Doubling())
