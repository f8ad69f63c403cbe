"""VGG16 with BatchNorm on ImageNet, as the paper tunes it: SGD, 90 epochs, steps at 30 and 60.

Weights: python -m falcon_jax convert --arch=vgg16_bn --weights=vgg16_bn.pth --out=runs/vgg16_bn
Data: python -m falcon_jax prepare --name=imagenet2012
Or an image folder: --config.data.source=folder --config.data.data_dir=DIR
Command: python train.py --config=configs/vgg16_bn_imagenet.py --workdir=runs/vgg16_bn_imagenet
Machine: one with several GPUs
Run time: not yet run
Expected score: standard 73.37% top-1; FALCON k = 1, 2, 3: 71.93, 72.88, 73.24 (the paper)
"""

from ml_collections import ConfigDict

from configs.paper import imagenet


def get_config() -> ConfigDict:
    """Return the config of the experiment."""
    return imagenet("vgg16_bn")
