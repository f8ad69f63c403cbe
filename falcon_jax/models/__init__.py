"""Networks built from conv units, as NNX modules with channels last."""

from falcon_jax.models.registry import MODELS as MODELS
from falcon_jax.models.registry import get_model as get_model
from falcon_jax.models.resnet import CifarResNet as CifarResNet
from falcon_jax.models.resnet import resnet18_cifar as resnet18_cifar
from falcon_jax.models.resnet import resnet34_cifar as resnet34_cifar
from falcon_jax.models.units import ConvUnit as ConvUnit
from falcon_jax.models.units import method_unit as method_unit
from falcon_jax.models.units import standard_unit as standard_unit
from falcon_jax.models.vgg import VGG as VGG
from falcon_jax.models.vgg import vgg8_cifar as vgg8_cifar
from falcon_jax.models.vgg import vgg16_cifar as vgg16_cifar
from falcon_jax.models.vgg import vgg19_cifar as vgg19_cifar
