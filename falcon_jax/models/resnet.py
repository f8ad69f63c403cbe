"""ResNet for 32x32 images, as the paper shrinks it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from falcon_jax.models.units import ConvUnit, UnitFactory, dense, standard_unit

STAGE_WIDTHS = (64, 128, 256, 512)


class BasicBlock(nnx.Module):
    """Two conv units beside a shortcut; ReLU after their sum.

    The shortcut is a 1x1 convolution with BatchNorm where the stride or the width changes, and the
    input itself elsewhere.

    Args:
        in_features: input channels.
        out_features: output channels.
        strides: of the first unit and the shortcut.
        unit: factory of the conv units.
        dtype: of the computation.
        rngs: for parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        strides: int,
        unit: UnitFactory,
        dtype: Dtype | None,
        rngs: nnx.Rngs,
    ):
        self.unit1 = unit(
            in_features, out_features, strides=strides, activate=True, dtype=dtype, rngs=rngs
        )
        self.unit2 = unit(
            out_features, out_features, strides=1, activate=False, dtype=dtype, rngs=rngs
        )
        self.shortcut = nnx.data(None)
        if strides != 1 or in_features != out_features:
            projection = nnx.Conv(
                in_features,
                out_features,
                (1, 1),
                strides,
                padding="VALID",
                use_bias=False,
                dtype=dtype,
                kernel_init=nnx.initializers.he_uniform(),
                rngs=rngs,
            )
            self.shortcut = ConvUnit(
                projection, out_features, activate=False, dtype=dtype, rngs=rngs
            )

    def __call__(self, x: Float[Array, "b h w m"]) -> Float[Array, "b h_out w_out n"]:
        """Apply the block to a batch of feature maps."""
        y = self.unit2(self.unit1(x))  # type: ignore[operator]
        return jax.nn.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class CifarResNet(nnx.Module):
    """A 3x3 stem and four stages of basic blocks, each starting with stride 2.

    Args:
        blocks: number of blocks in each stage.
        num_classes: outputs.
        in_features: channels of the images.
        unit: factory of the 3x3 units inside the blocks.
        stem_unit: factory of the first unit.
        dtype: of the computation; parameters and statistics are float32.
        rngs: stream ``params``.

    Reference:
        FALCON, Section 4.1.1: the 7x7 stem and its pooling are removed.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        *,
        num_classes: int,
        in_features: int = 3,
        unit: UnitFactory = standard_unit,
        stem_unit: UnitFactory = standard_unit,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        width = STAGE_WIDTHS[0]
        self.stem = stem_unit(in_features, width, strides=1, activate=True, dtype=dtype, rngs=rngs)
        self.stages = nnx.List()
        for features, count in zip(STAGE_WIDTHS, blocks, strict=True):
            stage = nnx.List()
            for index in range(count):
                stage.append(
                    BasicBlock(
                        width,
                        features,
                        strides=1 if index else 2,
                        unit=unit,
                        dtype=dtype,
                        rngs=rngs,
                    )
                )
                width = features
            self.stages.append(stage)
        self.head = dense(width, num_classes, dtype=dtype, rngs=rngs)

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
