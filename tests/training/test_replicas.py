"""The step under pmap, BatchNorm per replica, accumulation: each against one device by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from falcon_jax.data.batching import train_batches
from falcon_jax.training.devices import data_mesh
from falcon_jax.training.network import Network
from falcon_jax.training.step import cross_entropy
from tests.training.steps import PLAIN, assert_same, four_steps, one_device
from tests.training.tiny import Tiny, Touchy, tiny_dataset

both = pytest.mark.parametrize("parallel", ["jit", "pmap"])


@pytest.fixture(scope="module")
def on_one():
    return four_steps(one_device())


def test_replicas_under_pmap_do_as_one_device_does(on_one):
    assert_same(four_steps(data_mesh(), parallel={"parallel": "pmap"}), on_one)


@both
def test_batchnorm_per_replica_is_that_of_each_devices_rows(parallel):
    state, metrics = four_steps(
        data_mesh(),
        parallel={"parallel": parallel, "batchnorm": "per_replica"},
        dropout=0.0,
        preprocessing=PLAIN,
        label_smoothing=0.0,
    )
    expected, losses = ghost_steps(8)
    for name, value in expected.items():
        found = (state.params | state.statistics)[name]
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-5, err_msg=name)
    np.testing.assert_allclose([m["loss"] for m in metrics], losses, rtol=1e-5)


def ghost_steps(replicas):
    """SGD with momentum by hand on one device, part by part; running statistics are averaged."""
    network, params, statistics = Network.split(Tiny(dropout=0.0))
    velocity = jax.tree.map(jnp.zeros_like, params)
    key = jax.random.key(0)

    @jax.jit
    @jax.value_and_grad
    def gradient(params, parts, labels):
        losses = [
            cross_entropy(network.apply_training(params, statistics, x, key)[0], y)
            for x, y in zip(parts, labels, strict=True)
        ]
        return jnp.concatenate(losses).mean()

    losses = []
    dataset = tiny_dataset(validation=0.0).train
    for step, batch in enumerate(train_batches(dataset, 40, seed=0, epoch=0)):
        parts = jnp.split(jnp.asarray(batch["image"] / 255.0, jnp.float32), replicas)
        value, gradients = gradient(params, parts, jnp.split(jnp.asarray(batch["label"]), replicas))
        new = [network.apply_training(params, statistics, part, key)[1] for part in parts]
        statistics = {name: sum(s[name] for s in new) / replicas for name in statistics}
        rate = 0.1 if step < 2 else 0.01
        velocity = {n: 0.9 * v + gradients[n] + 0.01 * params[n] for n, v in velocity.items()}
        params = {n: p - rate * velocity[n] for n, p in params.items()}
        losses.append(float(value))
    return params | statistics, losses


class WithoutNorm(Tiny):
    """Tiny without BatchNorm, so that the parts of a batch do not see each other."""

    def __call__(self, x):
        x = jax.nn.relu(self.layers[0](x)).mean(axis=(1, 2))
        return self.head(x).astype(jnp.float32)


@both
def test_accumulated_gradients_are_those_of_the_whole_batch(parallel):
    whole = four_steps(one_device(), model=WithoutNorm())
    options = {"model": WithoutNorm(), "parallel": {"parallel": parallel}}
    assert_same(four_steps(data_mesh(), accumulate=5, **options), whole)


def test_accumulation_is_the_same_on_any_number_of_devices():
    one = four_steps(one_device(), accumulate=5)
    assert_same(four_steps(data_mesh(), accumulate=5), one)
    assert_same(four_steps(data_mesh(), accumulate=5, parallel={"parallel": "pmap"}), one)


@both
def test_any_process_may_ask_for_a_stop(parallel):
    def asking(index, batch):
        batch["stop"][17] = index == 2
        return batch

    _, metrics = four_steps(data_mesh(), change=asking, parallel={"parallel": parallel})
    assert [float(m["stop"]) for m in metrics] == [0, 0, 1, 0]


@both
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(parallel):
    def white(index, batch):
        return batch | {"image": np.full_like(batch["image"], 255)} if index == 1 else batch

    state, metrics = four_steps(
        data_mesh(),
        model=Touchy(),
        preprocessing=PLAIN,
        change=white,
        parallel={"parallel": parallel},
    )
    assert [int(m["skipped"]) for m in metrics] == [0, 1, 1, 1]
    assert not np.isfinite(metrics[1]["loss"])
    assert (int(state.step), int(state.skipped)) == (4, 1)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(state))
