"""Whole convolutions at full rank, both frameworks, over the grid of what they can be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import falcon_jax as fj
from tests.compression.networks import Small, conv, images

METHODS = (fj.Falcon(rank="full"), fj.DepthwiseSeparable(rank="full"))


@st.composite
def convolutions(draw):
    """Arguments of a convolution, and an input that it can take."""
    axes = draw(st.integers(1, 3))
    size = draw(st.tuples(*[st.sampled_from([1, 2, 3])] * axes).filter(lambda s: max(s) > 1))
    each = st.tuples(*[st.integers(1, 2)] * axes)
    named = ["SAME", "VALID", "CIRCULAR", "REFLECT"] + (["CAUSAL"] if axes == 1 else [])
    explicit = st.tuples(*[st.tuples(st.integers(0, 2), st.integers(0, 2))] * axes)
    padding = draw(st.sampled_from(named) | explicit)
    groups = draw(st.sampled_from([1, 2]))
    options = {
        "strides": draw(st.integers(1, 2) | each),
        "padding": padding,
        "kernel_dilation": draw(st.integers(1, 2) | each),
        "feature_group_count": groups,
        "use_bias": draw(st.booleans()),
        "dtype": draw(st.sampled_from([None, jnp.float32])),
        "precision": draw(st.sampled_from([None, "highest"])),
    }
    if not isinstance(padding, str):  # Flax's own convolutions refuse the others
        options["input_dilation"] = draw(st.integers(1, 2) | each)
    m, n = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    return size, m, n, options, draw(st.sampled_from(METHODS)), draw(st.integers(0, 99))


STRIDED = {"strides": (2, 1), "padding": "SAME", "kernel_dilation": 1, "feature_group_count": 2}
CAUSAL = {"strides": 2, "padding": "CAUSAL", "kernel_dilation": 2, "feature_group_count": 1}
SOLID = {
    "strides": 1,
    "padding": ((1, 0), (2, 2), (0, 0)),
    "input_dilation": 2,
    "feature_group_count": 3,
}


@pytest.mark.parametrize(
    ("size", "groups", "options", "method"),
    [
        ((3, 2), 2, STRIDED, METHODS[0]),
        ((3,), 1, CAUSAL, METHODS[-1]),
        ((2, 3, 1), 3, SOLID, METHODS[0]),
    ],
)
def test_at_full_rank_a_convolution_is_reproduced(size, groups, options, method):
    _check_reproduced(size, 2 * groups, 3 * groups, {"use_bias": True, **options}, method, 0)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(convolutions())
def test_at_full_rank_every_convolution_is_reproduced(case):
    _check_reproduced(*case)


def _check_reproduced(size, m, n, options, method, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, *(7, 6, 5)[: len(size)], m)).astype(np.float32)
    layer = nnx.Conv(m, n, size, rngs=nnx.Rngs(0), **options)
    layer.kernel[...] = jnp.asarray(rng.normal(size=layer.kernel.shape), jnp.float32)
    if layer.bias is not None:
        layer.bias[...] = jnp.asarray(rng.normal(size=n), jnp.float32)
    expected = np.asarray(layer(x))
    close = {"atol": 1e-5 * max(np.abs(expected).max(), 1), "rtol": 0}

    plan = fj.make_plan(layer, [fj.Rule(method=method)], x)
    small = fj.compress(layer, plan)
    assert type(small) in (fj.FalconConv, fj.DepthwiseSeparableConv)
    assert (small.dtype, small.precision) == (layer.dtype, layer.precision)
    np.testing.assert_allclose(small(x), expected, **close)
    assert fj.profile(small, x).mult_adds == plan.after.mult_adds

    module = nn.Conv(n, size, **options)
    variables = {"params": {"kernel": layer.kernel[...]}}
    if layer.bias is not None:
        variables["params"]["bias"] = layer.bias[...]
    linen_plan = fj.make_plan(module.bind(variables), [fj.Rule(method=method)], x)
    assert (linen_plan.before, linen_plan.after) == (plan.before, plan.after)
    compressed = fj.compress(module.bind(variables), linen_plan)
    np.testing.assert_allclose(compressed(x), expected, **close)


def test_rank_by_energy_is_the_smallest_that_reaches_it():
    model = Small(nnx.Rngs(0), m=6, n=8)
    plan = fj.make_plan(model, [fj.Rule(method=fj.Falcon(rank=fj.Energy(0.8)))], images())
    for row in plan.replaced:
        assert row.energy >= 0.8
        fewer = fj.Falcon(rank=row.method.rank - 1)
        other = fj.make_plan(model, [fj.Rule(path=row.path, method=fewer)])
        assert next(r for r in other.rows if r.path == row.path).energy < 0.8
        assert f"falcon {row.method.rank}" in str(plan)
    small = fj.compress(model, plan)
    assert fj.profile(small, images()).params == plan.after.params


@pytest.mark.parametrize("norm", [nnx.WeightNorm, nnx.SpectralNorm])
def test_kernels_normalised_in_every_call_stay(norm):
    model = nnx.Sequential(norm(conv(3, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)))
    plan = fj.make_plan(model, [fj.Rule(method=fj.Falcon())])
    assert [row.reason for row in plan.rows] == ["kernel normalised anew in every call"]


def test_keyword_arguments_reach_the_model():
    class Switched(nnx.Module):
        def __init__(self):
            self.conv = conv(3, 4, rngs=nnx.Rngs(0))

        def __call__(self, x, *, double):
            return self.conv(x) if not double else self.conv(self.conv(x)[..., :3])

    plans = [
        fj.make_plan(Switched(), sample=fj.Inputs(images(), double=double))
        for double in (False, True)
    ]
    assert plans[1].before.mult_adds == 2 * plans[0].before.mult_adds
    assert jax.tree.leaves(plans[0].inputs.args) == [jax.ShapeDtypeStruct((2, 8, 8, 3), "float32")]
