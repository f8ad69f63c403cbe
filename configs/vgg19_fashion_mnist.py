"""VGG19 on Fashion-MNIST: standard, FALCON (k = 1, 2, 3; k = 1 unfitted), GEP-in, DPConv.

Data: Debian's package dataset-fashion-mnist, or --config.data.data_dir=FOLDER of the idx files
Command: python train.py --config=configs/vgg19_fashion_mnist.py --workdir=runs/vgg19_fashion
Fitted with AdamW: --config.compression.solver=adamw, in another --workdir
Machine: one GPU
Run time: not yet run
Expected score: not yet run; reduced (docs/results.md) 77.84% standard, 79.87% FALCON k = 1
"""

from ml_collections import ConfigDict

from configs.paper import fashion_mnist


def get_config() -> ConfigDict:
    """Return the config of VGG19 on Fashion-MNIST."""
    return fashion_mnist("vgg19_cifar")
