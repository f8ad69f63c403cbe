import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import falcon_jax as fj
from tests.compression.networks import (
    Nested,
    OwnConv,
    Scanned,
    Small,
    Vmapped,
    arrays,
    conv,
    forward,
    images,
    randomised,
    scaled,
)
from tests.nn.weights import WEIGHTS

FULL = [fj.Rule(method=fj.Falcon(rank=9), where=lambda spec: spec.taps > 1)]


def check_equal(model, small, x=None):
    x = images() if x is None else x
    expected = forward(model, x)
    assert float(jnp.abs(expected).max()) > 1e-2
    np.testing.assert_allclose(forward(small, x), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def nested():
    return randomised(Nested(nnx.Rngs(0)))


@pytest.fixture(scope="module")
def nested_at_full_rank(nested):
    before = arrays(nested)
    small = fj.compress(nested, fj.make_plan(nested, FULL))
    after = arrays(nested)
    assert before.keys() == after.keys()
    for path, array in before.items():
        np.testing.assert_array_equal(array, after[path], err_msg=path)
    return small


def test_at_full_rank_every_container_gives_the_same_outputs(nested, nested_at_full_rank):
    check_equal(nested, nested_at_full_rank)


def test_convolutions_are_replaced_in_every_container(nested, nested_at_full_rank):
    small = nested_at_full_rank
    replaced = [
        small.stem,
        small.blocks[0][0],
        small.sequence.layers[0],
        small.table["left"],
        small.pair[0],
        small.partial.args[0],
    ]
    assert {type(layer) for layer in replaced} == {fj.FalconConv}
    assert type(small.blocks[1][0]) is nnx.Conv
    assert type(small.own) is OwnConv
    assert type(small.up) is nnx.ConvTranspose
    assert type(nested.stem) is type(nested.partial.args[0]) is nnx.Conv


def test_shared_modules_stay_shared(nested, nested_at_full_rank):
    assert nested.table["right"] is nested.blocks[0][0]
    assert nested_at_full_rank.table["right"] is nested_at_full_rank.blocks[0][0]


def test_everything_else_is_carried_over_exactly(nested, nested_at_full_rank):
    before, after = arrays(nested), arrays(nested_at_full_rank)
    kept = {path for path in before if not path.endswith("kernel")}
    kept |= {path for path in before if path.split("/")[0] in ("head", "up", "own")}
    assert kept >= {"norm/scale", "norm/bias", "norm/mean", "norm/var", "stem/bias"}
    for path in kept:
        np.testing.assert_array_equal(after[path], before[path], err_msg=path)


def test_the_copy_shares_no_variable_with_the_original(nested, nested_at_full_rank):
    copy = fj.compress(nested, fj.make_plan(nested, FULL))
    before, hidden = arrays(nested), np.array(nested.partial.args[0].kernel[...])
    for _, module in nnx.iter_graph((copy, copy.partial.args[0])):
        if isinstance(module, nnx.Param):
            module[...] = jnp.zeros_like(module[...])
    for path, array in arrays(nested).items():
        np.testing.assert_array_equal(array, before[path], err_msg=path)
    np.testing.assert_array_equal(nested.partial.args[0].kernel[...], hidden)


def test_depthwise_separable_at_full_rank():
    model = randomised(Small(nnx.Rngs(0)))
    plan = fj.make_plan(model, [fj.Rule(method=fj.DepthwiseSeparable(rank=9))])
    small = fj.compress(model, plan)
    assert type(small.conv2) is fj.DepthwiseSeparableConv
    check_equal(model, small)


@pytest.mark.parametrize("network", [Scanned, Vmapped])
def test_stacked_convolutions(network):
    model = network(nnx.Rngs(0))
    rules = [
        fj.Rule(path="stem", method=None),
        fj.Rule(path="layers", method=fj.Falcon(rank=4)),
    ]
    plan = fj.make_plan(model, rules, images())
    small = fj.compress(model, plan)
    assert small.layers.pointwise.shape == (3, 4, 4, 4)
    assert small.layers.depthwise.shape == (3, 3, 3, 4, 4)
    check_equal(model, small)
    assert plan.rows[1].before.params == 3 * (9 * 4 * 4 + 4)
    assert plan.rows[1].before.mult_adds == 3 * 64 * (9 * 4 * 4 + 4)
    profile = fj.profile(small, images())
    assert profile.params == plan.after.params == sum(a.size for a in arrays(small).values())
    assert profile.mult_adds == plan.after.mult_adds


def test_rank_one_has_the_error_that_the_plan_says():
    model = randomised(Small(nnx.Rngs(0)))
    plan = fj.make_plan(model, [fj.Rule(method=fj.Falcon())])
    small = fj.compress(model, plan)
    for row in plan.rows:
        kernel = np.asarray(getattr(model, row.path).kernel, np.float64)
        layer = getattr(small, row.path)
        depthwise = np.asarray(layer.depthwise[...], np.float64)
        pointwise = np.asarray(layer.pointwise[...], np.float64)
        built = np.einsum("ijrn,mrn->ijmn", depthwise, pointwise)
        error = np.linalg.norm(kernel - built) / np.linalg.norm(kernel)
        assert row.error == pytest.approx(error, rel=1e-5)


def test_the_solvers_of_the_plan_and_of_the_call():
    model = randomised(Small(nnx.Rngs(0)))
    rules = [fj.Rule(method=fj.Falcon())]
    by_plan = fj.compress(model, fj.make_plan(model, rules, solver="random"))
    by_call = fj.compress(model, fj.make_plan(model, rules), solver="random")
    iterated = fj.compress(model, fj.make_plan(model, rules), solver="adamw")
    one, two = arrays(by_plan), arrays(by_call)
    for path in one:
        np.testing.assert_array_equal(one[path], two[path])
    again = fj.compress(model, fj.make_plan(model, rules), solver="random", key=jax.random.key(1))
    assert not np.array_equal(arrays(again)["conv1/depthwise"], one["conv1/depthwise"])

    def errors(small):
        return {
            name: float(
                fj.relative_error(
                    getattr(model, name).kernel[...],
                    fj.falcon_kernel(
                        getattr(small, name).depthwise[...], getattr(small, name).pointwise[...]
                    ),
                )
            )
            for name in ("conv1", "conv2")
        }

    optimum = {row.path: row.error for row in fj.make_plan(model, rules).rows}
    for name, error in errors(iterated).items():
        assert optimum[name] <= error * (1 + 1e-5)
        assert error < errors(by_plan)[name]


def test_layers_of_equal_geometry_fitted_together_keep_their_own_kernels():
    class Twins(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = conv(4, 4, rngs=rngs), conv(4, 4, rngs=rngs)

        def __call__(self, x):
            return self.b(self.a(x))

    model = Twins(nnx.Rngs(0))
    plan = fj.make_plan(model, [fj.Rule(method=fj.Falcon())], solver="adamw")
    small = fj.compress(model, plan)
    for name, other in (("a", "b"), ("b", "a")):
        layer = getattr(small, name)
        built = fj.falcon_kernel(layer.depthwise[...], layer.pointwise[...])
        errors = {key: fj.relative_error(getattr(model, key).kernel[...], built) for key in "ab"}
        # The paper's learning rate does not arrive in 600 steps; towards its own kernel it goes.
        assert float(errors[name]) < float(errors[other]) - 0.1


def test_a_compressed_model_is_listed_as_compressed_already():
    model = randomised(Small(nnx.Rngs(0)))
    small = fj.compress(model, fj.make_plan(model, [fj.Rule(method=fj.Falcon())]))
    plan = fj.make_plan(small)
    assert all("compressed already by Falcon(rank=1" in row.reason for row in plan.rows)
    assert plan.replaced == ()
    again = fj.compress(small, plan)
    for path, array in arrays(small).items():
        np.testing.assert_array_equal(arrays(again)[path], array)


def test_a_plan_of_another_model_is_refused():
    model = Small(nnx.Rngs(0))
    plan = fj.make_plan(model, [fj.Rule(method=fj.Falcon())])
    with pytest.raises(ValueError, match=r"'conv1', but the model has no such.*Make a plan"):
        fj.compress(Scanned(nnx.Rngs(0)), plan)
    with pytest.raises(ValueError, match="'conv1' is ConvSpec"):
        fj.compress(Small(nnx.Rngs(0), m=8), plan)
    small = fj.compress(model, plan)
    with pytest.raises(ValueError, match=r"'conv1'.*compressed already by Falcon.*Make a plan"):
        fj.compress(small, plan)
    model.conv1 = OwnConv(3, 4, (3, 3), rngs=nnx.Rngs(0), **WEIGHTS)
    with pytest.raises(ValueError, match=r"'conv1'.*OwnConv is a subclass"):
        fj.compress(model, plan)


def test_a_kernel_that_is_not_finite_is_refused_by_name():
    model = Small(nnx.Rngs(0))
    plan = fj.make_plan(model, [fj.Rule(method=fj.Falcon())])
    model.conv2.kernel[...] = model.conv2.kernel[...].at[0, 0, 0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=r"'conv2'.*not finite"):
        fj.compress(model, plan)


def test_a_model_that_is_a_convolution():
    model = conv(3, 4, rngs=nnx.Rngs(0))
    small = fj.compress(model, fj.make_plan(model, [fj.Rule(method=fj.Falcon(rank=3))]))
    assert type(small) is fj.FalconConv
    check_equal(model, small)


def test_training_mode_is_kept():
    model = Small(nnx.Rngs(0))
    plan = fj.make_plan(model, [fj.Rule(method=fj.Falcon())])
    model.train()
    assert not fj.compress(model, plan).norm1.use_running_average
    model.eval()
    assert fj.compress(model, plan).norm1.use_running_average


class Aliased(nnx.Module):
    """Convolutions used under two names, the first of them last in the alphabet."""

    def __init__(self, rngs):
        self.z = conv(3, 3, rngs=rngs)
        self.a = self.z
        self.partial = functools.partial(scaled, self.z, scale=0.5)
        self.blocks = nnx.List([nnx.Sequential(conv(3, 3, rngs=rngs), jax.nn.relu)])
        self.also = functools.partial(scaled, self.blocks[0], scale=2.0)

    def __call__(self, x):
        return self.also(self.blocks[0](self.partial(self.a(self.z(x)))))


def test_modules_under_several_names_are_one_whatever_the_names(tmp_path):
    model = Aliased(nnx.Rngs(0))
    plan = fj.make_plan(model, [fj.Rule(method=fj.Falcon(rank=1))], images())
    assert [row.path for row in plan.replaced] == ["a", "also/args/0/layers/0"]
    assert plan.after.mult_adds == 5 * 64 * (3 * 3 + 9 * 3 + 3)
    small = fj.compress(model, plan)
    assert type(small.z) is fj.FalconConv
    assert small.z is small.a is small.partial.args[0]
    assert small.blocks[0] is small.also.args[0]
    counted = fj.profile(small, images())
    assert (counted.params, counted.mult_adds) == (plan.after.params, plan.after.mult_adds)
    fj.save_compressed(tmp_path / "model", small, plan)
    loaded = fj.load_compressed(tmp_path / "model", lambda: Aliased(nnx.Rngs(1)))
    np.testing.assert_array_equal(loaded(images()), small(images()))
