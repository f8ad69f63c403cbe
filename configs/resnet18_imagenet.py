"""ResNet18 on ImageNet, as the paper tunes it: SGD, 90 epochs, steps at 30 and 60.

Weights: python -m falcon_jax convert --arch=resnet18 --weights=resnet18.pth --out=runs/resnet18
Data: python -m falcon_jax prepare --name=imagenet2012
Or an image folder: --config.data.source=folder --config.data.data_dir=DIR
Command: python train.py --config=configs/resnet18_imagenet.py --workdir=runs/resnet18_imagenet
Machine: one with several GPUs
Run time: not yet run
Expected score: standard 69.76% top-1; FALCON k = 1, 2, 3: 66.64, 68.03, 69.07 (the paper)
"""

from ml_collections import ConfigDict

from configs.paper import imagenet


def get_config() -> ConfigDict:
    """Return the config of the experiment."""
    return imagenet("resnet18")
