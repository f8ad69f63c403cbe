import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import falcon_jax as fj
from tests.compression.networks import Nested, Scanned, Small, arrays, conv, images
from tests.methods.reference import optimum

SAMPLE = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)


class Varied(nnx.Module):
    """A convolution for every reason to stay; defined in another order than used."""

    def __init__(self, rngs):
        self.last = conv(4, 4, rngs=rngs)
        self.depthwise = conv(4, 4, feature_group_count=4, rngs=rngs)
        self.point = conv(4, 4, (1, 1), rngs=rngs)
        self.masked = conv(4, 4, mask=jnp.ones((3, 3, 4, 4)), rngs=rngs)
        self.first = conv(3, 4, rngs=rngs)
        self.unused = conv(4, 4, rngs=rngs)

    def __call__(self, x):
        return self.last(self.masked(self.point(self.depthwise(self.first(x)))))


@pytest.fixture(scope="module")
def varied():
    return Varied(nnx.Rngs(0))


def test_the_default_says_why_a_layer_stays(varied):
    plan = fj.make_plan(varied, sample=SAMPLE)
    rows = {row.path: row for row in plan.rows}
    assert list(rows) == ["first", "depthwise", "point", "masked", "last", "unused"]
    assert rows["first"].reason == "first convolution"
    assert rows["depthwise"].reason.startswith("would grow")
    assert rows["point"].reason == "a 1x1 kernel has nothing to separate"
    assert rows["masked"].reason == "masked kernel"
    assert {row.path for row in plan.replaced} == {"last", "unused"}
    assert {row.method for row in plan.replaced} == {fj.Falcon(rank=1)}
    for row in plan.rows:
        if row.method is None:
            assert (row.after, row.error) == (row.before, None)


def test_rules_are_obeyed_even_where_it_costs_more(varied):
    plan = fj.make_plan(varied, [fj.Rule(method=fj.Falcon())], SAMPLE)
    rows = {row.path: row for row in plan.rows}
    assert rows["first"].method == rows["depthwise"].method == fj.Falcon()
    assert rows["depthwise"].reason == "costs more than it saves"
    # One input channel a group: 4 (1 + 9) parameters instead of 4 * 9, and 4 biases.
    assert (rows["depthwise"].before.params, rows["depthwise"].after.params) == (40, 44)
    assert rows["masked"].method is None
    assert rows["point"].reason == "a 1x1 kernel has nothing to separate"


def test_rules_say_why_a_layer_stays(varied):
    rules = [fj.Rule(path="first", method=None), fj.Rule(path="last", method=fj.Falcon())]
    rows = {row.path: row for row in fj.make_plan(varied, rules, SAMPLE).rows}
    assert rows["first"].reason == "left alone by path='first'"
    assert rows["unused"].reason == "no rule matches"
    assert rows["last"].reason == ""


def test_costs_by_hand(varied):
    plan = fj.make_plan(varied, [fj.Rule(path="last", method=fj.Falcon(rank=2))], SAMPLE)
    last = next(row for row in plan.rows if row.path == "last")
    assert last.before == fj.Cost(params=9 * 16 + 4, mult_adds=64 * (9 * 16 + 4))
    assert last.after == fj.Cost(params=2 * 4 * 13 + 4, mult_adds=64 * (2 * 4 * 13 + 4))
    unused = next(row for row in plan.rows if row.path == "unused")
    assert unused.before == fj.Cost(params=9 * 16 + 4, mult_adds=0)
    assert plan.rest == fj.Cost(params=0, mult_adds=0)
    sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(varied, nnx.Param))]
    assert plan.before.params == sum(sizes)


@pytest.mark.parametrize("method", [fj.Falcon(rank=2), fj.DepthwiseSeparable()])
def test_errors_and_energies_are_those_of_a_float64_svd(method):
    model = Small(nnx.Rngs(0))
    plan = fj.make_plan(model, [fj.Rule(method=method)])
    assert not plan.traced
    for row in plan.rows:
        kernel = getattr(model, row.path).kernel[...]
        share = optimum(kernel, method) / np.linalg.norm(np.asarray(kernel, np.float64))
        assert row.error == pytest.approx(share, rel=1e-5)
        assert row.energy == pytest.approx(1 - share**2, rel=1e-5)


@pytest.mark.parametrize(
    ("dtype", "scale"), [("float32", 3.4e38), ("float32", 1e-40), ("float16", 6.5e4)]
)
def test_errors_of_kernels_at_the_ends_of_their_type(dtype, scale):
    model, method = conv(3, 8, param_dtype=dtype, rngs=nnx.Rngs(0)), fj.Falcon()
    kernel = np.random.default_rng(0).uniform(-1, 1, (3, 3, 3, 8))
    kernel[0, 0, 0, 0] = 1
    model.kernel[...] = jnp.asarray((kernel * scale).astype(dtype))
    (row,) = fj.make_plan(model, [fj.Rule(method=method)]).rows
    expected = optimum(kernel, method) / np.linalg.norm(kernel)
    assert row.error == pytest.approx(expected, rel=1e-3)


def test_errors_of_stacked_layers_are_over_the_whole_stack():
    model = Scanned(nnx.Rngs(0))
    plan = fj.make_plan(model, [fj.Rule(path="layers", method=fj.Falcon())])
    kernels = np.asarray(model.layers.kernel[...], np.float64)
    squares = sum(optimum(kernel, fj.Falcon()) ** 2 for kernel in kernels)
    row = next(row for row in plan.rows if row.path == "layers")
    assert row.error == pytest.approx(np.sqrt(squares) / np.linalg.norm(kernels), rel=1e-5)


def test_subclasses_and_transposed_convolutions_are_listed():
    model = nnx.eval_shape(lambda: Nested(nnx.Rngs(0)))
    rows = {row.path: row for row in fj.make_plan(model, sample=SAMPLE, solver="random").rows}
    assert "OwnConv is a subclass of nnx.Conv" in rows["own"].reason
    assert rows["up"].reason == "transposed convolution"
    assert rows["stem"].reason == "first convolution"
    assert {row.path for row in rows.values() if row.method} == {
        "blocks/0/0", "sequence/layers/0", "table/left", "pair/0", "partial/args/0",
    }  # fmt: skip
    # Used twice: at 8 x 8 and, behind the stride, at 4 x 4.
    assert rows["blocks/0/0"].before.mult_adds == (64 + 16) * (9 * 16 + 4)


@pytest.mark.parametrize("method", [fj.Falcon(rank=2), fj.DepthwiseSeparable()])
def test_the_totals_are_what_profile_counts_on_the_result(method):
    model = nnx.eval_shape(lambda: Nested(nnx.Rngs(0)))
    rules = [fj.Rule(method=method, where=lambda spec: spec.taps == 9)]
    plan = fj.make_plan(model, rules, SAMPLE, solver="random")
    assert [row.error for row in plan.replaced] == [None] * 6
    small = nnx.eval_shape(lambda model: fj.compress(model, plan), model)
    for network, cost in ((model, plan.before), (small, plan.after)):
        profile = fj.profile(network, SAMPLE)
        assert (profile.params, profile.mult_adds) == (cost.params, cost.mult_adds)


def test_a_model_without_convolutions_is_refused():
    with pytest.raises(ValueError, match="Linear has no convolution: there is nothing to compress"):
        fj.make_plan(nnx.eval_shape(lambda: nnx.Linear(3, 4, rngs=nnx.Rngs(0))))


def test_a_kernel_that_is_not_finite_is_refused_by_name():
    model = Small(nnx.Rngs(0))
    model.conv2.kernel[...] = model.conv2.kernel[...].at[0, 0, 0, 0].set(jnp.inf)
    with pytest.raises(ValueError, match=r"conv2.*not finite"):
        fj.make_plan(model)


@pytest.mark.parametrize("shape", [(2, 8, 8, 4), (3,)])
def test_a_sample_that_does_not_fit_is_refused(shape):
    model = nnx.eval_shape(lambda: Small(nnx.Rngs(0)))
    with pytest.raises(ValueError):
        fj.make_plan(model, sample=jax.ShapeDtypeStruct(shape, jnp.float32), solver="random")


def test_a_sample_without_arrays_is_refused():
    model = nnx.eval_shape(lambda: Small(nnx.Rngs(0)))
    with pytest.raises(ValueError, match="example input with a leading batch axis; got no array"):
        fj.make_plan(model, sample=(), solver="random")


def test_planning_changes_nothing():
    model = Small(nnx.Rngs(0))
    before, mode = arrays(model), model.norm1.use_running_average
    fj.make_plan(model, sample=images())
    after = arrays(model)
    for path, array in before.items():
        np.testing.assert_array_equal(array, after[path])
    assert model.norm1.use_running_average == mode
