import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from falcon_jax.data.dataset import Split
from falcon_jax.training.devices import data_mesh
from falcon_jax.training.evaluation import evaluate, make_eval_step
from falcon_jax.training.network import Network
from falcon_jax.training.step import Preprocessing
from tests.training.tiny import Tiny, tiny_dataset


class FirstPixel(nnx.Module):
    """Guesses the class that the first pixel says."""

    def __init__(self):
        self.scale = nnx.Param(jnp.ones(1))

    def __call__(self, x):
        at = jnp.arange(10)[None, :] == jnp.round(x[:, 0, 0, :1] * 255)
        return jnp.where(at, 3.0, 0.0)


@pytest.fixture(scope="module")
def evaluated():
    """Evaluate 45 images of which 29 are guessed."""
    labels = np.arange(45, dtype=np.int32) % 10
    images = np.zeros((45, 2, 2, 3), np.uint8)
    images[:, 0, 0, 0] = np.where(np.arange(45) < 29, labels, (labels + 1) % 10)
    network, params, statistics = Network.split(FirstPixel())
    step = make_eval_step(network, Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3))
    split = Split(images=images, labels=labels)

    def run(batch_size):
        return evaluate(step, params, statistics, split, batch_size=batch_size, mesh=data_mesh())

    return run


@pytest.mark.parametrize("batch_size", [1, 7, 8, 40, 45, 48, 1000])
def test_every_image_counts_exactly_once(evaluated, batch_size):
    result = evaluated(batch_size)
    assert result.count == 45
    assert result.top1 == pytest.approx(29 / 45)
    total = np.exp(3) + 9
    expected = (29 * np.log(total / np.exp(3)) + 16 * np.log(total)) / 45
    assert result.loss == pytest.approx(expected, rel=1e-5)


def test_equals_one_pass_over_all_images_with_batchnorm():
    dataset = tiny_dataset()
    model = Tiny()
    network, params, statistics = Network.split(model)
    preprocessing = Preprocessing(mean=dataset.mean, std=dataset.std)
    result = evaluate(
        make_eval_step(network, preprocessing),
        params,
        statistics,
        dataset.test,
        batch_size=16,
        mesh=data_mesh(),
    )
    model.eval()
    x = (dataset.test.images / 255.0 - np.array(dataset.mean)) / np.array(dataset.std)
    logits = np.asarray(model(jnp.asarray(x, jnp.float32)), np.float64)
    labels = dataset.test.labels
    logits -= logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(45), labels]
    top5 = (np.argsort(-logits, axis=1)[:, :5] == labels[:, None]).any(axis=1)
    assert result.count == 45
    assert result.loss == pytest.approx(losses.mean(), rel=1e-5)
    assert result.top1 == pytest.approx((logits.argmax(axis=1) == labels).mean())
    assert result.top5 == pytest.approx(top5.mean())
