"""VGG19 for 32x32 images as the benchmarks compare it: standard and FALCON, JAX and PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import lax

import falcon_jax as fj
from falcon_jax.compression.nnx_tree import named_modules
from falcon_jax.models.vgg import VGG19_STAGES

CLASSES = 10


def models() -> dict[str, Callable[[], nnx.Module]]:
    """Return makers of the models, by name.

    ``ours`` and ``grouped`` are FALCON of rank 1; ``tuned`` is the standard model with im2col on
    the 2x2 maps and this project's pooling and BatchNorm, ``lax`` the same with XLA's convolutions
    only.
    """

    def falcon(**options: Any) -> nnx.Module:
        unit = fj.models.method_unit(fj.Falcon(**options))
        return fj.models.vgg19_cifar(
            num_classes=CLASSES, unit=unit, stem_unit=fj.models.standard_unit, rngs=nnx.Rngs(0)
        )

    def tuned() -> nnx.Module:
        return fj.models.vgg19_cifar(num_classes=CLASSES, rngs=nnx.Rngs(0))

    def plain() -> nnx.Module:
        model = tuned()
        for _, module in named_modules(model):
            if isinstance(module, nnx.Conv):
                module.conv_general_dilated = lax.conv_general_dilated
        return model

    return {
        "ours": falcon,
        "grouped": lambda: falcon(impl="grouped"),
        "tuned": tuned,
        "lax": plain,
    }


def images(batch: int) -> jax.Array:
    """Return random images, channels last."""
    return jax.random.normal(jax.random.key(0), (batch, 32, 32, 3))


def torch_model(*, falcon: bool) -> Any:
    """Return the same network in PyTorch, channels last; None where it is not installed.

    Args:
        falcon: whether all convolutions but the first are pointwise and depthwise.
    """
    try:
        import torch
        from torch import nn
    except ImportError:
        return None
    torch.manual_seed(0)
    layers: list[Any] = []
    inputs = 3
    for stage, widths in enumerate(VGG19_STAGES):
        if stage:
            layers.append(nn.MaxPool2d(2))
        for outputs in widths:
            if falcon and inputs != 3:
                layers.append(nn.Conv2d(inputs, outputs, 1, bias=False))
                layers.append(nn.Conv2d(outputs, outputs, 3, padding=1, groups=outputs, bias=False))
            else:
                layers.append(nn.Conv2d(inputs, outputs, 3, padding=1))
            layers += [nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            inputs = outputs
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 512), nn.ReLU(inplace=True)]
    layers += [nn.Dropout(0.3), nn.Linear(512, CLASSES)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def torch_images(batch: int) -> Any:
    """Return random images, channels last in memory."""
    import torch

    return torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last)
