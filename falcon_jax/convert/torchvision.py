"""Weights of torchvision's and timm's VGG and ResNet."""

from collections.abc import Mapping

import numpy as np
from flax import nnx

from falcon_jax.convert.families import Family, Head, with_weights
from falcon_jax.models import ImageNetVGG, ResNet

_RESNET = Family(
    names=(
        (r"stem/conv", "conv1"),
        (r"stem/norm", "bn1"),
        (r"(layer\d)/(\d+)/unit(\d)/conv", r"\1.\2.conv\3"),
        (r"(layer\d)/(\d+)/unit(\d)/norm", r"\1.\2.bn\3"),
        (r"(layer\d)/(\d+)/shortcut/conv", r"\1.\2.downsample.0"),
        (r"(layer\d)/(\d+)/shortcut/norm", r"\1.\2.downsample.1"),
        (r"head", "fc"),
    ),
    head="head",
)
_VGG = Family(
    names=((r"(features|classifier)/(\d+)", r"\1.\2"),),
    head="classifier/6",
    # timm's classifier is made of convolutions.
    aliases=(
        (r"pre_logits\.fc1", "classifier.0"),
        (r"pre_logits\.fc2", "classifier.3"),
        (r"head\.fc", "classifier.6"),
    ),
)


def torchvision(
    model: nnx.Module, state_dict: Mapping[str, np.ndarray], *, head: Head = "keep"
) -> nnx.Module:
    """Return a model like ours with the weights of torchvision's or timm's.

    Args:
        model: of `falcon_jax.models`: ``resnet18`` to ``resnet152``, ``vgg11`` to ``vgg19_bn``. It
            is not changed, and its weights do not matter.
        state_dict: what `load_torch` returned.
        head: ``keep`` the last layer of the weights; or ``new``: the one of ``model`` stays, so
            that the number of classes may differ.

    Returns:
        A new model: convolutions and fully connected layers with outputs last, BatchNorm with its
        running statistics, all of the types of ``model``.

    Raises:
        ValueError: if the model is none of these, or the weights do not fit it, naming everything
            that is missing, unexpected or misshapen.
    """
    return with_weights(model, _family(model), state_dict, head=head)


def _family(model: nnx.Module) -> Family:
    if isinstance(model, ResNet):
        return _RESNET
    if isinstance(model, ImageNetVGG):
        return _VGG
    raise ValueError(
        f"there are no torchvision weights for {type(model).__name__}; there are for ResNet and "
        "ImageNetVGG, such as falcon_jax.models.resnet18 and vgg16_bn."
    )
