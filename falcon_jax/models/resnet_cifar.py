"""The ResNets of 20 to 164 layers for 32x32 images, of three stages."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from falcon_jax.models.channels import scaled
from falcon_jax.models.residual import BasicBlock, Bottleneck, residual_stage
from falcon_jax.models.units import UnitFactory, dense, unbiased_unit

WIDTHS = (16, 32, 64)


class ThreeStageResNet(nnx.Module):
    """A 3x3 stem and three stages of residual blocks, 16, 32 and 64 channels wide.

    Convolutions have no bias; where the shape changes, a 1x1 convolution with BatchNorm is the
    shortcut.

    Args:
        block: class of the blocks, `BasicBlock` or `Bottleneck`.
        blocks: number of blocks in each stage.
        num_classes: outputs.
        in_features: channels of the images.
        width: multiplier of all channels, rounded down.
        unit: factory of the 3x3 units inside the blocks.
        stem_unit: factory of the first unit.
        shortcut: whether the blocks have shortcuts.
        dtype: of the computation; parameters and statistics are float32.
        rngs: stream ``params``.

    Raises:
        ValueError: if ``width`` leaves no channels, or the units cannot be that wide.

    Reference:
        He et al., Deep Residual Learning for Image Recognition, 2015, Section 4.2.
    """

    def __init__(
        self,
        block: Callable[..., BasicBlock | Bottleneck],
        blocks: int,
        *,
        num_classes: int = 10,
        in_features: int = 3,
        width: float | int = 1,
        unit: UnitFactory = unbiased_unit,
        stem_unit: UnitFactory = unbiased_unit,
        shortcut: bool = True,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        widths = [scaled(features, width) for features in WIDTHS]
        inputs = widths[0]
        self.stem = stem_unit(in_features, inputs, strides=1, activate=True, dtype=dtype, rngs=rngs)
        self.stages = nnx.List()
        for index, features in enumerate(widths):
            self.stages.append(
                residual_stage(
                    block,
                    inputs,
                    features,
                    count=blocks,
                    strides=2 if index else 1,
                    unit=unit,
                    shortcut=shortcut,
                    dtype=dtype,
                    rngs=rngs,
                )
            )
            inputs = block.expansion * features  # type: ignore[attr-defined]
        self.head = dense(inputs, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w m"]) -> Float[Array, "b classes"]:
        """Return float32 logits for a batch of images."""
        x = self.stem(x)  # type: ignore[operator]
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.head(x.mean(axis=(1, 2))).astype(jnp.float32)


def resnet20_cifar(*, rngs: nnx.Rngs, **options) -> ThreeStageResNet:
    """Return ResNet-20 for 32x32 images. Options as in `ThreeStageResNet`."""
    return ThreeStageResNet(BasicBlock, 3, rngs=rngs, **options)


def resnet56_cifar(*, rngs: nnx.Rngs, **options) -> ThreeStageResNet:
    """Return ResNet-56 for 32x32 images. Options as in `ThreeStageResNet`."""
    return ThreeStageResNet(BasicBlock, 9, rngs=rngs, **options)


def resnet110_cifar(*, rngs: nnx.Rngs, **options) -> ThreeStageResNet:
    """Return ResNet-110 for 32x32 images. Options as in `ThreeStageResNet`."""
    return ThreeStageResNet(BasicBlock, 18, rngs=rngs, **options)


def resnet164_cifar(*, rngs: nnx.Rngs, **options) -> ThreeStageResNet:
    """Return ResNet-164, of bottlenecks, for 32x32 images. Options as in `ThreeStageResNet`."""
    return ThreeStageResNet(Bottleneck, 18, rngs=rngs, **options)
