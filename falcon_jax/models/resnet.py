"""ResNet for 32x32 images, as the paper shrinks it."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from falcon_jax.models.channels import scaled
from falcon_jax.models.residual import BasicBlock, residual_stage
from falcon_jax.models.units import UnitFactory, dense, standard_unit

STAGE_WIDTHS = (64, 128, 256, 512)


class CifarResNet(nnx.Module):
    """A 3x3 stem and four stages of basic blocks, each starting with stride 2.

    Args:
        blocks: number of blocks in each stage.
        num_classes: outputs.
        in_features: channels of the images.
        width: multiplier of all channels, rounded down.
        unit: factory of the 3x3 units inside the blocks.
        stem_unit: factory of the first unit.
        shortcut: whether the blocks have shortcuts; the paper leaves them out for GDGConv, whose
            units have their own.
        dtype: of the computation; parameters and statistics are float32.
        rngs: stream ``params``.

    Raises:
        ValueError: if ``width`` leaves no channels, or the units cannot be that wide.

    Reference:
        FALCON, Sections 4.1.1 and 4.1.4: the 7x7 stem and its pooling are removed.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        *,
        num_classes: int,
        in_features: int = 3,
        width: float | int = 1,
        unit: UnitFactory = standard_unit,
        stem_unit: UnitFactory = standard_unit,
        shortcut: bool = True,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        widths = [scaled(features, width) for features in STAGE_WIDTHS]
        inputs = widths[0]
        self.stem = stem_unit(in_features, inputs, strides=1, activate=True, dtype=dtype, rngs=rngs)
        self.stages = nnx.List()
        for features, count in zip(widths, blocks, strict=True):
            self.stages.append(
                residual_stage(
                    BasicBlock,
                    inputs,
                    features,
                    count=count,
                    strides=2,
                    unit=unit,
                    shortcut=shortcut,
                    dtype=dtype,
                    rngs=rngs,
                )
            )
            inputs = features
        self.head = dense(inputs, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w m"]) -> Float[Array, "b classes"]:
        """Return float32 logits for a batch of images."""
        x = self.stem(x)  # type: ignore[operator]
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.head(x.mean(axis=(1, 2))).astype(jnp.float32)


def resnet18_cifar(
    *, num_classes: int = 10, in_features: int = 3, rngs: nnx.Rngs, **options
) -> CifarResNet:
    """Return ResNet18 for 32x32 images. Options as in `CifarResNet`."""
    return CifarResNet(
        (2, 2, 2, 2), num_classes=num_classes, in_features=in_features, rngs=rngs, **options
    )


def resnet34_cifar(
    *, num_classes: int = 10, in_features: int = 3, rngs: nnx.Rngs, **options
) -> CifarResNet:
    """Return ResNet34 for 32x32 images. Options as in `CifarResNet`."""
    return CifarResNet(
        (3, 4, 6, 3), num_classes=num_classes, in_features=in_features, rngs=rngs, **options
    )
