"""Fine-tuning that learns from another network's answers, too."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from falcon_jax.training.devices import data_mesh
from falcon_jax.training.network import Network
from falcon_jax.training.step import Teacher, init_state, make_train_step
from tests.training.steps import PLAIN, assert_same, four_steps, one_device
from tests.training.tiny import Tiny


def taught(**options):
    network, *arrays = Network.split(Tiny(seed=5))
    return Teacher(network=network, **options), tuple(arrays)


def softmax(y):
    y = np.exp(y - y.max(-1, keepdims=True))
    return y / y.sum(-1, keepdims=True)


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_the_loss_is_that_of_labels_and_answers(weight):
    teacher, arrays = taught(weight=weight, temperature=3.0)
    network, params, statistics = Network.split(Tiny(seed=1, dropout=0.0))
    step = make_train_step(network, optax.sgd(0.1), PLAIN, label_smoothing=0.0, teacher=teacher)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 8, 8, 3), np.uint8)
    labels = rng.integers(0, 3, 6).astype(np.int32)
    batch = {"image": images, "label": labels, "stop": np.zeros(6, np.float32)}
    taught_arrays = {"params": arrays[0], "statistics": arrays[1]}
    _, metrics = jax.jit(step)(
        init_state(params, statistics, optax.sgd(0.1)), batch, jax.random.key(0), taught_arrays
    )
    x = jnp.asarray(images, jnp.float32) / 255
    logits, _ = network.apply_training(params, statistics, x, jax.random.key(0))
    answers = np.float64(teacher.network.apply(*arrays, x))
    logits = np.float64(logits)
    own = -np.log(softmax(logits)[np.arange(6), labels]).mean()
    p, q = softmax(answers / 3), softmax(logits / 3)
    divergence = 9 * (p * np.log(p / q)).sum(-1).mean()
    expected = (1 - weight) * own + weight * divergence
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("parallel", "batchnorm"),
    [
        ("jit", "synchronised"),
        ("pmap", "per_replica"),
        pytest.param("pmap", "synchronised", marks=pytest.mark.slow),
        pytest.param("jit", "per_replica", marks=pytest.mark.slow),
    ],
)
def test_eight_devices_learn_as_one_does(parallel, batchnorm):
    teacher, arrays = taught(weight=0.5, temperature=2.0)
    options = {"teacher": teacher, "taught": arrays, "accumulate": 1}
    ways = {"parallel": parallel, "batchnorm": batchnorm}
    if batchnorm == "per_replica":
        # Each device has its own statistics: only that it runs, and learns something else.
        found = four_steps(data_mesh(), parallel=ways, **options)
        alone = four_steps(data_mesh(), parallel=ways)
        assert np.isfinite([m["loss"] for m in found[1]]).all()
        assert found[1][-1]["loss"] != alone[1][-1]["loss"]
        return
    assert_same(
        four_steps(data_mesh(), parallel=ways, **options), four_steps(one_device(), **options)
    )
