"""VGG19 on CIFAR-100: standard, FALCON (k = 1, 2, 3; k = 1 unfitted), GEP-in, DPConv.

Data: python -m falcon_jax prepare --name=cifar100
Command: python train.py --config=configs/vgg19_cifar100.py --workdir=runs/vgg19_cifar100
Fitted with AdamW: --config.compression.solver=adamw, in another --workdir
Machine: one GPU
Run time: not yet run
Expected score: the paper's test accuracy in percent, Tables 4 and 5:
    standard 72.10, FALCON k = 1, 2, 3: 72.01, 73.71, 73.41, without fitting (k = 1) 70.80,
    GEP-in 68.29, DPConv 68.18
"""

from ml_collections import ConfigDict

from configs.paper import cifar


def get_config() -> ConfigDict:
    """Return the config of VGG19 on CIFAR-100."""
    return cifar("vgg19_cifar", "cifar100")
