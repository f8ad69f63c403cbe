import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.core import freeze, unfreeze
from flax.traverse_util import flatten_dict

import falcon_jax as fj
from tests.compression.linen_networks import NETWORKS, Block, Compact, Setup, drawn, inputs, shapes

FULL = [fj.Rule(method=fj.Falcon(rank="full"))]


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    module = NETWORKS[request.param]()
    return module, drawn(module)


def apply(module, variables, example=None, **options):
    example = inputs() if example is None else example
    return module.apply(variables, *example.args, **example.kwargs, **options)


def test_at_full_rank_the_outputs_are_the_same(network):
    module, variables = network
    before = jax.tree.map(np.copy, variables)
    expected = apply(module, variables)
    plan = fj.make_plan(module.bind(variables), FULL, inputs())
    small, compressed = fj.compress(module.bind(variables), plan).unbind()
    assert len(plan.replaced) >= 3
    assert all(row.error < 1e-5 for row in plan.replaced)
    scale = np.abs(expected).max()
    assert scale > 0.01
    np.testing.assert_allclose(apply(small, compressed), expected, atol=1e-5 * scale)
    jitted = jax.jit(lambda v: apply(small, v))(compressed)
    np.testing.assert_allclose(jitted, expected, atol=1e-5 * scale)
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    np.testing.assert_array_equal(apply(module, variables), expected)


def test_everything_but_the_kernels_is_carried_over(network):
    module, variables = network
    plan = fj.make_plan(module.bind(variables), FULL, inputs())
    _, compressed = fj.compress(module.bind(variables), plan).unbind()
    replaced = {f"params/{row.path}/kernel" for row in plan.replaced}
    old, new = flatten_dict(variables, sep="/"), flatten_dict(compressed, sep="/")
    assert set(old) - set(new) == replaced
    for name in set(old) & set(new):
        np.testing.assert_array_equal(old[name], new[name])


@pytest.mark.parametrize("rank", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_init_tree_and_counts_are_those_of_the_plan(network, rank):
    module, variables = network
    plan = fj.make_plan(module.bind(variables), [fj.Rule(method=fj.Falcon(rank=rank))], inputs())
    small, compressed = fj.compress(module.bind(variables), plan).unbind()
    made = jax.eval_shape(lambda: small.init(jax.random.key(0), *inputs().args, train=False))
    assert shapes(made) == shapes(compressed)
    counted = fj.profile(small.bind(compressed), inputs())
    assert (counted.params, counted.mult_adds) == (plan.after.params, plan.after.mult_adds)
    sizes = sum(leaf.size for leaf in jax.tree.leaves(compressed["params"]))
    assert counted.params == sizes
    before = fj.profile(module, inputs())
    assert (before.params, before.mult_adds) == (plan.before.params, plan.before.mult_adds)


def test_mult_adds_by_hand():
    plan = fj.make_plan(Compact(), sample=inputs())
    rows = {row.path: row for row in plan.rows}
    assert list(rows) == ["Conv_0", "Block_0/Conv_0", "grouped"]
    assert rows["Conv_0"].before == fj.Cost(params=75 * 4 + 4, mult_adds=16 * (75 * 4 + 4))
    assert rows["Block_0/Conv_0"].before.mult_adds == 16 * 9 * 16
    assert rows["grouped"].before.mult_adds == 16 * (9 * 2 * 8 + 8)
    assert plan.rest == fj.Cost(params=8 + 8 * 5 + 5, mult_adds=8 * 5 + 5)
    assert rows["Conv_0"].reason == "first convolution"


def test_layers_in_loops_count_every_time(network):
    module, variables = network
    profile = fj.profile(module.bind(variables), inputs())
    rows = {row.path: row for row in profile.rows}
    if "scanned/Conv_0" in rows:
        assert rows["scanned/Conv_0"].params == 3 * 9 * 16
        assert rows["scanned/Conv_0"].mult_adds == 64 * 3 * 9 * 16
        assert rows["vmapped"].mult_adds == 64 * 2 * (9 * 16 + 4)
    if "table_left" in rows:
        assert rows["table_left"].mult_adds == 2 * 64 * (9 * 16 + 4)


@pytest.mark.parametrize(
    "network",
    ["lifted", *(pytest.param(name, marks=pytest.mark.slow) for name in ("setup", "compact"))],
    indirect=True,
)
def test_training_with_batch_statistics_lowers_the_loss(network):
    module, variables = network
    plan = fj.make_plan(module.bind(variables), [fj.Rule(method=fj.Falcon())], inputs())
    small, compressed = fj.compress(module.bind(variables), plan).unbind()
    labels = jnp.array([1, 3])
    training = inputs(train=True)

    def loss(params, statistics, key):
        logits, updated = apply(
            small,
            {"params": params, **statistics},
            training,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updated

    params = compressed["params"]
    statistics = {"batch_stats": compressed["batch_stats"]}
    optimizer = optax.sgd(0.05)
    state = optimizer.init(params)

    @jax.jit
    def step(params, statistics, state):
        (value, statistics), gradients = jax.value_and_grad(loss, has_aux=True)(
            params, statistics, jax.random.key(0)
        )
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), statistics, state, value

    values = []
    for _ in range(4):
        params, statistics, state, value = step(params, statistics, state)
        values.append(float(value))
    assert values[-1] < values[0]
    assert not np.allclose(
        jax.tree.leaves(statistics)[0], jax.tree.leaves(compressed["batch_stats"])[0]
    )


class Detector(nn.Module):
    backbone: nn.Module

    @nn.compact
    def __call__(self, x, train=True):
        return nn.Dense(3, name="boxes")(self.backbone(x, train))


def test_a_compressed_module_inside_another(network):
    module, variables = network
    plan = fj.make_plan(module.bind(variables), FULL, inputs())
    small, compressed = fj.compress(module.bind(variables), plan).unbind()
    detector = Detector(small)
    made = drawn(detector)
    assert shapes(made["params"]["backbone"]) == shapes(compressed["params"])
    with_weights = {name: {**made[name], "backbone": tree} for name, tree in compressed.items()}
    original = {name: {**made[name], "backbone": tree} for name, tree in variables.items()}
    np.testing.assert_allclose(
        apply(detector, with_weights), apply(Detector(module), original), atol=1e-5
    )
    rows = {row.path: row.method for row in fj.profile(detector.bind(with_weights), inputs()).rows}
    assert all(rows[f"backbone/{row.path}"] == str(row.method) for row in plan.replaced)


def test_compressed_again_the_layers_are_listed_as_compressed():
    module = Compact()
    variables = drawn(module)
    only = [fj.Rule(path="grouped", method=fj.Falcon())]
    first = fj.make_plan(module.bind(variables), only, inputs())
    small, compressed = fj.compress(module.bind(variables), first).unbind()
    second = fj.make_plan(small.bind(compressed), [fj.Rule(method=fj.Falcon())], inputs())
    rows = {row.path: row for row in second.rows}
    assert rows["grouped"].reason.startswith("compressed already by Falcon(rank=1")
    assert {row.path for row in second.replaced} == {"Conv_0", "Block_0/Conv_0"}
    smaller, twice = fj.compress(small.bind(compressed), second).unbind()
    counted = fj.profile(smaller.bind(twice), inputs())
    assert (counted.params, counted.mult_adds) == (second.after.params, second.after.mult_adds)


class Two(nn.Module):
    def setup(self):
        self.first, self.second = nn.Conv(4, (3, 3)), nn.Conv(4, (3, 3))

    def __call__(self, x):
        return self.decode(self.encode(x))

    def encode(self, x):
        return nn.relu(self.first(x))

    def decode(self, x):
        return self.second(x)


def test_other_methods_can_be_called():
    x = inputs().args[0]
    variables = drawn(Two(), fj.Inputs(x))
    plan = fj.make_plan(Two().bind(variables), FULL, x)
    small, compressed = fj.compress(Two().bind(variables), plan).unbind()
    np.testing.assert_allclose(
        small.apply(compressed, "encode", x, method="call_method"),
        Two().apply(variables, x, method="encode"),
        atol=1e-5,
    )


class Stubborn(nn.Module):
    """A convolution for every reason to stay."""

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(3, (3, 3), mask=np.ones((3, 3, 3, 3), np.float32), name="masked")(x)
        y += OwnConv(3, (3, 3), name="own")(x)
        y += nn.ConvTranspose(3, (3, 3), name="transposed")(x)
        y += nn.WeightNorm(nn.Conv(3, (3, 3), name="normalised"))(x)
        boxed = nn.with_partitioning(nn.initializers.ones, (None, None, None, "model"))
        y += nn.Conv(3, (3, 3), kernel_init=boxed, name="boxed")(x)
        y += nn.Conv(3, (3, 3), conv_general_dilated=lambda *a, **k: 0 * x, name="function")(x)
        y += fj.linen.FalconConv(3, (3, 3), rank="full", name="falcon")(x)
        second = nn.vmap(
            nn.Conv,
            variable_axes={"params": 1},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=2,
        )
        return y + second(3, (3, 3), name="second_axis")(x).sum(0)


class OwnConv(nn.Conv):
    pass


def test_why_layers_stay():
    module, x = Stubborn(), inputs().args[0]
    variables = module.init(jax.random.key(0), x)
    plan = fj.make_plan(module.bind(variables), [fj.Rule(method=fj.Falcon())], x)
    assert {row.path: row.reason for row in plan.rows} == {
        "masked": "masked kernel",
        "own": "OwnConv is a subclass of linen.Conv and may act otherwise",
        "transposed": "transposed convolution",
        "normalised": "kernel computed in the call",
        "boxed": "kernel in a box of Flax metadata, such as its partitioning",
        "function": "own convolution function",
        "falcon": "compressed already by Falcon(rank=3, impl='auto')",
        "second_axis": "stacked along an axis other than the first",
    }
    assert plan.replaced == ()
    assert plan.after.params == sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def test_rank_by_energy_and_frozen_variables():
    module = Compact()
    variables = freeze(drawn(module))
    rule = fj.Rule(method=fj.Falcon(rank=fj.Energy(0.9)))
    plan = fj.make_plan(module.bind(variables), [rule], inputs())
    assert all(row.energy >= 0.9 - 1e-6 for row in plan.replaced)
    assert len({row.method.rank for row in plan.replaced}) > 1
    small = fj.compress(module.bind(variables), plan)
    np.testing.assert_allclose(
        small(*inputs().args, train=False),
        fj.compress(module.bind(unfreeze(variables)), plan)(*inputs().args, train=False),
    )
    with pytest.raises(ValueError, match="needs a trained kernel"):
        fj.make_plan(module, [rule], inputs())


def test_a_loaded_plan_makes_the_same_model(network, tmp_path):
    module, variables = network
    plan = fj.make_plan(module.bind(variables), [fj.Rule(method=fj.Falcon())], inputs())
    plan.save(tmp_path / "plan.json")
    loaded = fj.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    small, compressed = fj.compress(module.bind(variables), loaded).unbind()
    expected = apply(*fj.compress(module.bind(variables), plan).unbind())
    np.testing.assert_array_equal(apply(small, compressed), expected)


@pytest.mark.parametrize("solver", ["adamw", "random"])
def test_other_solvers(solver):
    module = Compact()
    variables = drawn(module)
    plan = fj.make_plan(module.bind(variables), sample=inputs(), solver=solver)
    small, compressed = fj.compress(module.bind(variables), plan).unbind()
    assert np.isfinite(apply(small, compressed)).all()


def test_latency_needs_variables():
    module = Block()
    variables = drawn(module)
    assert fj.profile(module.bind(variables), inputs(), latency=True).latency_ms > 0
    with pytest.raises(ValueError, match=r"module\.bind\(variables\)"):
        fj.profile(module, inputs(), latency=True)


def test_what_does_not_fit_is_refused():
    module = Setup()
    variables = drawn(module)
    with pytest.raises(ValueError, match="Give sample"):
        fj.make_plan(module)
    with pytest.raises(ValueError, match="Compact cannot be called on the sample"):
        fj.make_plan(Compact(), sample=jnp.ones((2, 8)))
    with pytest.raises(ValueError, match="not the variables of this Setup") as caught:
        fj.make_plan(module.bind(drawn(Compact())), None, inputs())
    assert "stem/kernel is missing" in str(caught.value)
    assert "Conv_0/kernel is not expected" in str(caught.value)
    plan = fj.make_plan(module.bind(variables), None, inputs())
    with pytest.raises(ValueError, match=r"module\.bind\(variables\)"):
        fj.compress(module, plan)
    with pytest.raises(ValueError, match="the model has no such convolution"):
        fj.compress(Compact().bind(drawn(Compact())), plan)
    variables["params"]["table_left"]["kernel"][0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"table_left.*not finite"):
        fj.make_plan(module.bind(variables), None, inputs())
    with pytest.raises(ValueError, match=r"table_left.*not finite"):
        fj.compress(module.bind(variables), plan)
    with pytest.raises(ValueError, match="no convolution"):
        fj.make_plan(nn.Dense(3), sample=jnp.ones((2, 8)))
