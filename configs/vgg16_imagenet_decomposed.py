"""VGG16 on ImageNet at the published operating points of network decoupling and its sisters.

Nothing is fine-tuned. Mult-adds of the convolutions, standard 15.36G: ND 8.59G, SD 7.19G, CD 6.52G,
SD+ND 4.16G, CD+ND 4.73G, CD+SD 4.32G; published (arXiv 1808.05517): 8.61G, 7.20G, 6.52G, 4.15G,
4.72G, 4.32G.

Data: python -m falcon_jax prepare --name=imagenet2012
Command: python train.py --config=configs/vgg16_imagenet_decomposed.py --workdir=runs/vgg16
Machine: one GPU
Run time: not yet run
Expected score: not yet run
"""

from typing import Any

from ml_collections import ConfigDict

from falcon_jax.training.config import default_config


def get_config() -> ConfigDict:
    """Return the config of the decomposed VGG16."""
    config: Any = default_config()
    config.model.name = "vgg16"
    config.data.update({"source": "tfds", "name": "imagenet2012", "image_size": 224})
    config.train.update({"epochs": 90, "learning_rate": 0.01, "boundaries": (30.0, 60.0)})
    config.finetune.epochs = 0
    first = ("features/0", None)
    config.compression.rules = (first,)
    spatial = {"method": "spatial_decomposition"}
    channels = {"method": "channel_decomposition"}
    four_terms = {"method": "decoupled", "terms": 4}
    config.compression.variants = {
        "nd": {
            "method": "decoupled",
            "terms": 5,
            "rules": (first, ("features/(2|7)", four_terms)),
        },
        "sd": {**spatial, "budget": 2.14},
        "cd": {**channels, "budget": 2.36},
        "sd_nd": {**spatial, "budget": 2.56, "inner": {"method": "decoupled", "terms": 2}},
        "cd_nd": {**channels, "budget": 1.4, "inner": {"method": "decoupled", "terms": 3}},
        "cd_sd": {**channels, "budget": 2.0, "inner": {**spatial, "budget": 2.0}},
    }
    return config
