"""ResNet for 224x224 images, with the structure of torchvision's."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from falcon_jax.models.channels import scaled
from falcon_jax.models.convolutions import PAD_ONE
from falcon_jax.models.residual import BasicBlock, Bottleneck, residual_stage
from falcon_jax.models.resnet import STAGE_WIDTHS
from falcon_jax.models.units import ConvUnit, UnitFactory, dense, unbiased_unit


class ResNet(nnx.Module):
    """A 7x7 stem, 3x3 max pooling and four stages of residual blocks.

    torchvision's names and ours: ``conv1`` and ``bn1`` are ``stem/conv`` and ``stem/norm``,
    ``layer1.0.conv1`` and ``layer1.0.bn1`` are ``layer1/0/unit1/conv`` and ``layer1/0/unit1/norm``,
    ``downsample.0`` and ``downsample.1`` are ``shortcut/conv`` and ``shortcut/norm``, ``fc`` is
    ``head``.

    Args:
        block: class of the blocks, `BasicBlock` or `Bottleneck`.
        blocks: number of blocks in each stage.
        num_classes: outputs.
        in_features: channels of the images.
        width: multiplier of all channels, rounded down.
        unit: factory of the 3x3 units inside the blocks.
        shortcut: whether the blocks have shortcuts; the paper leaves them out for GDGConv, whose
            units have their own.
        dtype: of the computation; parameters and statistics are float32.
        rngs: stream ``params``.

    Raises:
        ValueError: if ``width`` leaves no channels, or the units cannot be that wide.

    Reference:
        He et al., 2015, Table 1; with the stride of a bottleneck in its 3x3 convolution.
    """

    def __init__(
        self,
        block: Callable[..., BasicBlock | Bottleneck],
        blocks: Sequence[int],
        *,
        num_classes: int,
        in_features: int = 3,
        width: float | int = 1,
        unit: UnitFactory = unbiased_unit,
        shortcut: bool = True,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        widths = [scaled(features, width) for features in STAGE_WIDTHS]
        stem = nnx.Conv(
            in_features,
            widths[0],
            (7, 7),
            2,
            padding=((3, 3), (3, 3)),
            use_bias=False,
            dtype=dtype,
            kernel_init=nnx.initializers.he_uniform(),
            rngs=rngs,
        )
        self.stem = ConvUnit(stem, widths[0], dtype=dtype, rngs=rngs)
        inputs, stages = widths[0], []
        for index, (features, count) in enumerate(zip(widths, blocks, strict=True)):
            stage = residual_stage(
                block,
                inputs,
                features,
                count=count,
                strides=2 if index else 1,
                unit=unit,
                shortcut=shortcut,
                dtype=dtype,
                rngs=rngs,
            )
            stages.append(stage)
            inputs = block.expansion * features  # type: ignore[attr-defined]
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.head = dense(inputs, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w m"]) -> Float[Array, "b classes"]:
        """Return float32 logits for a batch of images."""
        x = nnx.max_pool(self.stem(x), (3, 3), (2, 2), PAD_ONE)  # type: ignore[arg-type]
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = block(x)
        return self.head(x.mean(axis=(1, 2))).astype(jnp.float32)


def resnet18(*, num_classes: int = 1000, rngs: nnx.Rngs, **options) -> ResNet:
    """Return ResNet18 for 224x224 images. Options as in `ResNet`."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes=num_classes, rngs=rngs, **options)


def resnet34(*, num_classes: int = 1000, rngs: nnx.Rngs, **options) -> ResNet:
    """Return ResNet34 for 224x224 images. Options as in `ResNet`."""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes=num_classes, rngs=rngs, **options)


def resnet50(*, num_classes: int = 1000, rngs: nnx.Rngs, **options) -> ResNet:
    """Return ResNet50 for 224x224 images. Options as in `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes=num_classes, rngs=rngs, **options)


def resnet101(*, num_classes: int = 1000, rngs: nnx.Rngs, **options) -> ResNet:
    """Return ResNet101 for 224x224 images. Options as in `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes=num_classes, rngs=rngs, **options)


def resnet152(*, num_classes: int = 1000, rngs: nnx.Rngs, **options) -> ResNet:
    """Return ResNet152 for 224x224 images. Options as in `ResNet`."""
    return ResNet(Bottleneck, (3, 8, 36, 3), num_classes=num_classes, rngs=rngs, **options)
