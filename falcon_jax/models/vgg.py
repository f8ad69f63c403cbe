"""VGG for 32x32 images, as the paper shrinks it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from falcon_jax.models.channels import scaled
from falcon_jax.models.units import UnitFactory, dense, standard_unit
from falcon_jax.ops import max_pool_2x2

Stages = tuple[tuple[int, ...], ...]

VGG8_STAGES: Stages = ((32, 32), (64, 64), (128, 128))
VGG16_STAGES: Stages = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
VGG19_STAGES: Stages = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)


class VGG(nnx.Module):
    """Stages of conv units with 2x2 max pooling between, then two fully connected layers.

    Pooling follows every stage but the last; what is left is averaged to one point.

    Args:
        stages: output channels of every unit, stage by stage.
        num_classes: outputs.
        in_features: channels of the images.
        width: multiplier of the units' channels, rounded down.
        hidden: outputs of the first fully connected layer.
        dropout: rate between the fully connected layers.
        unit: factory of the conv units.
        stem_unit: factory of the first unit; ``unit`` if not given.
        dtype: of the computation; parameters and statistics are float32.
        rngs: streams ``params`` and ``dropout``.

    Raises:
        ValueError: if ``width`` leaves no channels, or the units cannot be that wide.

    Reference:
        FALCON, Section 4.1.1.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[int]],
        *,
        num_classes: int,
        in_features: int = 3,
        width: float | int = 1,
        hidden: int = 512,
        dropout: float = 0.3,
        unit: UnitFactory = standard_unit,
        stem_unit: UnitFactory | None = None,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        self.stages = nnx.List()
        factory, inputs = stem_unit or unit, in_features
        for widths in stages:
            stage = nnx.List()
            for features in widths:
                outputs = scaled(features, width)
                stage.append(
                    factory(inputs, outputs, strides=1, activate=True, dtype=dtype, rngs=rngs)
                )
                factory, inputs = unit, outputs
            self.stages.append(stage)
        self.hidden = dense(inputs, hidden, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.head = dense(hidden, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w m"]) -> Float[Array, "b classes"]:
        """Return float32 logits for a batch of images."""
        for index, stage in enumerate(self.stages):
            x = max_pool_2x2(x) if index else x
            for unit in stage:
                x = unit(x)
        x = jax.nn.relu(self.dropout(self.hidden(x.mean(axis=(1, 2)))))
        return self.head(x).astype(jnp.float32)


def vgg16_cifar(*, num_classes: int = 10, in_features: int = 3, rngs: nnx.Rngs, **options) -> VGG:
    """Return VGG16 for 32x32 images: 13 convolutions, 512-512-classes. Options as in `VGG`."""
    return VGG(VGG16_STAGES, num_classes=num_classes, in_features=in_features, rngs=rngs, **options)


def vgg19_cifar(*, num_classes: int = 10, in_features: int = 3, rngs: nnx.Rngs, **options) -> VGG:
    """Return VGG19 for 32x32 images: 16 convolutions, 512-512-classes. Options as in `VGG`."""
    return VGG(VGG19_STAGES, num_classes=num_classes, in_features=in_features, rngs=rngs, **options)


def vgg8_cifar(
    *, num_classes: int = 10, in_features: int = 3, hidden: int = 128, rngs: nnx.Rngs, **options
) -> VGG:
    """Return a small VGG that trains in a minute on a CPU: 6 convolutions, 128-128-classes."""
    return VGG(
        VGG8_STAGES,
        num_classes=num_classes,
        in_features=in_features,
        hidden=hidden,
        rngs=rngs,
        **options,
    )
