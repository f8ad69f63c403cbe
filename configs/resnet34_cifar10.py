"""ResNet34 on CIFAR-10: standard, FALCON (k = 1, 2, 3; k = 1 unfitted), GEP-in, DPConv.

Data: python -m falcon_jax prepare --name=cifar10
Command: python train.py --config=configs/resnet34_cifar10.py --workdir=runs/resnet34_cifar10
Fitted with AdamW: --config.compression.solver=adamw, in another --workdir
Machine: one GPU
Run time: not yet run
Expected score: not yet run; the paper shows CIFAR-10 in a figure only
"""

from ml_collections import ConfigDict

from configs.paper import cifar


def get_config() -> ConfigDict:
    """Return the config of ResNet34 on CIFAR-10."""
    return cifar("resnet34_cifar", "cifar10")
