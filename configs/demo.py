"""The demo: a small VGG on scikit-learn's digits, compressed with FALCON of rank 1, 2 and 3.

Command: python train.py --config=configs/demo.py --workdir=runs/demo
Machine: two CPU cores
Run time: 3 min 24 s (results/demo/run_time.json)
Expected score: 97% or better for the standard model and for rank 2 after fine-tuning
"""

from typing import Any

from ml_collections import ConfigDict

from falcon_jax.training.config import default_config


def get_config() -> ConfigDict:
    """Return the demo's config."""
    config: Any = default_config()
    config.model.name = "vgg8_cifar"
    config.data.source = "digits"
    config.data.augmentation.crop_padding = 2
    config.train.epochs = 9
    config.train.batch_size = 64
    config.train.learning_rate = 0.05
    config.train.schedule = "cosine"
    config.train.warmup_epochs = 1.0
    config.train.weight_decay = 5e-4
    config.finetune.update(config.train)
    config.finetune.epochs = 5
    config.finetune.learning_rate = 0.02
    config.compression.rules = (("stages/0/0/conv", None),)
    config.compression.variants = {
        f"falcon_k{rank}": {"method": "falcon", "rank": rank} for rank in (1, 2, 3)
    }
    return config
