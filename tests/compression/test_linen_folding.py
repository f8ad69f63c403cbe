import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import freeze
from flax.traverse_util import flatten_dict

import falcon_jax as fj
from tests.compression.linen_networks import NETWORKS, Block, Compact, drawn, inputs, shapes

X = inputs().args[0]
FOLDED = {
    "setup": ["blocks_0/BatchNorm_0"],
    "compact": ["Block_0/BatchNorm_0"],
    "lifted": ["CheckpointBlock_0/BatchNorm_0", "JitBlock_0/BatchNorm_0", "scanned/BatchNorm_0"],
}


def norms_in(variables):
    paths = flatten_dict(variables.get("batch_stats", {}), sep="/")
    return sorted({path.rpartition("/")[0] for path in paths})


def fold(name):
    module = NETWORKS[name]()
    variables = drawn(module)
    return module, variables, *fj.fold_batchnorm(module.bind(variables), inputs()).unbind()


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_stay_and_every_norm_goes(name):
    module, variables, folded, new = fold(name)
    assert norms_in(variables) == FOLDED[name]
    assert "batch_stats" not in new
    expected = module.apply(variables, X, train=False)
    close = {"atol": 1e-5 * float(np.abs(expected).max())}
    np.testing.assert_allclose(folded.apply(new, X, train=False), expected, **close)
    jitted = jax.jit(lambda v, x: folded.apply(v, x, train=False))
    np.testing.assert_allclose(jitted(new, X), expected, **close)


@pytest.mark.parametrize("name", NETWORKS)
def test_init_makes_the_folded_variables(name):
    _, _, folded, new = fold(name)
    made = jax.eval_shape(lambda: folded.init(jax.random.key(0), X, train=False))
    assert shapes(made) == shapes(new)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n != "compact" else n for n in NETWORKS]
)
def test_folded_then_compressed_then_stored(name, tmp_path):
    module, variables, folded, new = fold(name)
    plan = fj.make_plan(folded.bind(new), [fj.Rule(method=fj.Falcon(rank="full"))], inputs())
    assert plan.replaced
    small, compressed = fj.compress(folded.bind(new), plan).unbind()
    expected = module.apply(variables, X, train=False)
    close = {"atol": 1e-4 * float(np.abs(expected).max())}
    np.testing.assert_allclose(small.apply(compressed, X, train=False), expected, **close)
    counted = fj.profile(small.bind(compressed), inputs())
    assert (counted.params, counted.mult_adds) == (plan.after.params, plan.after.mult_adds)
    assert counted.params == sum(leaf.size for leaf in jax.tree.leaves(compressed["params"]))
    fj.save_compressed(tmp_path / "model", small.bind(compressed), plan)

    def build():
        return fj.fold_batchnorm(NETWORKS[name]().bind(drawn(NETWORKS[name](), seed=1)), inputs())

    loaded, found = fj.load_compressed(tmp_path / "model", build).unbind()
    np.testing.assert_array_equal(
        loaded.apply(found, X, train=False), small.apply(compressed, X, train=False)
    )


def test_a_bias_of_a_folded_convolution_is_counted():
    module = Block()
    variables = drawn(module)
    folded, new = fj.fold_batchnorm(module.bind(variables), inputs()).unbind()
    counted = fj.profile(folded.bind(new), inputs())
    assert counted.params == 9 * 3 * 4 + 4
    assert counted.mult_adds == 64 * (9 * 3 * 4 + 4)
    frozen = fj.fold_batchnorm(module.bind(freeze(variables)), inputs()).unbind()[1]
    assert jax.tree.map(jnp.shape, frozen) == jax.tree.map(jnp.shape, new)


class Awkward(nn.Module):
    """BatchNorms that must stay, and one without scale."""

    @nn.compact
    def __call__(self, x, train=True):
        norm = lambda **options: nn.BatchNorm(use_running_average=not train, **options)  # noqa: E731
        x = norm(use_scale=False, name="bare")(nn.Conv(4, (3, 3), use_bias=False)(x))
        y = nn.Conv(4, (3, 3))(x)
        x = y + norm(name="branch")(y)
        x = nn.WeightNorm(nn.Conv(4, (3, 3)), variable_filter={"kernel"})(x)
        x = norm(name="weighed")(x)
        x = nn.Conv(4, (3, 3), mask=np.ones((3, 3, 4, 4)))(x)
        return norm(name="masked")(x)


def test_what_cannot_be_folded_stays():
    variables = drawn(Awkward())
    folded, new = fj.fold_batchnorm(Awkward().bind(variables), inputs()).unbind()
    assert norms_in(new) == ["branch", "masked", "weighed"]
    expected = Awkward().apply(variables, X, train=False)
    found = folded.apply(new, X, train=False)
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(np.abs(expected).max()))


class OwnStatistics(nn.Module):
    """A BatchNorm that uses the batch's statistics in evaluation, too, and types that change."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train, name="plain")(nn.Conv(4, (3, 3))(x))
        x = nn.BatchNorm(use_running_average=False, name="own")(nn.Conv(4, (3, 3))(x))
        x = nn.Conv(4, (3, 3), dtype=jnp.bfloat16)(x)
        return nn.BatchNorm(use_running_average=not train, name="mixed", dtype=jnp.float32)(x)


def test_batch_statistics_and_types_stay():
    module, variables = OwnStatistics(), drawn(OwnStatistics())
    folded, new = fj.fold_batchnorm(module.bind(variables), inputs()).unbind()
    assert norms_in(new) == ["mixed", "own"]
    expected, _ = module.apply(variables, X, train=False, mutable=["batch_stats"])
    found, _ = folded.apply(new, X, train=False, mutable=["batch_stats"])
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, atol=1e-4 * float(np.abs(expected).max()))
    with pytest.raises(ValueError, match=r"is folded into the convolution before it.*evaluation"):
        folded.apply(new, X, train=True, mutable=["batch_stats"])


def test_bad_input_is_told():
    variables = drawn(Compact())
    with pytest.raises(ValueError, match=r"'Block_0/BatchNorm_0' in training mode.*train=False"):
        fj.fold_batchnorm(Compact().bind(variables), inputs(train=True))
    with pytest.raises(ValueError, match=r"give module\.bind\(variables\)"):
        fj.fold_batchnorm(Compact(), inputs())
    with pytest.raises(ValueError, match="Compact cannot be called on the sample"):
        fj.fold_batchnorm(Compact().bind(variables), fj.Inputs(X[..., :2], train=False))


AFTER = [
    ("lifted", fj.Falcon(rank=2)),
    ("compact", fj.DepthwiseSeparable()),
    ("compact", fj.Tucker(rank=2)),
]
REST = [
    ("compact", fj.Falcon(rank=2)),
    ("lifted", fj.DepthwiseSeparable()),
    ("lifted", fj.Tucker(rank=2)),
]


@pytest.mark.parametrize(
    ("name", "method"), [*AFTER, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)]
)
def test_batchnorms_after_compressed_convolutions_are_folded(name, method):
    module = NETWORKS[name]()
    model = module.bind(drawn(module))
    small = fj.compress(model, fj.make_plan(model, [fj.Rule(method=method)], inputs()))
    folded, new = fj.fold_batchnorm(small, inputs()).unbind()
    expected = small(X, train=False)
    close = {"atol": 1e-4 * float(np.abs(expected).max())}
    np.testing.assert_allclose(folded.apply(new, X, train=False), expected, **close)
    assert folded.folded
    compressed = {path for path, _, _ in folded.layers}
    assert {conv for _, conv in folded.folded} & compressed
    assert not any(norm in "/".join(k) for k in flatten_dict(new) for norm, _ in folded.folded)
