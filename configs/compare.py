"""Every method of the paper's Tables 4 and 5 on one network, trained with one recipe.

Command: python -m benchmarks.compare --config=configs/compare.py:digits --workdir=runs/compare
Others: configs/compare.py:MODEL/DATA, MODEL vgg19_cifar or resnet34_cifar, DATA fashion_mnist,
  cifar10, cifar100 or svhn
Machine: two CPU cores for digits, a GPU for the others
Run time: 21 minutes for digits with two seeds; the others not yet run
Expected score: see docs/results.md for digits; the others not yet run
"""

from typing import Any

from ml_collections import ConfigDict

from configs import demo, paper

BRANCH_WIDTH = {"vgg19_cifar": 1.75, "resnet34_cifar": 1.625, "vgg8_cifar": 1.75}
CIFAR_AND_SVHN = ("cifar10", "cifar100", "svhn")


def get_config(which: str = "digits") -> ConfigDict:
    """Return the config of a comparison.

    Args:
        which: ``digits``, or a model and a data set, such as ``vgg19_cifar/fashion_mnist``.
    """
    config: Any = _digits() if which == "digits" else _paper(which)
    rules = config.compression.rules
    separable = {"method": "depthwise_separable", "rank": 1}
    config.compression.variants = {
        "falcon_k1": {"method": "falcon", "rank": 1},
        "falcon_k2": {"method": "falcon", "rank": 2},
        "falcon_k3": {"method": "falcon", "rank": 3},
        "falcon_unfitted": {"method": "falcon", "rank": 1, "solver": "random"},
        "falcon_narrow": {"method": "falcon", "rank": 1, "width": 0.75},
        "gep_in": separable,
        "dpconv": {**separable, "solver": "random"},
        "tucker": {"method": "tucker"},
        "cp": {"method": "cp"},
        "tucker_equal": {"method": "tucker", "budget": 8.0},
        "cp_equal": {"method": "cp", "budget": 8.0},
        "stconv_branch": {"unit": "branch", "width": BRANCH_WIDTH[config.model.name]},
        "falcon_branch": {"method": "falcon", "rank": 1, "of": "stconv_branch", "rules": rules},
        "pdp": {"unit": "pdp", "expansion": 0.5},
        "gdg": {"unit": "gdg", "groups": 2, "width": 2.0},
        "pdp_split": {"unit": "pdp_split", "width": 1.375},
    }
    return config


def _digits() -> ConfigDict:
    config: Any = demo.get_config()
    config.train.epochs = 6
    config.finetune.update(config.train)
    return config


def _paper(which: str) -> ConfigDict:
    model, _, data = which.partition("/")
    if model not in BRANCH_WIDTH or data not in (*CIFAR_AND_SVHN, "fashion_mnist"):
        raise ValueError(
            f"config compare.py:{which}: give digits or MODEL/DATA, MODEL vgg19_cifar or "
            f"resnet34_cifar, DATA fashion_mnist, {', '.join(CIFAR_AND_SVHN)}"
        )
    if data == "fashion_mnist":
        config: Any = paper.fashion_mnist(model)
    else:
        config = paper.svhn(model) if data == "svhn" else paper.cifar(model, data)
    stem = paper.FIRST_CONV_STAYS if model.startswith("vgg") else paper.STEM_AND_SHORTCUTS_STAY
    config.compression.rules = stem
    return config
