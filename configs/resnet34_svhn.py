"""ResNet34 on SVHN: standard, FALCON (k = 1, 2, 3; k = 1 unfitted), GEP-in, DPConv.

Data: python -m falcon_jax prepare --name=svhn_cropped
Command: python train.py --config=configs/resnet34_svhn.py --workdir=runs/resnet34_svhn
Fitted with AdamW: --config.compression.solver=adamw, in another --workdir
Machine: one GPU
Run time: not yet run
Expected score: the paper's test accuracy in percent, Tables 4 and 5:
    standard 94.83, FALCON k = 1, 2, 3: 94.83, 95.34, 94.83, without fitting (k = 1) 94.75,
    GEP-in 94.06, DPConv 94.03
"""

from ml_collections import ConfigDict

from configs.paper import svhn


def get_config() -> ConfigDict:
    """Return the config of ResNet34 on SVHN."""
    return svhn("resnet34_cifar")
