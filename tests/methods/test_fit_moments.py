"""Fits to moments against L-BFGS in float64 from random starts, for every method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import falcon_jax as fj
from falcon_jax.solvers.moments import Moments, best_bias, explained, quadratics
from falcon_jax.solvers.patches import no_moments

PLAIN = fj.ConvSpec(kernel_size=(2, 2), in_features=3, out_features=4)
GROUPS = fj.ConvSpec(kernel_size=(3,), in_features=6, out_features=6, feature_group_count=2)
METHODS = {
    "falcon 1": (fj.Falcon(rank=1), PLAIN),
    "falcon 2": (fj.Falcon(rank=2), PLAIN),
    "falcon in groups": (fj.Falcon(rank=1), GROUPS),
    "separable 1": (fj.DepthwiseSeparable(rank=1), PLAIN),
    "separable in groups": (fj.DepthwiseSeparable(rank=2), GROUPS),
    "decoupled": (fj.Decoupled(terms=2), PLAIN),
    "spatial": (fj.SpatialDecomposition(rank=3), PLAIN),
    "channels": (fj.ChannelDecomposition(rank=2), PLAIN),
    "channels, decoupled": (fj.ChannelDecomposition(rank=3, inner=fj.Decoupled(terms=2)), PLAIN),
    "tucker": (fj.Tucker(rank=(2, 3)), PLAIN),
    "cp": (fj.CP(rank=3), PLAIN),
    "train": (fj.TensorTrain(rank=2), PLAIN),
    "summary": (fj.FilterSummary(ratio=2.0), PLAIN),
    "summary in groups": (fj.FilterSummary(ratio=2.0), GROUPS),
    "learned summary": (fj.DifferentiableFilterSummary(ratio=2.0), PLAIN),
}
# What one linear factor decides, or a singular value decomposition, has one optimum.
EXACT = ("channels", "summary", "summary in groups", "learned summary")
QUICK = ("falcon 1", "separable in groups", "channels", "summary in groups")
# Of each of these another one has the method, and another one the groups or the chain.
ALIKE = ("falcon 2", "falcon in groups", "separable 1", "channels, decoupled", "summary")
DIFFERENT = [pytest.param(n, marks=pytest.mark.slow) if n in ALIKE else n for n in METHODS]


def single(a):
    return jnp.asarray(a, jnp.float32)


def moments_and_kernel(spec, *, points=200, kind="plain", seed=1):
    """Moments of points whose answers are nearly those of a kernel, in float64 sums."""
    rng = np.random.default_rng(seed)
    groups, inputs = spec.feature_group_count, spec.taps * spec.group_in_features
    mix = rng.normal(size=(inputs, inputs)) * np.exp(-np.arange(inputs) / 5)[:, None]
    x = rng.normal(size=(groups, points, inputs)) @ mix + 0.3
    if kind == "dead":
        x.reshape(groups, points, spec.taps, -1)[..., 1] = 0
    kernel = rng.normal(size=(inputs, groups, spec.out_features // groups))
    noisy = kernel + 0.3 * rng.normal(size=kernel.shape)
    y = np.einsum("gsi,ign->gsn", x, noisy) + 0.5
    x_rest, y_rest = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    moments = Moments(
        count=jnp.asarray(float(points)),
        input_mean=single(x.mean(1)),
        target_mean=single(y.mean(1)),
        second=single(np.einsum("gsi,gsj->gij", x_rest, x_rest) / points),
        cross=single(np.einsum("gsi,gsn->gin", x_rest, y_rest) / points),
        variance=single(y_rest.var(1)),
    )
    return moments, jnp.asarray(kernel.reshape(spec.kernel_shape), jnp.float32)


def error(problems, kernel, spec):
    weights = np.asarray(kernel, np.float64).reshape(-1, len(problems), problems[0].outputs)
    return sum(problem(weights[:, g]) for g, problem in enumerate(problems))


def least(method, spec, problems, shapes, fixed, starts=20):
    """Return the least error that L-BFGS finds from random starts."""
    rng = np.random.default_rng(2)
    metric = np.stack([p.metric for p in problems])
    linear = np.stack([p.linear for p in problems])
    sizes = np.cumsum([np.prod(s) for s in shapes.values()])

    with jax.enable_x64(True):

        @jax.jit
        @jax.value_and_grad
        def of(flat):
            parts = jnp.split(flat, sizes[:-1])
            params = {n: p.reshape(s) for (n, s), p in zip(shapes.items(), parts, strict=True)}
            w = method.kernel(params | fixed, spec)
            w = w.reshape(metric.shape[1], len(problems), -1).swapaxes(0, 1)
            return jnp.sum(w * (metric @ w - 2 * linear))

        def numbers(flat):
            return tuple(np.asarray(a, np.float64) for a in of(flat))

        found = min(
            scipy.optimize.minimize(
                numbers, rng.normal(size=sizes[-1]), jac=True, options={"maxiter": 500}
            ).fun
            for _ in range(starts)
        )
    return found + sum(p.constant for p in problems)


@pytest.mark.parametrize("kind", ["plain", pytest.param("dead", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in METHODS]
)
def test_the_fit_is_as_near_as_the_best_of_many_starts(name, kind):
    method, spec = METHODS[name]
    moments, kernel = moments_and_kernel(spec, kind=kind)
    params = method.fit_moments(kernel, spec, moments)
    problems = quadratics(moments, kernel)
    found = error(problems, method.kernel(params, spec), spec)
    names = method.factors(spec)
    shapes = {n: params[n].shape for n in sorted(names)}
    fixed = {n: np.asarray(v, np.float64) for n, v in params.items() if n not in names}
    best = least(method, spec, problems, shapes, fixed, starts=3 if name in EXACT else 20)
    assert found <= best * (1 + (1e-5 if name in EXACT else 1e-2))


@pytest.mark.parametrize("name", DIFFERENT)
def test_more_steps_lower_the_error_and_types_and_shapes_are_those_of_fit(name):
    method, spec = METHODS[name]
    moments, kernel = moments_and_kernel(spec)
    problems = quadratics(moments, kernel)
    start = method.fit(kernel, spec)
    once = method.fit_moments(kernel, spec, moments, start)
    twice = method.fit_moments(kernel, spec, moments, once)
    errors = [error(problems, method.kernel(p, spec), spec) for p in (start, once, twice)]
    assert errors[1] < errors[0]
    assert errors[2] <= errors[1] * (1 + 1e-5)
    assert {n: v.shape for n, v in once.items()} == {n: v.shape for n, v in start.items()}
    half = method.fit_moments(kernel.astype(jnp.bfloat16), spec, moments, start)
    assert {v.dtype for v in half.values()} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("name", DIFFERENT)
def test_moments_of_nothing_give_the_fit_to_the_kernel(name):
    method, spec = METHODS[name]
    _, kernel = moments_and_kernel(spec)
    params = method.fit_moments(kernel, spec, no_moments(spec))
    assert all(np.isfinite(v).all() for v in params.values())
    far = np.linalg.norm(kernel - method.kernel(params, spec))
    plain = np.linalg.norm(kernel - method.kernel(method.fit(kernel, spec), spec))
    assert far <= plain * (1 + 1e-4) + 1e-5


def test_a_method_of_ones_own_takes_the_best_kernel():
    class Whole(fj.methods.Method):
        name = "whole"

        def supports(self, spec):
            return None

        def init(self, key, spec):
            return {"kernel": jax.random.normal(key, spec.kernel_shape)}

        def fit(self, kernel, spec):
            return {"kernel": kernel}

        def kernel(self, params, spec):
            return params["kernel"]

        def apply(self, params, x, spec):
            return fj.ops.conv(x, params["kernel"], **spec.geometry)

        def cost(self, spec, input_shape):
            return fj.standard_cost(spec, input_shape)

    moments, kernel = moments_and_kernel(PLAIN)
    params = Whole().fit_moments(kernel, PLAIN, moments)
    (problem,) = quadratics(moments, kernel)
    wanted = np.linalg.solve(problem.metric, problem.linear).reshape(kernel.shape)
    np.testing.assert_allclose(params["kernel"], wanted, rtol=1e-3, atol=1e-3)
    assert explained(moments, params["kernel"]) > 0.999
    means = moments.target_mean[0] - moments.input_mean[0] @ wanted.reshape(-1, 4)
    np.testing.assert_allclose(best_bias(moments, wanted), means, rtol=1e-4, atol=1e-4)


def test_moments_that_do_not_fit_are_refused():
    moments, kernel = moments_and_kernel(PLAIN)
    with pytest.raises(ValueError, match=r"the moments are of \(groups, inputs, outputs\)"):
        fj.Falcon().fit_moments(kernel, PLAIN, no_moments(GROUPS))
    damaged = jax.tree.map(lambda a: a * jnp.nan, moments)
    with pytest.raises(ValueError, match="moments are not finite"):
        fj.Falcon().fit_moments(kernel, PLAIN, damaged)
    with pytest.raises(ValueError, match="cannot replace"):
        fj.Falcon(rank=9).fit_moments(kernel, PLAIN, moments)
