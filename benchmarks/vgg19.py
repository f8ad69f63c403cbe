"""VGG19 for 32x32 images as the benchmarks compare it: standard and FALCON, JAX and PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import lax

import falcon_jax as fj
from falcon_jax.frameworks.nnx_tree import named_modules
from falcon_jax.models.vgg import VGG19_STAGES

CLASSES = 10


def models() -> dict[str, Callable[[], nnx.Module]]:
    """Return makers of the models, by name.

    ``ours`` and ``grouped`` are FALCON of rank 1, ``flax`` is the same network as one would write
    it with Flax's own layers; ``tuned`` is the standard model with im2col on the 2x2 maps and this
    project's pooling and BatchNorm, ``lax`` the same with XLA's convolutions only.
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
        "flax": lambda: FlaxFalcon(rngs=nnx.Rngs(0)),
        "tuned": tuned,
        "lax": plain,
    }


class FlaxFalcon(nnx.Module):
    """FALCON of rank 1 with Flax's layers only: 1x1 and feature-grouped convolutions."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.stages = nnx.List()
        inputs = 3
        for widths in VGG19_STAGES:
            layers: list[Any] = []
            for n in widths:
                if inputs == 3:
                    layers.append(nnx.Conv(3, n, (3, 3), rngs=rngs))
                else:
                    grouped = {"use_bias": False, "feature_group_count": n, "rngs": rngs}
                    layers.append(nnx.Conv(inputs, n, (1, 1), use_bias=False, rngs=rngs))
                    layers.append(nnx.Conv(n, n, (3, 3), **grouped))
                layers += [nnx.BatchNorm(n, rngs=rngs), jax.nn.relu]
                inputs = n
            self.stages.append(nnx.Sequential(*layers))
        self.hidden = nnx.Linear(inputs, 512, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.head = nnx.Linear(512, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits."""
        for index, stage in enumerate(self.stages):
            x = nnx.max_pool(x, (2, 2), (2, 2)) if index else x
            x = stage(x)
        return self.head(self.dropout(jax.nn.relu(self.hidden(x.mean(axis=(1, 2))))))


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
