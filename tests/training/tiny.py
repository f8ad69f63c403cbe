"""A small network with everything that training must cope with, and small data."""

import jax
import jax.numpy as jnp
from flax import nnx

from falcon_jax.data.dataset import Dataset, channel_statistics, hold_out
from falcon_jax.data.fake import make_fake
from falcon_jax.training.config import (
    CheckpointConfig,
    DataConfig,
    ExperimentConfig,
    LogConfig,
    TrainConfig,
)
from falcon_jax.training.devices import data_mesh
from falcon_jax.training.interruption import Interruption
from falcon_jax.training.loop import Job
from falcon_jax.training.step import Preprocessing

QUIET = LogConfig(tensorboard=False, progress=False)


class Tiny(nnx.Module):
    """Convolution, BatchNorm, dropout and a fully connected layer."""

    def __init__(self, *, dropout=0.25, dtype=None, seed=0):
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List(
            [
                nnx.Conv(3, 6, (3, 3), 2, dtype=dtype, rngs=rngs),
                nnx.BatchNorm(6, dtype=dtype, rngs=rngs),
            ]
        )
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Linear(6, 10, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        x = jax.nn.relu(x).mean(axis=(1, 2))
        return self.head(self.dropout(x)).astype(jnp.float32)


class Touchy(Tiny):
    """A network that cannot stand white images."""

    def __call__(self, x):
        return super().__call__(x) * jnp.where(x.min() > 0.9, jnp.nan, 1.0)


def tiny_dataset(*, validation=0.25, num_train=160, num_test=45, seed=0):
    splits = make_fake(image_size=8, seed=seed, num_train=num_train, num_test=num_test)
    train, held_out = hold_out(splits.train, validation, 0)
    mean, std = channel_statistics(train.images)
    return Dataset(
        name="fake",
        num_classes=10,
        train=train,
        validation=held_out,
        test=splits.test,
        mean=mean,
        std=std,
    )


def tiny_job(
    directory,
    *,
    dataset=None,
    augmentation=None,
    mesh=None,
    log=QUIET,
    every_steps=0,
    interruption=None,
    **settings,
):
    dataset = tiny_dataset() if dataset is None else dataset
    options = {} if augmentation is None else {"augmentation": augmentation}
    preprocessing = Preprocessing(mean=dataset.mean, std=dataset.std, **options)
    chosen = {"epochs": 3, "batch_size": 40, "boundaries": (2.0,), "learning_rate": 0.05}
    recipe = TrainConfig(**(chosen | settings))
    return Job(
        label="tiny",
        directory=directory,
        config=ExperimentConfig(
            seed=3,
            data=DataConfig(**options),
            train=recipe,
            checkpoint=CheckpointConfig(keep=1, every_steps=every_steps),
            log=log,
        ),
        recipe=recipe,
        dataset=dataset,
        preprocessing=preprocessing,
        interruption=Interruption() if interruption is None else interruption,
        mesh=data_mesh() if mesh is None else mesh,
        meta={"model": "tiny"},
    )
