"""Models trained to answer as others do, against losses computed in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import falcon_jax as fj
from tests.compression.linen_networks import Lifted, drawn
from tests.compression.networks import Small, arrays, images, randomised
from tests.compression.test_sensitivity import Net, batches

DATA = batches(5, 16)


def compressed(model, sample, method=None):
    rules = [fj.Rule(method=method or fj.Falcon())]
    return fj.compress(model, fj.make_plan(model, rules, sample))


@pytest.fixture(scope="module")
def net():
    model = Net(nnx.Rngs(0))
    return model, compressed(model, images(1, 8))


def relative(y, z):
    y, z = np.float64(y), np.float64(z)
    return ((y - z) ** 2).sum() / ((y - y.mean(tuple(range(y.ndim - 1)))) ** 2).sum()


def test_the_loss_that_it_begins_with(net):
    model, small = net
    for options, weight in (({}, 1.0), ({"response_weight": 0.0}, 0.0)):
        looks = []
        fj.distill(model, small, DATA, steps=1, report=looks.append, **options)
        x = DATA[-1]  # a fifth of five
        far, y, z = [], x, x
        for name in ("first", "second", "third"):
            y, z = getattr(model, name)(y), getattr(small, name)(z)
            far.append(relative(y, z))
            y, z = jax.nn.relu(y), jax.nn.relu(z)
        expected = far[-1] + weight * np.mean(far)
        assert looks[0].step == 0 and looks[0].loss == pytest.approx(expected, rel=1e-4)


def test_a_divergence_at_a_temperature(net):
    model, small = net
    looks = []
    options = {"temperature": 2.0, "response_weight": 0.0, "steps": 1}
    fj.distill(model, small, DATA, report=looks.append, **options)
    f, g = (np.float64(m(DATA[-1])) / 2 for m in (model, small))
    p, q = (np.exp(y) / np.exp(y).sum(-1, keepdims=True) for y in (f, g))
    expected = 4 * (p * np.log(p / q)).sum(-1).mean()
    assert looks[0].loss == pytest.approx(expected, rel=1e-4)


def test_it_comes_nearer_to_the_original_and_changes_nothing_else(net):
    model, small = net
    before = arrays(model), arrays(small)
    looks = []
    better = fj.distill(
        model, small, DATA, steps=60, learning_rate=1e-2, looks=6, report=looks.append
    )
    new = images(16, 8, seed=99)
    assert relative(model(new), better(new)) < 0.8 * relative(model(new), small(new))
    for then, now in zip(before, (arrays(model), arrays(small)), strict=True):
        assert all(np.array_equal(then[name], now[name]) for name in then)
    least = min(min(look.loss, look.averaged) for look in looks)
    again = []
    fj.distill(model, better, DATA, steps=1, report=again.append)
    assert again[0].loss == pytest.approx(least, rel=1e-4)


def test_it_is_never_worse_than_at_the_start(net):
    model, small = net
    looks = []
    wild = fj.distill(model, small, DATA, steps=20, learning_rate=1e3, looks=4, report=looks.append)
    assert min(look.loss for look in looks[1:]) > looks[0].loss
    x = DATA[0]
    np.testing.assert_array_equal(wild(x), small(x))


def test_it_ends_where_nothing_is_gained(net):
    model, small = net
    looks = []
    options = {"steps": 40, "learning_rate": 1e3, "looks": 20}
    fj.distill(model, small, DATA, report=looks.append, **options)
    assert [look.step for look in looks] == [0, 2, 4, 6, 8, 10, 12]


def test_statistics_estimated_anew_are_kept_if_they_help():
    model = Small(nnx.Rngs(0), m=8, n=8)
    randomised(model)
    model.eval()
    sample = images(1, 8)
    small = compressed(model, sample)
    data = [images(32, 8, seed=seed) for seed in range(5)]
    frozen = fj.distill(model, small, data, steps=1, learning_rate=1e-9)
    again = fj.distill(model, small, data, steps=1, learning_rate=1e-9, batchnorm="reestimate")
    means = [m.norm2.mean[...] for m in (frozen, again)]
    np.testing.assert_array_equal(means[0], model.norm2.mean[...])
    x = data[-1]
    kept = np.array_equal(means[0], means[1])
    estimated = fj.reestimate_batchnorm(frozen, data[:-1])
    losses = []
    for candidate in (frozen, estimated):
        fj.distill(model, candidate, data, steps=1, report=losses.append)
    assert kept == (losses[0].loss <= losses[2].loss)
    assert again(x).shape == model(x).shape


def test_linen_and_batches_of_unequal_size():
    bound = Lifted().bind(drawn(Lifted()))
    data = [fj.Inputs(images(n, 8, seed=n), train=False) for n in (16, 16, 7)]
    plan = fj.make_plan(bound, [fj.Rule(path=r".*", method=None)], data[0])
    paths = [row.path for row in plan.rows if row.spec.taps > 1]
    rules = [fj.Rule(path=paths[0], method=fj.Falcon()), fj.Rule(method=None)]
    small = fj.compress(bound, fj.make_plan(bound, rules, data[0]))
    looks = []
    better = fj.distill(bound, small, data, steps=8, learning_rate=1e-3, report=looks.append)
    assert looks[-1].step == 8
    x = images(4, 8, seed=5)
    assert better(x, train=False).shape == bound(x, train=False).shape


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"steps": 0}, "steps is a whole number"),
        ({"looks": 0}, "looks is a whole number"),
        ({"learning_rate": 0.0}, "learning_rate is a number above 0"),
        ({"temperature": -1.0}, "temperature is a number above 0"),
        ({"response_weight": -1.0}, "response_weight is a number of at least 0"),
        ({"ema": 1.0}, "ema is at least 0 and below 1"),
        ({"batches": DATA[:1]}, "two batches or more"),
    ],
)
def test_bad_input_is_told(net, options, told):
    given = {"batches": DATA, **options}
    with pytest.raises(ValueError, match=told):
        fj.distill(*net, given.pop("batches"), **given)


def test_models_that_do_not_answer_alike_are_told(net):
    model, _ = net
    other = Net(nnx.Rngs(0))
    other.third = nnx.Conv(8, 7, (3, 3), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="outputs are not alike"):
        fj.distill(model, other, DATA)
    broken = Net(nnx.Rngs(0))
    broken.third.bias[...] = jnp.full(6, jnp.nan)
    with pytest.raises(ValueError, match="not finite"):
        fj.distill(model, broken, DATA)
