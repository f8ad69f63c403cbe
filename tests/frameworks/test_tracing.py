import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import falcon_jax as fj
from falcon_jax.frameworks.layers import Inputs
from falcon_jax.frameworks.linen import check_are_variables, find_layers
from tests.compression.test_profile import products

X = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype(np.float32)
RULES = [fj.Rule(method=fj.Falcon(rank=1))]


def init(module, **options):
    return module.init(jax.random.key(0), X, **options)


def reasons(module):
    return {layer.path: layer.obstacle for layer in find_layers(module, Inputs.of(X))}


class Computed(nn.Module):
    """Kernels that are not the variables at their convolutions' paths, beside one that is."""

    @nn.compact
    def __call__(self, x):
        twice = nn.map_variables(
            nn.Conv, "params", lambda p: jax.tree.map(lambda a: 2 * a, p), init=True
        )
        y = nn.Conv(3, (3, 3), name="plain")(x) + twice(3, (3, 3), name="twice")(x)
        y += nn.SpectralNorm(nn.Conv(3, (3, 3), name="spectral"))(x, update_stats=False)
        tied = nn.Conv(3, (3, 3), name="tied")
        y += tied(x) + jnp.sum(tied.get_variable("params", "kernel"))
        bank = self.param("bank", nn.initializers.lecun_normal(), (2, 3, 3, 3, 3))
        chosen = jax.lax.dynamic_index_in_dim(bank, 1, keepdims=False)
        function = nn.Conv(3, (3, 3), use_bias=False, parent=None)
        y += function.apply({"params": {"kernel": chosen}}, x)
        inner = nn.vmap(
            nn.Conv, {"params": 1}, split_rngs={"params": True}, in_axes=None, axis_size=3
        )
        outer = nn.vmap(
            nn.Conv, {"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=3
        )
        y += inner(3, (3, 3), name="on_axis_1")(x).sum(0)
        return y + outer(3, (3, 3), name="on_axis_0")(x).sum(0)


def test_only_kernels_that_are_their_variables_can_be_replaced():
    computed, other = "kernel computed in the call", "stacked along an axis other than the first"
    found = reasons(Computed())
    assert {path: found[path] for path in found if path not in ("", "SpectralNorm_0")} == {
        "plain": None,
        "twice": computed,
        "spectral": computed,
        "tied": "kernel used elsewhere in the call, too",
        "Conv": computed,
        "on_axis_1": other,
        "on_axis_0": None,
    }


@pytest.mark.slow
def test_what_is_left_alone_gives_the_same_outputs():
    module = Computed()
    variables = init(module)
    plan = fj.make_plan(module, [fj.Rule(method=fj.Falcon(rank="full"))], X, variables)
    assert {row.path for row in plan.replaced} == {"plain", "on_axis_0"}
    small, compressed = fj.compress(module, plan, variables)
    expected = module.apply(variables, X)
    np.testing.assert_allclose(small.apply(compressed, X), expected, atol=1e-4)


class ByMutable(nn.Module):
    @nn.compact
    def __call__(self, x):
        training = self.is_mutable_collection("batch_stats")
        x = nn.Conv(4, (3, 3), padding="same")(nn.Conv(4, (3, 3), padding="Valid")(x))
        return nn.BatchNorm(use_running_average=not training)(x)


def test_mutable_collections_as_the_switch_for_training():
    module = ByMutable()
    variables = init(module)
    variables["batch_stats"]["BatchNorm_0"]["mean"] = jnp.arange(4.0)
    expected = module.apply(variables, X)
    folded, new = fj.fold_batchnorm(module, X, variables)
    assert "batch_stats" not in new
    np.testing.assert_allclose(folded.apply(new, X), expected, atol=1e-5)
    assert [row.spec.padding for row in fj.make_plan(module, None, X).rows] == ["VALID", "SAME"]


def test_a_padding_of_ones_own_is_a_reason():
    def wrapped(x, kernel, strides, padding, **options):
        assert padding == "mirror"
        return jax.lax.conv_general_dilated(x, kernel, strides, "SAME", **options)

    convs = [nn.Conv(4, (3, 3), padding="mirror", conv_general_dilated=wrapped), nn.Conv(4, (3, 3))]
    rows = fj.make_plan(nn.Sequential(convs), RULES, X).rows
    assert [row.reason for row in rows] == ["own convolution function", ""]
    assert rows[0].before.mult_adds == 36 * (27 * 4 + 4)
    stray = nnx.eval_shape(lambda: nnx.Conv(3, 4, (3, 3), padding="mirror", rngs=nnx.Rngs(0)))
    (row,) = fj.make_plan(stray, RULES).rows
    assert row.reason.startswith("padding 'mirror' is not one of")


class Heads(nn.Module):
    def setup(self):
        self.a, self.b, self.head = nn.Conv(4, (3, 3)), nn.Conv(4, (3, 3)), nn.Dense(2)

    def __call__(self, x):
        return self.b(self.a(x))

    def pretrain(self, x):
        return self.head(self(x))


def test_variables_of_another_precision_and_of_unreached_heads():
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), init(Heads(), method="pretrain"))
    plan = fj.make_plan(Heads(), RULES, X, half)
    assert len(plan.replaced) == 2
    assert plan.before.params == sum(leaf.size for leaf in jax.tree.leaves(half))
    small, compressed = fj.compress(Heads(), plan, half)
    assert {leaf.dtype for leaf in jax.tree.leaves(compressed)} == {jnp.dtype(jnp.bfloat16)}
    assert small.apply(compressed, X).shape == (2, 6, 6, 4)
    rows = {row.path: row for row in fj.profile(Heads(), X, half).rows}
    assert rows["head"].remark == "not used by the sample's call"


def test_what_are_no_variables_is_told():
    params = init(Heads())["params"]
    for given, said in [
        (types.SimpleNamespace(params=params), r"got a SimpleNamespace.*state.params"),
        (({"params": params}, None), "got a tuple"),
        ({"params": {"a": {"kernel": "text"}}}, "params/a/kernel in the variables is a str"),
    ]:
        with pytest.raises(ValueError, match=said):
            check_are_variables(Heads(), given)
    with pytest.raises(ValueError, match=r"of Heads alone; give variables={'params': params}"):
        fj.make_plan(Heads(), None, X, params)
    lacking = {"params": {"a": {**params["a"], "bias": np.ones(5)}}}
    with pytest.raises(ValueError, match="not the variables of this Heads") as caught:
        fj.make_plan(Heads(), None, X, lacking)
    assert "params/b/kernel is missing" in str(caught.value)
    assert "params/a/bias has shape (5,) instead of (4,)" in str(caught.value)
    only = {"params": init(ByMutable())["params"]}
    with pytest.raises(ValueError, match="batch_stats/BatchNorm_0/mean is missing"):
        fj.make_plan(ByMutable(), None, X, only)
    with pytest.raises(ValueError, match=r"is named 'block/conv'.*'block_conv'"):
        reasons(Slashed())


class Labelled(nn.Module):
    @nn.compact
    def __call__(self, x):
        return {"task": "segmentation", "y": nn.Conv(4, (3, 3))(nn.Conv(4, (3, 3))(x))}


def test_outputs_that_are_no_arrays():
    profile = fj.profile(Labelled(), X)
    assert [row.mult_adds for row in profile.rows] == [36 * (27 * 4 + 4), 36 * (36 * 4 + 4)]


class Slashed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Conv(4, (3, 3), name="block/conv")(x)


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(x)
        return x + jax.random.normal(self.make_rng("noise"), x.shape)


def test_noise_is_an_argument_if_the_sample_has_its_key():
    variables = init(Noisy())
    keyed = fj.deploy(Noisy(), fj.Inputs(X, rngs={"noise": jax.random.key(1)}), variables)
    key = jax.random.key(7)
    expected = Noisy().apply(variables, X, rngs={"noise": key})
    np.testing.assert_allclose(keyed(X, key), expected, atol=1e-5)
    fixed = fj.deploy(Noisy(), X, variables)
    np.testing.assert_array_equal(fixed(X), fixed(X))


class LinenMixed(nn.Module):
    """What holds parameters, or multiplies, and is no plain layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.ConvLocal(4, (3, 3), use_bias=False, name="local")(x).reshape(x.shape[0], 36, 4)
        x = nn.MultiHeadDotProductAttention(2, use_bias=False, name="attention")(x)
        x = nn.Einsum((4, 6), "bti,ij->btj", use_bias=False, name="einsum")(x)
        x = nn.RNN(nn.OptimizedLSTMCell(5), name="rnn")(x)
        x = x @ self.param("own", nn.initializers.ones, (5, 3))
        return nn.LayerNorm(name="norm")(x) + nn.Embed(7, 3, name="table")(jnp.array([[1]]))


def test_products_of_linen_modules_by_hand():
    rows = {row.path: row for row in fj.profile(LinenMixed(), X).rows}
    assert rows["local"].mult_adds == 36 * 27 * 4
    for name in ("query", "key", "value", "out"):
        assert rows[f"attention/{name}"].mult_adds == 36 * 4 * 4
    assert rows["einsum"].mult_adds == 36 * 4 * 6
    cell = sum(
        row.mult_adds for path, row in rows.items() if path.startswith("OptimizedLSTMCell_0/")
    )
    assert cell == 36 * 4 * 5 * (6 + 5)
    scores = 2 * 36 * 36 * 4  # queries with keys, and weights with values
    assert rows[""].mult_adds == 36 * 5 * 3 + scores
    assert all(row.mult_adds or row.remark for row in rows.values() if row.params)
    assert rows["norm"].mult_adds == rows["table"].mult_adds == 0


class Mixed(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs)
        options = {"use_bias": False, "decode": False, "rngs": rngs}
        self.attention = nnx.MultiHeadAttention(2, 4, **options)
        self.einsum = nnx.Einsum("bti,ij->btj", (4, 6), None, rngs=rngs)
        self.matrix = nnx.Param(jnp.ones((6, 5)))

    def __call__(self, x):
        x = self.attention(self.conv(x).reshape(x.shape[0], 36, 4))
        return jnp.einsum("btj,jk->btk", self.einsum(x), self.matrix[...])


def test_products_of_nnx_models_are_those_of_the_jaxpr():
    model = Mixed(nnx.Rngs(0))
    profile = fj.profile(model, X)
    graphdef, state = nnx.split(model)
    jaxpr = jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x))(state, X)
    assert profile.mult_adds == products(jaxpr.jaxpr) // 2
    rows = {row.path: row.mult_adds for row in profile.rows}
    assert rows["attention/query"] == 36 * 4 * 4
    assert rows["einsum"] == 36 * 4 * 6
    assert all(rows[row.path] for row in profile.rows if row.params)
