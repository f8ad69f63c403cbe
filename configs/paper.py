"""The paper's recipe, for the config files of its models and data sets; not a config itself.

SGD with momentum 0.9 and weight decay 1e-4, batch 128; compressed models are fine-tuned with the
recipe that trained the standard one. The paper takes the best of the learning rates 0.5, 0.1 and
0.01; here it is 0.1, and ``--config.train.learning_rate`` and ``--config.finetune.learning_rate``
change it. The best epoch is chosen on a tenth of the training split that is held out.

Reference:
    FALCON, Section 4.1.3.
"""

from typing import Any

from ml_collections import ConfigDict

from falcon_jax.training.config import default_config

FIRST_CONV_STAYS = (("stages/0/0/conv", None),)
STEM_AND_SHORTCUTS_STAY = (("stem/.*", None), (r".*/shortcut/.*", None))


def cifar(model: str, name: str) -> ConfigDict:
    """Return the config for CIFAR-10 or CIFAR-100: crops and flips, 350 epochs.

    Args:
        model: ``vgg19_cifar`` or ``resnet34_cifar``.
        name: ``cifar10`` or ``cifar100``.
    """
    config = _recipe(model, epochs=350, boundaries=(150.0, 250.0))
    config.data.update({"source": "tfds", "name": name})
    config.data.augmentation.update({"crop_padding": 4, "flip": True})
    return config


def svhn(model: str) -> ConfigDict:
    """Return the config for SVHN: no augmentation, 350 epochs.

    Args:
        model: ``vgg19_cifar`` or ``resnet34_cifar``.
    """
    config = _recipe(model, epochs=350, boundaries=(150.0, 250.0))
    config.data.update({"source": "tfds", "name": "svhn_cropped"})
    return config


def fashion_mnist(model: str) -> ConfigDict:
    """Return the config for Fashion-MNIST, which the paper has not: crops and flips, 30 epochs.

    Args:
        model: ``vgg19_cifar`` or ``resnet34_cifar``.
    """
    config = _recipe(model, epochs=30, boundaries=(15.0, 25.0))
    config.data.update({"source": "idx", "name": "fashion_mnist"})
    config.data.augmentation.update({"crop_padding": 4, "flip": True})
    return config


def imagenet(model: str, *, script: bool = False) -> ConfigDict:
    """Return the config for ImageNet, from converted weights of torchvision.

    Args:
        model: ``vgg16_bn`` or ``resnet18``.
        script: whether to tune as the authors' script does (cosine from 0.01, batch 96, no weight
            decay) instead of as the paper says.
    """
    config = _recipe(model, epochs=90, boundaries=(30.0, 60.0))
    config.data.update({"source": "tfds", "name": "imagenet2012", "image_size": 224, "workers": 8})
    # The validation images are the test split; the best epoch is chosen on images held out.
    config.data.validation_fraction = 0.01
    config.compression.start = f"runs/{model}"
    config.checkpoint.every_steps = 1000
    for stage in (config.train, config.finetune):
        stage.learning_rate = 0.01
        if script:
            stage.update({"schedule": "cosine", "batch_size": 96, "weight_decay": 0.0})
    for name in ("falcon_k1_unfitted", "gep_in", "dpconv"):
        del config.compression.variants[name]
    return config


def _recipe(model: str, *, epochs: int, boundaries: tuple[float, ...]) -> Any:
    config: Any = default_config()
    config.model.name = model
    config.data.validation_fraction = 0.1
    for stage in (config.train, config.finetune):
        stage.update(
            {
                "epochs": epochs,
                "batch_size": 128,
                "optimizer": "sgd",
                "learning_rate": 0.1,
                "momentum": 0.9,
                "weight_decay": 1e-4,
                "schedule": "step",
                "boundaries": boundaries,
                "factor": 0.1,
            }
        )
    # Every convolution of VGG is replaced, but DPConv keeps the first.
    rules, dpconv_rules = (), FIRST_CONV_STAYS
    if model.startswith("resnet"):
        rules = dpconv_rules = STEM_AND_SHORTCUTS_STAY
    separable = {"method": "depthwise_separable", "rank": 1}
    config.compression.rules = rules
    config.compression.variants = {
        "falcon_k1": {"method": "falcon", "rank": 1},
        "falcon_k2": {"method": "falcon", "rank": 2},
        "falcon_k3": {"method": "falcon", "rank": 3},
        "falcon_k1_unfitted": {"method": "falcon", "rank": 1, "solver": "random"},
        "gep_in": separable,
        "dpconv": {**separable, "solver": "random", "rules": dpconv_rules},
    }
    return config
