"""Layers calibrated on data, against float64 regressions on the same inputs and answers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import falcon_jax as fj
from tests.compression.linen_networks import Lifted, drawn
from tests.compression.networks import Scanned, Small, Vmapped, arrays, conv, images, randomised
from tests.nn.weights import draw

EVERYWHERE = 64  # as many points as an 8 x 8 answer has
SAMPLE = images()
calibrate = functools.partial(fj.calibrate, points=EVERYWHERE, by_sensitivity=False)
plainly = functools.partial(calibrate, relu_aware=False)


class Plain(nnx.Module):
    """Three convolutions, two with biases, no BatchNorm."""

    def __init__(self, rngs, n=8):
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


def compressed(method, model=None, stays=("first",)):
    model = Plain(nnx.Rngs(0)) if model is None else model
    rules = [*(fj.Rule(path=path, method=None) for path in stays), fj.Rule(method=method)]
    plan = fj.make_plan(model, rules, SAMPLE)
    return model, fj.compress(model, plan), plan


def patches(x):
    """Patches of a 3 x 3 convolution with zero padding, in float64."""
    x = np.pad(np.float64(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    h, w = x.shape[1] - 2, x.shape[2] - 2
    taps = [x[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    return np.concatenate(taps, -1).reshape(-1, 9 * x.shape[-1])


def seen(model, small, path, data):
    """Patches that a layer gets in the compressed model, and the original's answers."""
    inputs, targets = [], []
    for x in data:
        h, g = jax.nn.relu(model.first(x)), jax.nn.relu(small.first(x))
        if path == "third":
            h, g = jax.nn.relu(model.second(h)), jax.nn.relu(small.second(g))
        inputs.append(patches(g))
        targets.append(np.float64(getattr(model, path)(h)).reshape(-1, 8))
    return np.concatenate(inputs), np.concatenate(targets)


def weights_of(layer):
    bias = 0 if layer.bias is None else np.float64(layer.bias[...])
    return np.float64(layer.kernel).reshape(-1, 8), bias


@pytest.fixture(scope="module")
def by_regression():
    """A model, a compressed one fitted to its answers, and the data."""
    model, small, plan = compressed(fj.ChannelDecomposition(rank=3))
    data = [*batches(), batches(1, batch=7)[0]]
    return model, plainly(model, small, plan, data), data


@pytest.mark.parametrize("path", ["second", "third"])
def test_every_layer_has_the_least_error_given_the_layers_before(by_regression, path):
    model, fitted, data = by_regression
    x, y = seen(model, fitted, path, data)
    w, bias = weights_of(getattr(fitted, path))
    error = ((y - x @ w - bias) ** 2).sum()
    if path == "second":
        x, y = x - x.mean(0), y - y.mean(0)
    # The best linear map of rank 3: what is explained, projected to its leading directions.
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    explained = u[:, s > 1e-6 * s[0]].T @ y
    least = (y**2).sum() - (np.linalg.svd(explained)[1][:3] ** 2).sum()
    assert least <= error * (1 + 1e-6)
    assert error == pytest.approx(least, rel=5e-3)  # the ridge


@pytest.mark.parametrize(
    "method",
    [
        fj.Falcon(),
        pytest.param(fj.DepthwiseSeparable(), marks=pytest.mark.slow),
        pytest.param(fj.Tucker(rank=4), marks=pytest.mark.slow),
        fj.FilterSummary(ratio=4.0),
    ],
)
def test_every_method_answers_better_than_after_the_fit_to_kernels(method):
    model, small, plan = compressed(method)
    data, errors = batches(), []
    fitted = plainly(model, small, plan, data, report=errors.append)
    assert [e.path for e in errors] == ["second", "third"]
    for e in errors:
        x, y = seen(model, fitted, e.path, data)
        w, bias = weights_of(getattr(fitted, e.path))
        far = np.linalg.norm(y - x @ w - bias) / np.linalg.norm(y - y.mean(0))
        assert e.after == pytest.approx(far, rel=1e-3)
        assert e.points == len(x) and e.mattering == pytest.approx(e.after, rel=1e-5)
        assert e.after < e.before
    x, y = seen(model, small, "second", data)
    w, bias = weights_of(small.second)
    far = np.linalg.norm(y - x @ w - bias) / np.linalg.norm(y - y.mean(0))
    assert errors[0].before == pytest.approx(far, rel=1e-3)


def test_answers_that_a_relu_makes_nothing_of_are_left_free():
    data, aware = batches(), []
    model = Plain(nnx.Rngs(0))
    means = np.mean([model.second(jax.nn.relu(model.first(x))) for x in data], (0, 1, 2, 3))
    model.second.bias[...] -= jnp.asarray(means)  # half of the answers are below 0
    _, small, plan = compressed(fj.Falcon(), model)
    fitted = calibrate(model, small, plan, data, report=aware.append)
    x, y = seen(model, fitted, "second", data)
    w, bias = weights_of(fitted.second)
    answers = x @ w + bias
    good = np.where(y > 0, y, np.minimum(answers, 0))
    far = np.linalg.norm(answers - good) / np.linalg.norm(y - y.mean(0))
    assert aware[0].mattering == pytest.approx(far, rel=1e-3)

    def behind(candidate):
        x, y = seen(model, candidate, "second", data)
        w, bias = weights_of(candidate.second)
        return ((np.maximum(y, 0) - np.maximum(x @ w + bias, 0)) ** 2).sum()

    assert behind(fitted) < 0.97 * behind(plainly(model, small, plan, data))
    # Nothing follows the third.
    assert aware[1].mattering == pytest.approx(aware[1].after, rel=1e-5)


class Pooled(nnx.Module):
    """A convolution, BatchNorm, a ReLU and a pooling; and a head."""

    def __init__(self, rngs, use_bias=False):
        self.first = conv(3, 8, rngs=rngs)
        self.second = conv(8, 8, rngs=rngs, use_bias=use_bias)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.head = conv(8, 4, (1, 1), rngs=rngs)

    def answers(self, x):
        return self.second(jax.nn.relu(self.first(x)))

    def __call__(self, x):
        y = jax.nn.relu(self.norm(self.answers(x)))
        return self.head(nnx.max_pool(y, (2, 2), strides=(2, 2)))


@pytest.mark.parametrize("use_bias", [False, True])
def test_only_the_largest_of_a_window_must_be_right(use_bias):
    model = randomised(Pooled(nnx.Rngs(0), use_bias))
    model.norm.scale[...] = model.norm.scale[...] * jnp.where(jnp.arange(8) < 3, -1, 1)
    _, small, plan = compressed(fj.Falcon(), model, ("first", "head"))
    data, errors = batches(), []
    fitted = calibrate(model, small, plan, data, report=errors.append)

    def after_norm(m):
        return np.concatenate([np.float64(m.norm(m.answers(x))) for x in data])

    wanted, found = after_norm(model), after_norm(fitted)
    windows = wanted.reshape(-1, 4, 2, 4, 2, 8).max((2, 4), keepdims=True)
    largest = np.broadcast_to(windows, (len(wanted), 4, 2, 4, 2, 8)).reshape(wanted.shape)
    exact = (wanted == largest) & (wanted > 0)
    gain = np.float64(model.norm.scale[...] / np.sqrt(model.norm.var[...] + model.norm.epsilon))
    far = np.where(exact, found - wanted, np.maximum(found - np.maximum(largest, 0), 0)) / gain
    y = np.concatenate([np.float64(model.answers(x)) for x in data]).reshape(-1, 8)
    far = np.linalg.norm(far) / np.linalg.norm(y - y.mean(0))
    assert errors[0].mattering == pytest.approx(far, rel=1e-2)
    assert errors[0].mattering < errors[0].after

    def pooled(m):
        return sum(float(((m(x) - model(x)) ** 2).sum()) for x in data)

    assert pooled(fitted) < 0.95 * pooled(plainly(model, small, plan, data))


class Branched(nnx.Module):
    """Answers that are used twice: by two ReLUs, by a ReLU and a sum, and given out."""

    def __init__(self, rngs):
        self.first = conv(3, 8, rngs=rngs)
        self.second = conv(8, 8, rngs=rngs)
        self.third = conv(8, 8, rngs=rngs)
        self.fourth = conv(8, 8, rngs=rngs)

    def __call__(self, x):
        y = self.first(x)
        y = self.second(jax.nn.relu(y)) + jax.nn.relu(y)
        z = self.third(y)
        z = jax.nn.relu(z) + z
        last = self.fourth(z)
        return jax.nn.relu(last), last


def test_only_answers_that_nothing_else_uses_are_left_free():
    model, small, plan = compressed(fj.Falcon(), Branched(nnx.Rngs(0)), ())
    errors = []
    calibrate(model, small, plan, batches(), report=errors.append)
    free = {e.path for e in errors if e.mattering < 0.99 * e.after}
    assert free == {"first"}


def test_a_layer_without_a_bias_has_it_in_the_mean_of_its_batchnorm():
    model = randomised(Pooled(nnx.Rngs(0)))
    _, small, plan = compressed(fj.Falcon(), model, ("first", "head"))
    data = batches()
    fitted = plainly(model, small, plan, data)
    answers = [np.concatenate([np.float64(m.answers(x)) for x in data]) for m in (model, fitted)]
    moved = np.float64(model.norm.mean[...] - fitted.norm.mean[...])
    means = [a.reshape(-1, 8).mean(0) for a in answers]
    np.testing.assert_allclose(means[1] + moved, means[0], atol=1e-4)
    changed = {n for n, a in arrays(fitted).items() if not np.array_equal(a, arrays(small)[n])}
    assert changed == {"norm/mean", "second/depthwise", "second/pointwise"}


def test_full_rank_stays_exact_and_nothing_else_changes():
    model, small, plan = compressed(fj.ChannelDecomposition(rank="full"))
    before, as_compressed = arrays(model), arrays(small)
    fitted = calibrate(model, small, plan, batches())
    wanted = np.asarray(model(SAMPLE))
    np.testing.assert_allclose(fitted(SAMPLE), wanted, atol=1e-3 * float(np.abs(wanted).max()))
    for old, new in ((before, arrays(model)), (as_compressed, arrays(small))):
        assert old.keys() == new.keys()
        for name in old:
            np.testing.assert_array_equal(old[name], new[name])
    np.testing.assert_array_equal(arrays(fitted)["first/kernel"], before["first/kernel"])


@pytest.mark.slow
def test_fewer_points_do_nearly_as_well_and_a_key_decides_which():
    model, small, plan = compressed(fj.Falcon())
    data = batches(6)

    def error(**options):
        fitted = fj.calibrate(model, small, plan, data, relu_aware=False, **options)
        return sum(float(((fitted(x) - model(x)) ** 2).sum()) for x in data)

    everywhere = error(points=EVERYWHERE)
    few = error(points=10, by_sensitivity=False)
    other = error(points=10, by_sensitivity=False, key=jax.random.key(1))
    assert few < 1.3 * everywhere
    assert other != few
    assert error(points=10) < 1.3 * everywhere


@pytest.mark.slow
class Across(Plain):
    """What the first layer answers is wanted again at the end."""

    def __call__(self, x):
        first = jax.nn.relu(self.first(x))
        return self.third(first + jax.nn.relu(self.second(first)))


def test_what_is_not_held_is_computed_again(monkeypatch):
    model, small, plan = compressed(fj.Falcon(), Across(nnx.Rngs(0)), stays=())
    data = batches(4)
    expected = arrays(calibrate(model, small, plan, data))
    array = 16 * 8 * 8 * 8 * 4  # bytes of one batch between two layers
    for limit in (0, 3 * array, 5 * array):  # nothing, three of four batches, one for two layers
        monkeypatch.setattr("falcon_jax.compression.observation._HELD", limit)
        found = arrays(calibrate(model, small, plan, data))
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=2e-4, err_msg=name)


def test_how_many_layers_are_looked_at_in_one_pass_makes_no_difference(monkeypatch):
    model, small, plan = compressed(fj.Falcon(), Across(nnx.Rngs(0)), stays=())
    data = batches(4)
    expected = arrays(calibrate(model, small, plan, data))
    layer = 4 * 16 * 64 * 8 * 4  # bytes of the answers of one
    for limit in (0, 2 * layer):
        monkeypatch.setattr("falcon_jax.compression.answers._AT_ONCE", limit)
        found = arrays(calibrate(model, small, plan, data))
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=2e-4, err_msg=name)


def test_points_are_enough_for_the_weights_where_examples_are_few():
    model, small, plan = compressed(fj.Falcon())
    found = {}
    for count in (2, 4):
        errors = []
        fj.calibrate(model, small, plan, [np.float32(images(count, 16))], report=errors.append)
        found[count] = [error.points for error in errors]
    # The 72 weights of an output channel want 5 points each; of every example, 120 in any case.
    assert found == {2: [5 * 72, 5 * 72], 4: [4 * 120, 4 * 120]}


def test_points_on_which_nothing_hangs_are_rarely_chosen():
    class Half(Plain):
        def __call__(self, x):
            return super().__call__(x)[:, :, :4]

    model, small, plan = compressed(fj.ChannelDecomposition(rank=3), Half(nnx.Rngs(0)))
    data = batches(6)

    def error(by_sensitivity):
        fitted = fj.calibrate(model, small, plan, data, points=12, by_sensitivity=by_sensitivity)
        return sum(float(((fitted(x) - model(x)) ** 2).sum()) for x in data)

    assert error(True) < error(False)


def layers_of(model, x):
    """Inputs and answers of the stacked layers of `Scanned`, one after the other."""
    x = model.stem(x)
    for kernel, bias in zip(model.layers.kernel[...], model.layers.bias[...], strict=True):
        answer = patches(x) @ np.float64(kernel).reshape(-1, 4) + np.float64(bias)
        yield np.asarray(x), answer
        x = np.maximum(answer, 0).reshape(x.shape)


def test_scanned_layers_are_calibrated_one_after_the_other():
    model = Scanned(nnx.Rngs(0))
    _, small, plan = compressed(fj.Falcon(), model, ("stem",))
    data, errors = batches(), []
    fitted = plainly(model, small, plan, data, report=errors.append)
    assert [(e.path, e.row) for e in errors] == [("layers", 0), ("layers", 1), ("layers", 2)]
    pairs = [zip(layers_of(model, x), layers_of(fitted, x), strict=True) for x in data]
    for e, calls in zip(errors, zip(*pairs, strict=True), strict=True):
        wanted = np.concatenate([original[1] for original, _ in calls])
        found = np.concatenate([small[1] for _, small in calls])
        far = np.linalg.norm(wanted - found) / np.linalg.norm(wanted - wanted.mean(0))
        assert e.after == pytest.approx(far, rel=1e-3)
        assert e.after < e.before


def test_layers_side_by_side_are_calibrated_each_by_its_own_answers():
    model = Vmapped(nnx.Rngs(0))
    _, small, plan = compressed(fj.Falcon(), model, ("stem",))
    data, errors = batches(), []
    fitted = plainly(model, small, plan, data, report=errors.append)
    x = np.concatenate([patches(model.stem(x)) for x in data])
    for e in errors:
        y = x @ np.float64(model.layers.kernel[...][e.row]).reshape(-1, 4)
        w = np.float64(fitted.layers.kernel[e.row]).reshape(-1, 4)
        away = y - x @ w
        far = np.linalg.norm(away - away.mean(0)) / np.linalg.norm(y - y.mean(0))
        assert e.after == pytest.approx(far, rel=1e-3)
    assert [e.row for e in errors] == [0, 1, 2]


JITTED = nn.jit(nn.Conv)


class Twice(nn.Module):
    """A Linen convolution that is used twice, under jit, and one in a loop."""

    loop: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.relu(JITTED(4, (3, 3), name="first")(x))
        shared = nn.Conv(4, (3, 3), use_bias=False, name="shared")
        x = nn.relu(shared(nn.relu(shared(x))))
        if self.loop:
            last = nn.Conv(4, (3, 3), name="last")

            def body(module, state):
                return state[0] + 1, nn.relu(module(state[1]))

            if self.is_initializing():
                return last(x)
            _, x = nn.while_loop(lambda module, state: state[0] < 2, body, last, (0, x))
        return x


def called(bound, batch):
    """What a bound module gives; compact ones can be called once only."""
    module, variables = bound.unbind()
    inputs = batch if isinstance(batch, fj.Inputs) else fj.Inputs(batch)
    return module.apply(variables, *inputs.args, **inputs.kwargs)


def linen(module, method):
    x = batches(1)[0]
    variables = module.init(jax.random.key(0), x)
    plan = fj.make_plan(module.bind(variables), [fj.Rule(method=method)], x)
    small, new = fj.compress(module.bind(variables), plan).unbind()
    return module.bind(variables), small.bind(new), plan


def test_linen_modules_come_bound_and_shared_layers_answer_to_all_of_their_calls():
    model, small, plan = linen(Twice(), fj.Falcon())
    data, errors = batches(), []
    fitted = calibrate(model, small, plan, data, report=errors.append)
    assert [e.path for e in errors] == ["first", "shared"]
    assert errors[1].points == 2 * 3 * 16 * 64
    assert all(e.mattering < e.before for e in errors)

    def error(candidate):
        return sum(float(((called(candidate, x) - called(model, x)) ** 2).sum()) for x in data)

    assert isinstance(fitted, nn.Module) and fitted.scope is not None
    assert error(fitted) < error(small)


@pytest.mark.slow
def test_layers_under_linens_transformations():
    example = fj.Inputs(batches(1)[0], train=False)
    module = Lifted()
    variables = drawn(module, example)
    plan = fj.make_plan(module.bind(variables), [fj.Rule(method=fj.Falcon())], example)
    small, new = fj.compress(module.bind(variables), plan).unbind()
    data, errors = [fj.Inputs(x, train=False) for x in batches(2)], []
    fitted = calibrate(module.bind(variables), small.bind(new), plan, data, report=errors.append)
    rows = {}
    for e in errors:
        rows.setdefault(e.path, []).append(e.row)
        assert e.mattering < e.before
    assert {path: r for path, r in rows.items() if r != [None]} == {
        "scanned/Conv_0": [0, 1, 2],
        "vmapped": [0, 1],
    }
    assert len(rows) == 5

    def error(candidate):
        pairs = [(called(candidate, x), called(module.bind(variables), x)) for x in data]
        return sum(float(((y - wanted) ** 2).sum()) for y, wanted in pairs)

    assert error(fitted) < 0.5 * error(small.bind(new))


def test_half_precision_models_are_fitted_in_float32():
    model = Small(nnx.Rngs(0), 8, 8)
    model.conv2.dtype = jnp.bfloat16
    _, small, plan = compressed(fj.Falcon(), randomised(model), ("conv1",))
    errors = []
    fitted = calibrate(model, small, plan, batches(), report=errors.append)
    assert fitted.conv2.pointwise[...].dtype == jnp.float32
    assert errors[0].after < errors[0].before


def test_bad_calibration_is_told():
    model, small, plan = compressed(fj.Falcon())
    with pytest.raises(ValueError, match="at least one batch"):
        fj.calibrate(model, small, plan, [])
    with pytest.raises(ValueError, match="Plain cannot be called on the sample"):
        fj.calibrate(model, small, plan, [draw(2, 8, 8, 5)])
    with pytest.raises(ValueError, match=r"4 points of .second., fewer than its 8 channels; .* 72"):
        fj.calibrate(model, small, plan, [images(1)], points=4)
    with pytest.raises(ValueError, match="points is at least 1"):
        fj.calibrate(model, small, plan, batches(), points=0)
    with pytest.raises(ValueError, match=r"'second' by .* has not got it"):
        fj.calibrate(model, model, plan, batches())
    nothing = fj.make_plan(model, [fj.Rule(method=None)], SAMPLE)
    with pytest.raises(ValueError, match="replaces no layer"):
        fj.calibrate(model, model, nothing, batches())
    with pytest.raises(ValueError, match="what 'second' gets is not finite"):
        fj.calibrate(model, small, plan, [x * np.inf for x in batches()])
    with pytest.raises(ValueError, match=r"Lifted is a Linen module without variables"):
        fj.calibrate(Lifted(), Lifted(), plan, batches())


def test_progress_is_shown_layer_by_layer(capsys):
    model, small, plan = compressed(fj.ChannelDecomposition(rank=3))
    fj.calibrate(model, small, plan, batches(1), progress=True)
    lines = capsys.readouterr().err.split("\r")[1:]
    assert [line.split(",")[0][-3:] for line in lines] == ["0/2", "1/2", "2/2"]
    assert lines[1].rstrip().endswith("third") and lines[2].endswith("\n")


def test_layers_that_cannot_be_looked_at_are_listed():
    model, small, plan = linen(Twice(loop=True), fj.Falcon())
    with pytest.warns(UserWarning, match="stay as they were: last is called inside a loop"):
        fitted = plainly(model, small, plan, batches())
    old, new = (m.unbind()[1]["params"]["last"] for m in (small, fitted))
    assert all(np.array_equal(old[name], new[name]) for name in old)
