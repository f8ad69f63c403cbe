"""Layers fitted to responses, against float64 regressions on the same responses."""

import jax
import numpy as np
import pytest
from flax import nnx

import falcon_jax as fj
from tests.compression.linen_networks import Compact
from tests.compression.networks import Scanned, arrays, conv, images
from tests.nn.weights import draw
from tests.solvers.test_responses import least_squares

EVERYWHERE = 64  # as many positions as an 8 x 8 response has


class Plain(nnx.Module):
    """Three convolutions with biases, no BatchNorm."""

    def __init__(self, rngs, n=12):
        self.first = conv(3, n, rngs=rngs)
        self.second = conv(n, n, rngs=rngs)
        self.third = conv(n, n, rngs=rngs, use_bias=False)

    def __call__(self, x):
        x = jax.nn.relu(self.first(x))
        return self.third(jax.nn.relu(self.second(x)))


def batches(count=3, batch=16):
    # Neighbouring pixels are alike, as in pictures.
    smooth = [np.float32(images(batch, 10, seed=seed)) for seed in range(count)]
    return [(x[:, :-2, :-2] + x[:, 1:-1, 1:-1] + x[:, 2:, 2:]) / 2 for x in smooth]


def compressed(method, model=None):
    model = Plain(nnx.Rngs(0)) if model is None else model
    plan = fj.make_plan(model, [fj.Rule(path="first", method=None), fj.Rule(method=method)], X)
    return model, fj.compress(model, plan), plan


X = images()


def responses(model, small, path, data):
    """What the original layer says in the original model, and of the compressed model's inputs."""
    targets, answers = [], []
    for x in data:
        h, g = jax.nn.relu(model.first(x)), jax.nn.relu(small.first(x))
        if path == "third":
            h, g = jax.nn.relu(model.second(h)), jax.nn.relu(small.second(g))
        layer = getattr(model, path)
        targets.append(np.float64(layer(h)).reshape(-1, 12))
        answers.append(np.float64(getattr(small, path)(g)).reshape(-1, 12))
        layer_answers = np.float64(layer(g)).reshape(-1, 12)
        answers[-1] = (answers[-1], layer_answers)
    return (
        np.concatenate(targets),
        np.concatenate([a for a, _ in answers]),
        np.concatenate([b for _, b in answers]),
    )


@pytest.mark.parametrize("path", ["second", "third"])
def test_every_layer_has_the_least_error_given_the_layers_before(path):
    model, small, plan = compressed(fj.ChannelDecomposition(rank=4))
    data = batches()
    fitted = fj.calibrate(model, small, plan, data, positions=EVERYWHERE)
    targets, answers, given = responses(model, fitted, path, data)
    error = ((targets - answers) ** 2).sum()
    assert error == pytest.approx(least_squares(given, targets, 4, path == "second"), rel=1e-3)
    untouched = responses(model, small, path, data)
    assert error < 0.9 * ((untouched[0] - untouched[1]) ** 2).sum()


def test_knowing_of_the_relu_lowers_the_error_behind_it():
    data = batches()

    def error(relu):
        model, small, plan = compressed(fj.ChannelDecomposition(rank=3, relu=relu))
        fitted = fj.calibrate(model, small, plan, data, positions=EVERYWHERE)
        targets, answers, _ = responses(model, fitted, "second", data)
        return ((np.maximum(targets, 0) - np.maximum(answers, 0)) ** 2).sum()

    assert error(True) < 0.97 * error(False)


def test_a_few_positions_do_nearly_as_well():
    model, small, plan = compressed(fj.ChannelDecomposition(rank=4))
    data = batches(6)

    def error(fitted):
        targets, answers, _ = responses(model, fitted, "third", data)
        return ((targets - answers) ** 2).sum()

    all_of_them = error(fj.calibrate(model, small, plan, data, positions=EVERYWHERE))
    few = error(fj.calibrate(model, small, plan, data, positions=10))
    other = error(fj.calibrate(model, small, plan, data, positions=10, key=jax.random.key(1)))
    assert all_of_them <= few < 1.2 * all_of_them
    assert other != few


def test_full_rank_stays_exact_and_nothing_else_changes():
    model, small, plan = compressed(fj.ChannelDecomposition(rank="full"))
    before, as_compressed = arrays(model), arrays(small)
    fitted = fj.calibrate(model, small, plan, batches(), positions=EVERYWHERE)
    np.testing.assert_allclose(fitted(X), model(X), atol=1e-3 * float(np.abs(model(X)).max()))
    for old, new in ((before, arrays(model)), (as_compressed, arrays(small))):
        assert old.keys() == new.keys()
        for name in old:
            np.testing.assert_array_equal(old[name], new[name])
    np.testing.assert_array_equal(arrays(fitted)["first/kernel"], before["first/kernel"])


def test_inner_methods_and_other_methods_beside():
    model = Plain(nnx.Rngs(0))
    rules = [
        fj.Rule(path="first", method=None),
        fj.Rule(path="second", method=fj.Decoupled(terms=2)),
        fj.Rule(method=fj.ChannelDecomposition(rank=6, inner=fj.Decoupled(terms=4))),
    ]
    plan = fj.make_plan(model, rules, X)
    small = fj.compress(model, plan)
    data = batches()
    fitted = fj.calibrate(model, small, plan, data, positions=EVERYWHERE)
    old, new = arrays(small), arrays(fitted)
    changed = {name for name in old if not np.array_equal(old[name], new[name])}
    assert changed == {
        "third/spatial_pointwise",
        "third/spatial_depthwise",
        "third/pointwise",
    }

    def error(candidate):
        return sum(float(((candidate(x) - model(x)) ** 2).sum()) for x in data)

    assert error(fitted) < 0.95 * error(small)


def test_bad_calibration_is_told():
    model, small, plan = compressed(fj.ChannelDecomposition(rank=4))
    with pytest.raises(ValueError, match="at least one batch"):
        fj.calibrate(model, small, plan, [])
    with pytest.raises(ValueError, match="Plain cannot be called on the sample"):
        fj.calibrate(model, small, plan, [draw(2, 8, 8, 5)])
    with pytest.raises(ValueError, match="give 10 responses of 'second', fewer than its 12"):
        fj.calibrate(model, small, plan, [images(1)])
    with pytest.raises(ValueError, match=r"'second' by .* has not got it"):
        fj.calibrate(model, model, plan, batches())
    _, other, falcon = compressed(fj.Falcon())
    with pytest.raises(ValueError, match="no layer of the plan can be fitted to responses"):
        fj.calibrate(model, other, falcon, batches())
    with pytest.raises(ValueError, match="takes NNX models; got Compact"):
        fj.calibrate(Compact(), small, plan, batches())


def test_a_scanned_layer_is_named():
    model = Scanned(nnx.Rngs(0))
    rules = [fj.Rule(path="stem", method=None), fj.Rule(method=fj.ChannelDecomposition(rank=2))]
    plan = fj.make_plan(model, rules, X)
    with pytest.raises(ValueError, match="'layers' is not called, or inside a jitted, scanned"):
        fj.calibrate(model, fj.compress(model, plan), plan, batches())
