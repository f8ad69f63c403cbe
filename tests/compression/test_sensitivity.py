"""What replacing one layer costs the outputs, against regressions in float64 and exact kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import falcon_jax as fj
from falcon_jax.compression.outputs import OutputLoss
from tests.compression.linen_networks import Lifted, drawn
from tests.compression.networks import Scanned, conv, images, randomised

EVERYWHERE = 64  # as many points as an 8 x 8 answer has
METHODS = (fj.ChannelDecomposition(rank=2), fj.Falcon(rank=1), fj.Falcon(rank=2))


class Net(nnx.Module):
    """Three convolutions with ReLUs between, the last of them the output."""

    def __init__(self, rngs):
        self.first = conv(3, 8, rngs=rngs)
        self.second = conv(8, 8, rngs=rngs)
        self.third = conv(8, 6, rngs=rngs)

    def __call__(self, x):
        return self.third(jax.nn.relu(self.second(jax.nn.relu(self.first(x)))))


def batches(count=3, batch=8):
    return [np.float32(images(batch, 8, seed=seed)) for seed in range(count)]


@pytest.fixture(scope="module")
def measured():
    model = Net(nnx.Rngs(0))
    found = fj.sensitivity(
        model, batches(), candidates=METHODS, points=EVERYWHERE, examples=24, sample=images()
    )
    return model, found


def test_only_what_saves_something_is_a_candidate(measured):
    model, found = measured
    assert list(found.effects) == ["first", "second", "third"]
    for path, effects in found.effects.items():
        before = getattr(model, path).kernel[...].size + getattr(model, path).bias[...].size
        assert effects
        assert all(effect.row.after.params < before for effect in effects)
    assert not any(row.method for row in found.plan.rows)


def test_the_loss_of_the_last_layer_is_the_error_of_its_answers(measured):
    _, found = measured
    for effect in found.effects["third"]:
        # Every example and every point is looked at.
        assert effect.loss == pytest.approx(effect.error, rel=1e-3)


def test_errors_are_those_of_regressions_of_low_rank(measured):
    model, found = measured
    x = np.concatenate([np.asarray(model.first(x)) for x in batches()]).clip(0)
    y = np.float64(model.second(jnp.asarray(x))).reshape(-1, 8)
    x = np.pad(np.float64(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = np.concatenate([x[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)], -1)
    rows = rows.reshape(-1, 72)
    rows, y = rows - rows.mean(0), y - y.mean(0)
    u, s, _ = np.linalg.svd(rows, full_matrices=False)
    explained = u[:, s > 1e-6 * s[0]].T @ y
    least = 1 - (np.linalg.svd(explained)[1][:2] ** 2).sum() / (y**2).sum()
    (effect,) = (e for e in found.effects["second"] if e.row.method == METHODS[0])
    # A few steps come near to the optimum.
    assert least <= effect.error * (1 + 1e-3)
    assert effect.error <= 1.1 * least
    one, two = (e for e in found.effects["second"] if e.row.method in METHODS[1:])
    assert two.error < one.error and two.loss < one.loss


def test_losses_are_those_of_the_model_with_one_layer_replaced():
    model = Net(nnx.Rngs(1))
    # Of a kernel that a candidate has exactly, nothing is lost, whatever the layer before does.
    exact = fj.Falcon(rank=1)
    spec = fj.ConvSpec(kernel_size=(3, 3), in_features=8, out_features=8)
    params = exact.init(jax.random.key(0), spec)
    model.second.kernel[...] = exact.kernel(params, spec)
    found = fj.sensitivity(model, batches(), candidates=[exact], points=EVERYWHERE)
    losses = {path: effects[0].loss for path, effects in found.effects.items()}
    assert losses["second"] < 1e-6 < 1e-3 < losses["third"]


def test_output_loss_is_relative_to_the_spread():
    rng = np.random.default_rng(0)
    f, g = ([rng.normal(size=(5, 4)) for _ in range(2)] for _ in range(2))
    both = np.concatenate(f), np.concatenate(g)
    expected = ((both[0] - both[1]) ** 2).sum()
    expected /= ((both[0] - both[0].mean(0)) ** 2).sum()
    loss = OutputLoss([[jnp.asarray(y, jnp.float32)] for y in f])
    assert loss([jnp.asarray(y, jnp.float32)] for y in g) == pytest.approx(expected, rel=1e-5)
    assert loss([jnp.asarray(y, jnp.float32)] for y in f) == 0


def test_layers_of_a_stack_are_replaced_together():
    model = Scanned(nnx.Rngs(0))
    randomised(model)
    sample = images(16, seed=3)
    found = fj.sensitivity(model, [sample], candidates=[fj.Falcon()], points=EVERYWHERE)
    stacked = [row for row in found.plan.rows if row.path in found.effects]
    assert any(row.before.params > np.prod(row.spec.kernel_shape) * 2 for row in stacked)
    assert all(effect.loss > 0 for effects in found.effects.values() for effect in effects)


def test_linen_and_the_model_stays_as_it_was():
    bound = Lifted().bind(drawn(Lifted()))
    before = jax.tree.map(np.asarray, bound.variables)
    data = [fj.Inputs(images(16, 8, seed=seed), train=False) for seed in range(2)]
    found = fj.sensitivity(bound, data, candidates=[fj.Falcon()], points=EVERYWHERE)
    assert all(np.isfinite(e.loss) for effects in found.effects.values() for e in effects)
    jax.tree.map(np.testing.assert_array_equal, before, bound.variables)


def test_rules_decide_beforehand():
    model = Net(nnx.Rngs(0))
    rules = [fj.Rule(path="first", method=None), fj.Rule(path="second", method=fj.Falcon(rank=2))]
    measure = functools.partial(fj.sensitivity, model, batches(), points=EVERYWHERE)
    found = measure(candidates=[fj.Falcon()], rules=rules)
    ranks = {path: [e.row.method.rank for e in each] for path, each in found.effects.items()}
    assert ranks == {"second": [2], "third": [1]}
    reasons = {row.path: row.reason for row in found.plan.rows}
    assert reasons["first"] == "left alone by path='first'"
    text = str(found)
    assert "falcon 2" in text and "loss of the output" in text
    assert found.to_json()["third"][0]["loss"] == found.effects["third"][0].loss
    with pytest.raises(ValueError, match="no convolution matches"):
        measure(rules=[fj.Rule(path="fourth", method=None)])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"batches": []}, "at least one batch"),
        ({"points": 0}, "points is at least 1"),
        ({"examples": 0}, "examples is at least 1"),
        ({"candidates": [fj.Tucker(rank=(8, 8))]}, "no candidate saves"),
    ],
)
def test_bad_input_is_told(options, told):
    given = {"batches": batches(), "candidates": METHODS} | options
    with pytest.raises(ValueError, match=told):
        fj.sensitivity(Net(nnx.Rngs(0)), given.pop("batches"), **given)
