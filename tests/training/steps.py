"""Four training steps on small data, in every way that devices can share a batch."""

import jax
import numpy as np

from falcon_jax.data.augmentation import Augmentation
from falcon_jax.data.batching import train_batches
from falcon_jax.training.config import TrainConfig
from falcon_jax.training.devices import replicate
from falcon_jax.training.network import Network
from falcon_jax.training.optimizers import make_optimizer
from falcon_jax.training.parallel import make_parallel_step
from falcon_jax.training.step import Preprocessing, init_state
from tests.training.tiny import Tiny, tiny_dataset

PLAIN = Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3)
VARIED = Preprocessing(
    mean=(0.5,) * 3, std=(0.25,) * 3, augmentation=Augmentation(crop_padding=1, flip=True)
)


def one_device():
    return jax.make_mesh(
        (1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1]
    )


def four_steps(
    mesh,
    *,
    preprocessing=VARIED,
    model=None,
    dropout=0.25,
    parallel=None,
    change=None,
    taught=None,
    **options,
):
    """Train for four steps and return what there is then, and the metrics of every step."""
    model = Tiny(dropout=dropout) if model is None else model
    recipe = TrainConfig(learning_rate=0.1, boundaries=(2.0,), weight_decay=0.01)
    optimizer = make_optimizer(recipe, 1)
    network, params, statistics = Network.split(model)
    key = options.pop("key", jax.random.key(7))
    step = make_parallel_step(
        network,
        optimizer,
        preprocessing,
        mesh,
        **({"parallel": "jit", "batchnorm": "synchronised"} | (parallel or {})),
        **({"label_smoothing": 0.1} | options),
    )
    state = step.place(replicate(init_state(params, statistics, optimizer), mesh))
    teacher = None if taught is None else step.place_teacher(*taught)
    metrics = []
    batches = train_batches(tiny_dataset(validation=0.0).train, 40, seed=0, epoch=0)
    for index, batch in enumerate(batches):
        batch = {name: batch[name] for name in ("image", "label")}
        batch |= {"stop": np.zeros(40, np.float32)}
        batch = batch if change is None else change(index, batch)
        state, values = step(state, batch, key, teacher)
        metrics.append(jax.device_get(values))
    return step.gather(state), metrics


def assert_same(found, expected):
    (state, metrics), (expected_state, expected_metrics) = found, expected
    assert int(state.step) == int(expected_state.step) == 4
    assert jax.tree.structure(state) == jax.tree.structure(expected_state)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(metrics, expected_metrics, strict=True):
        for name, value in a.items():
            np.testing.assert_allclose(value, b[name], rtol=2e-5, atol=1e-6, err_msg=name)
