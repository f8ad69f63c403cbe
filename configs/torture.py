"""A small experiment with everything that must survive a kill: augmentation, dropout, BatchNorm.

Command: python train.py --config=configs/torture.py --workdir=runs/torture
Killed again and again: python -m benchmarks.torture --kills=100
Machine: two CPU cores
Run time: half a minute, most of it for starting and compiling
Expected score: 100% on made images, standard and compressed
"""

from typing import Any

from ml_collections import ConfigDict

from falcon_jax.training.config import default_config


def get_config() -> ConfigDict:
    """Return the config of the tortured runs."""
    config: Any = default_config()
    config.model.name = "vgg8_cifar"
    config.data.source = "fake"
    config.data.image_size = 8
    config.data.train_fraction = 0.25
    config.data.augmentation.update({"crop_padding": 1, "flip": True})
    config.train.epochs = 4
    config.train.batch_size = 32
    config.train.learning_rate = 0.05
    config.train.schedule = "cosine"
    config.finetune.update(config.train)
    config.finetune.epochs = 3
    config.finetune.learning_rate = 0.02
    config.checkpoint.every_steps = 5
    config.compression.rules = (("stages/0/0/conv", None),)
    config.compression.variants = {"falcon_k1": {"method": "falcon", "rank": 1}}
    return config
