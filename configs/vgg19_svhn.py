"""VGG19 on SVHN: standard, FALCON (k = 1, 2, 3; k = 1 unfitted), GEP-in, DPConv.

Data: python -m falcon_jax prepare --name=svhn_cropped
Command: python train.py --config=configs/vgg19_svhn.py --workdir=runs/vgg19_svhn
Fitted with AdamW: --config.compression.solver=adamw, in another --workdir
Machine: one GPU
Run time: not yet run
Expected score: the paper's test accuracy in percent, Tables 4 and 5:
    standard 95.28, FALCON k = 1, 2, 3: 95.45, 95.72, 95.54, without fitting (k = 1) 94.51,
    GEP-in 94.99, DPConv 94.37
"""

from ml_collections import ConfigDict

from configs.paper import svhn


def get_config() -> ConfigDict:
    """Return the config of VGG19 on SVHN."""
    return svhn("vgg19_cifar")
