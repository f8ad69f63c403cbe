"""ResNet34 on CIFAR-100: standard, FALCON (k = 1, 2, 3; k = 1 unfitted), GEP-in, DPConv.

Data: python -m falcon_jax prepare --name=cifar100
Command: python train.py --config=configs/resnet34_cifar100.py --workdir=runs/resnet34_cifar100
Fitted with AdamW: --config.compression.solver=adamw, in another --workdir
Machine: one GPU
Run time: not yet run
Expected score: the paper's test accuracy in percent, Tables 4 and 5:
    standard 73.94, FALCON k = 1, 2, 3: 71.83, 72.94, 72.85, without fitting (k = 1) 71.80,
    GEP-in 66.88, DPConv 66.30
"""

from ml_collections import ConfigDict

from configs.paper import cifar


def get_config() -> ConfigDict:
    """Return the config of ResNet34 on CIFAR-100."""
    return cifar("resnet34_cifar", "cifar100")
