import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from falcon_jax.data.batching import train_batches
from falcon_jax.training.devices import data_mesh
from falcon_jax.training.evaluation import make_eval_step
from falcon_jax.training.network import Network
from falcon_jax.training.step import cross_entropy
from tests.training.steps import PLAIN, assert_same, four_steps, one_device
from tests.training.tiny import Tiny, tiny_dataset


def log_softmax(logits):
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_cross_entropy_in_float64(smoothing):
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(6, 5)) * 20, np.array([0, 1, 2, 3, 4, 0])
    targets = (1 - smoothing) * np.eye(5)[labels] + smoothing / 5
    expected = -(targets * log_softmax(logits)).sum(axis=1)
    found = cross_entropy(
        jnp.asarray(logits, jnp.float32), jnp.asarray(labels), label_smoothing=smoothing
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


class Lookup(nnx.Module):
    """Logits are a row of a table; the row is the image's first value."""

    def __init__(self, table):
        self.table = nnx.Param(jnp.asarray(table, jnp.float32))

    def __call__(self, x):
        return self.table[jnp.round(x[:, 0, 0, 0] * 255).astype(int)]


def sums(table, labels, mask):
    """Evaluate a batch whose logits are the rows of ``table``."""
    n = len(table)
    images = np.zeros((n, 1, 1, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(n)
    network, params, statistics = Network.split(Lookup(table))
    batch = {
        "image": jnp.asarray(images),
        "label": jnp.asarray(labels, jnp.int32),
        "mask": jnp.asarray(mask, jnp.float32),
    }
    found = make_eval_step(network, PLAIN)(params, statistics, batch)
    return {name: float(value) for name, value in found.items()}


def test_eval_step_sums_what_the_mask_counts():
    random = np.random.default_rng(1)
    table, labels = random.normal(size=(250, 10)), random.integers(0, 10, 250)
    mask = random.integers(0, 2, 250)
    found = sums(table, labels, mask)
    order = np.argsort(-table, axis=1)
    top1 = (order[:, 0] == labels) @ mask
    top5 = (order[:, :5] == labels[:, None]).any(axis=1) @ mask
    loss = -log_softmax(table)[np.arange(250), labels] @ mask
    assert 0 < top1 < top5 < mask.sum()
    assert (found["top1"], found["top5"], found["count"]) == (top1, top5, mask.sum())
    assert found["loss"] == pytest.approx(loss, rel=1e-5)


def test_equal_logits_are_ranked_by_class_and_not_all_correct():
    found = sums(np.zeros((10, 10)), np.arange(10), np.ones(10))
    assert (found["top1"], found["top5"]) == (1, 5)


def test_with_fewer_than_five_classes_every_guess_is_among_the_best():
    found = sums(np.eye(3), [1, 1, 1], np.ones(3))
    assert (found["top1"], found["top5"]) == (1, 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_wrong(bad):
    table = np.full((3, 3), bad)
    table[0] = [5.0, 0.0, 0.0]
    found = sums(table, [0, 0, 0], np.ones(3))
    assert (found["top1"], found["top5"], found["count"]) == (1, 1, 3)


def test_padding_that_gives_nan_counts_for_nothing():
    table = np.array([[2.0, 0.0], [np.nan, np.nan]])
    found = sums(table, [0, 0], [1.0, 0.0])
    assert (found["top1"], found["count"]) == (1, 1)
    assert found["loss"] == pytest.approx(np.log1p(np.exp(-2.0)), rel=1e-5)


@pytest.fixture(scope="module")
def on_eight():
    assert jax.device_count() == 8
    return four_steps(data_mesh())


def test_eight_devices_do_as_one_does(on_eight):
    assert_same(on_eight, four_steps(one_device()))


def test_training_changes_everything_and_the_loss_is_that_before_the_update(on_eight):
    state, metrics = on_eight
    _, params, statistics = Network.split(Tiny())
    del params["layers/0/bias"]  # BatchNorm takes its gradient away
    for name, value in (params | statistics).items():
        assert not np.allclose(value, (state.params | state.statistics)[name]), name
    assert metrics[0]["loss"] == pytest.approx(np.log(10), abs=0.8)


def test_the_first_steps_metrics_and_update_by_hand():
    dataset = tiny_dataset(validation=0.0)
    state, metrics = four_steps(data_mesh(), preprocessing=PLAIN, dropout=0.0, label_smoothing=0.0)
    batch = next(iter(train_batches(dataset.train, 40, seed=0, epoch=0)))
    model = Tiny(dropout=0.0)
    model.train()
    logits = np.asarray(model(jnp.asarray(batch["image"] / 255.0, jnp.float32)), np.float64)
    expected = -log_softmax(logits)[np.arange(40), batch["label"]].mean()
    assert metrics[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics[0]["accuracy"] == pytest.approx((logits.argmax(1) == batch["label"]).mean())
    assert int(state.step) == 4


def test_the_key_alone_decides(on_eight):
    again, _ = four_steps(data_mesh())
    for a, b in zip(jax.tree.leaves(on_eight[0]), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    other, _ = four_steps(data_mesh(), key=jax.random.key(8))
    assert not np.array_equal(on_eight[0].params["head/kernel"], other.params["head/kernel"])


def test_bfloat16_keeps_parameters_and_statistics_in_float32():
    state, metrics = four_steps(data_mesh(), model=Tiny(dropout=0.0, dtype=jnp.bfloat16))
    exact, _ = four_steps(data_mesh(), dropout=0.0)
    for name, value in (state.params | state.statistics).items():
        assert value.dtype == np.float32, name
    floats = [a for a in jax.tree.leaves(state.opt_state) if np.issubdtype(a.dtype, np.floating)]
    assert floats and all(a.dtype == np.float32 for a in floats)
    assert all(values["loss"].dtype == np.float32 for values in metrics)
    # Computed coarsely, and therefore not equal, but not far away either.
    difference = np.abs(state.params["head/kernel"] - exact.params["head/kernel"]).max()
    assert 0 < difference < 0.02
