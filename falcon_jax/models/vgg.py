"""VGG built from conv units, for 32x32 and for 224x224 images."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from falcon_jax.models.units import (
    ConvUnit,
    UnitFactory,
    dense,
    plain_unit,
    pointwise,
    scaled,
    standard_unit,
)
from falcon_jax.ops.convolution import max_pool_2x2

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
    """Return VGG16 for 32x32 images: 13 convolutions, 512-512-classes.

    Args:
        num_classes: outputs.
        in_features: channels M of the images.
        rngs: streams ``params`` and ``dropout``.
        **options: others of `VGG`: ``width``, ``hidden``, ``dropout``, ``unit``, ``stem_unit`` and
            ``dtype``.

    Returns:
        The network with random weights, from images of shape ``(batch, 32, 32, M)`` to float32
        logits of shape ``(batch, num_classes)``.

    Raises:
        ValueError: as `VGG` does.
    """
    return VGG(VGG16_STAGES, num_classes=num_classes, in_features=in_features, rngs=rngs, **options)


def vgg19_cifar(*, num_classes: int = 10, in_features: int = 3, rngs: nnx.Rngs, **options) -> VGG:
    """Return VGG19 for 32x32 images: 16 convolutions, 512-512-classes.

    Args:
        num_classes: outputs.
        in_features: channels M of the images.
        rngs: streams ``params`` and ``dropout``.
        **options: others of `VGG`: ``width``, ``hidden``, ``dropout``, ``unit``, ``stem_unit`` and
            ``dtype``.

    Returns:
        The network with random weights, from images of shape ``(batch, 32, 32, M)`` to float32
        logits of shape ``(batch, num_classes)``.

    Raises:
        ValueError: as `VGG` does.
    """
    return VGG(VGG19_STAGES, num_classes=num_classes, in_features=in_features, rngs=rngs, **options)


def vgg8_cifar(
    *, num_classes: int = 10, in_features: int = 3, hidden: int = 128, rngs: nnx.Rngs, **options
) -> VGG:
    """Return a small VGG that trains in a minute on a CPU: 6 convolutions, 128-128-classes.

    Args:
        num_classes: outputs.
        in_features: channels M of the images.
        hidden: outputs of the first fully connected layer.
        rngs: streams ``params`` and ``dropout``.
        **options: others of `VGG`: ``width``, ``dropout``, ``unit``, ``stem_unit`` and ``dtype``.

    Returns:
        The network with random weights, from images of shape ``(batch, 32, 32, M)`` to float32
        logits of shape ``(batch, num_classes)``.

    Raises:
        ValueError: as `VGG` does.

    >>> model = nnx.eval_shape(lambda: vgg8_cifar(rngs=nnx.Rngs(0)))  # shapes alone
    >>> [[unit.conv.out_features for unit in stage] for stage in model.stages]
    [[32, 32], [64, 64], [128, 128]]
    """
    return VGG(
        VGG8_STAGES,
        num_classes=num_classes,
        in_features=in_features,
        hidden=hidden,
        rngs=rngs,
        **options,
    )


VGG11_STAGES: Stages = ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2)
VGG13_STAGES: Stages = ((64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2, (512,) * 2)

_SIDE = 7
_HIDDEN = 4096


class ImageNetVGG(nnx.Module):
    """Stages of conv units, each followed by 2x2 max pooling, then 4096-4096-classes.

    torchvision's names and ours: ``features.0`` is ``features/0`` and ``classifier.0`` is
    ``classifier/0``, whatever stands there, and so on; with units that are not convolution and
    BatchNorm in a row, ``features`` has one entry for each.

    Args:
        stages: output channels of every unit, stage by stage.
        num_classes: outputs.
        in_features: channels of the images.
        width: multiplier of the units' channels, rounded down. As in the authors' code, a 1x1
            convolution before the last pooling leads back to what the classifier takes.
        dropout: rate between the fully connected layers.
        unit: factory of the conv units.
        stem_unit: factory of the first unit; ``unit`` if not given.
        dtype: of the computation; parameters and statistics are float32.
        rngs: streams ``params`` and ``dropout``.

    Raises:
        ValueError: if ``width`` leaves no channels, or the units cannot be that wide.

    Reference:
        Simonyan and Zisserman, 2014, Table 1.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[int]],
        *,
        num_classes: int,
        in_features: int = 3,
        width: float | int = 1,
        dropout: float = 0.5,
        unit: UnitFactory,
        stem_unit: UnitFactory | None = None,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        layers: list[Callable[..., Array]] = []
        factory, inputs = stem_unit or unit, in_features
        for stage in stages:
            for features in stage:
                outputs = scaled(features, width)
                made = factory(inputs, outputs, strides=1, activate=True, dtype=dtype, rngs=rngs)
                layers += layers_in_a_row(made)
                factory, inputs = unit, outputs
            layers.append(max_pool_2x2)
        outputs = stages[-1][-1]
        if width != 1:
            closing = pointwise(inputs, outputs, use_bias=True, dtype=dtype, rngs=rngs)
            layers.insert(-1, closing)
        self.features = nnx.List(layers)
        self.classifier = nnx.List(
            [
                dense(_SIDE**2 * outputs, _HIDDEN, dtype=dtype, rngs=rngs),
                jax.nn.relu,
                nnx.Dropout(dropout, rngs=rngs),
                dense(_HIDDEN, _HIDDEN, dtype=dtype, rngs=rngs),
                jax.nn.relu,
                nnx.Dropout(dropout, rngs=rngs),
                dense(_HIDDEN, num_classes, dtype=dtype, rngs=rngs),
            ]
        )

    def __call__(self, x: Float[Array, "b h w m"]) -> Float[Array, "b classes"]:
        """Return float32 logits for a batch of images."""
        for layer in self.features:
            x = layer(x)
        x = adaptive_average_pool(x, _SIDE)
        # The order of torchvision's first fully connected layer: channels, rows, columns.
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        for layer in self.classifier:
            x = layer(x)
        return x.astype(jnp.float32)


def adaptive_average_pool(x: Float[Array, "b h w c"], side: int) -> Float[Array, "b side side c"]:
    """Average maps of any size to ``side`` x ``side`` points.

    Point i is the mean of the rows from ``floor(i n / side)`` to ``ceil((i + 1) n / side)``, the
    last one left out; so it is with columns.

    Args:
        x: input of shape ``(batch, height, width, channels)``.
        side: rows and columns of the output.

    Returns:
        Output of shape ``(batch, side, side, channels)``; the input if it has that size.

    Reference:
        PyTorch's ``AdaptiveAvgPool2d``.
    """
    if x.shape[1:3] == (side, side):
        return x
    rows, columns = (jnp.asarray(_bins(size, side), x.dtype) for size in x.shape[1:3])
    return jnp.einsum("bhwc,ih,jw->bijc", x, rows, columns, precision="highest")


def vgg11(*, num_classes: int = 1000, rngs: nnx.Rngs, **options) -> ImageNetVGG:
    """Return VGG11 for 224x224 images.

    Args:
        num_classes: outputs.
        rngs: streams ``params`` and ``dropout``.
        **options: others of `ImageNetVGG`: ``in_features``, ``width``, ``dropout``, ``unit``,
            ``stem_unit`` and ``dtype``.

    Returns:
        The network with random weights, from images of shape ``(batch, 224, 224, 3)`` to float32
        logits of shape ``(batch, num_classes)``.

    Raises:
        ValueError: as `ImageNetVGG` does.
    """
    return _vgg(VGG11_STAGES, plain_unit, num_classes, rngs, options)


def vgg11_bn(*, num_classes: int = 1000, rngs: nnx.Rngs, **options) -> ImageNetVGG:
    """Return VGG11 with BatchNorm for 224x224 images.

    Args:
        num_classes: outputs.
        rngs: streams ``params`` and ``dropout``.
        **options: others of `ImageNetVGG`: ``in_features``, ``width``, ``dropout``, ``unit``,
            ``stem_unit`` and ``dtype``.

    Returns:
        The network with random weights, from images of shape ``(batch, 224, 224, 3)`` to float32
        logits of shape ``(batch, num_classes)``.

    Raises:
        ValueError: as `ImageNetVGG` does.
    """
    return _vgg(VGG11_STAGES, standard_unit, num_classes, rngs, options)


def vgg13(*, num_classes: int = 1000, rngs: nnx.Rngs, **options) -> ImageNetVGG:
    """Return VGG13 for 224x224 images.

    Args:
        num_classes: outputs.
        rngs: streams ``params`` and ``dropout``.
        **options: others of `ImageNetVGG`: ``in_features``, ``width``, ``dropout``, ``unit``,
            ``stem_unit`` and ``dtype``.

    Returns:
        The network with random weights, from images of shape ``(batch, 224, 224, 3)`` to float32
        logits of shape ``(batch, num_classes)``.

    Raises:
        ValueError: as `ImageNetVGG` does.
    """
    return _vgg(VGG13_STAGES, plain_unit, num_classes, rngs, options)


def vgg13_bn(*, num_classes: int = 1000, rngs: nnx.Rngs, **options) -> ImageNetVGG:
    """Return VGG13 with BatchNorm for 224x224 images.

    Args:
        num_classes: outputs.
        rngs: streams ``params`` and ``dropout``.
        **options: others of `ImageNetVGG`: ``in_features``, ``width``, ``dropout``, ``unit``,
            ``stem_unit`` and ``dtype``.

    Returns:
        The network with random weights, from images of shape ``(batch, 224, 224, 3)`` to float32
        logits of shape ``(batch, num_classes)``.

    Raises:
        ValueError: as `ImageNetVGG` does.
    """
    return _vgg(VGG13_STAGES, standard_unit, num_classes, rngs, options)


def vgg16(*, num_classes: int = 1000, rngs: nnx.Rngs, **options) -> ImageNetVGG:
    """Return VGG16 for 224x224 images.

    Args:
        num_classes: outputs.
        rngs: streams ``params`` and ``dropout``.
        **options: others of `ImageNetVGG`: ``in_features``, ``width``, ``dropout``, ``unit``,
            ``stem_unit`` and ``dtype``.

    Returns:
        The network with random weights, from images of shape ``(batch, 224, 224, 3)`` to float32
        logits of shape ``(batch, num_classes)``.

    Raises:
        ValueError: as `ImageNetVGG` does.
    """
    return _vgg(VGG16_STAGES, plain_unit, num_classes, rngs, options)


def vgg16_bn(*, num_classes: int = 1000, rngs: nnx.Rngs, **options) -> ImageNetVGG:
    """Return VGG16 with BatchNorm for 224x224 images.

    Args:
        num_classes: outputs.
        rngs: streams ``params`` and ``dropout``.
        **options: others of `ImageNetVGG`: ``in_features``, ``width``, ``dropout``, ``unit``,
            ``stem_unit`` and ``dtype``.

    Returns:
        The network with random weights, from images of shape ``(batch, 224, 224, 3)`` to float32
        logits of shape ``(batch, num_classes)``.

    Raises:
        ValueError: as `ImageNetVGG` does.
    """
    return _vgg(VGG16_STAGES, standard_unit, num_classes, rngs, options)


def vgg19(*, num_classes: int = 1000, rngs: nnx.Rngs, **options) -> ImageNetVGG:
    """Return VGG19 for 224x224 images.

    Args:
        num_classes: outputs.
        rngs: streams ``params`` and ``dropout``.
        **options: others of `ImageNetVGG`: ``in_features``, ``width``, ``dropout``, ``unit``,
            ``stem_unit`` and ``dtype``.

    Returns:
        The network with random weights, from images of shape ``(batch, 224, 224, 3)`` to float32
        logits of shape ``(batch, num_classes)``.

    Raises:
        ValueError: as `ImageNetVGG` does.
    """
    return _vgg(VGG19_STAGES, plain_unit, num_classes, rngs, options)


def vgg19_bn(*, num_classes: int = 1000, rngs: nnx.Rngs, **options) -> ImageNetVGG:
    """Return VGG19 with BatchNorm for 224x224 images.

    Args:
        num_classes: outputs.
        rngs: streams ``params`` and ``dropout``.
        **options: others of `ImageNetVGG`: ``in_features``, ``width``, ``dropout``, ``unit``,
            ``stem_unit`` and ``dtype``.

    Returns:
        The network with random weights, from images of shape ``(batch, 224, 224, 3)`` to float32
        logits of shape ``(batch, num_classes)``.

    Raises:
        ValueError: as `ImageNetVGG` does.
    """
    return _vgg(VGG19_STAGES, standard_unit, num_classes, rngs, options)


def _vgg(stages: Stages, unit: UnitFactory, num_classes: int, rngs: nnx.Rngs, options: dict):
    return ImageNetVGG(stages, num_classes=num_classes, rngs=rngs, **{"unit": unit, **options})


def layers_in_a_row(unit: nnx.Module) -> list[Callable[..., Array]]:
    """Return the layers of a `ConvUnit` one by one; any other unit stays in one piece."""
    if not isinstance(unit, ConvUnit):
        return [unit]  # type: ignore[list-item]
    parts = (unit.conv, unit.norm, unit.activation)
    return [part for part in parts if part is not None]  # type: ignore[misc]


def _bins(size: int, side: int) -> np.ndarray:
    """Return the matrix that averages ``size`` points to ``side``."""
    bins = np.zeros((side, size))
    for i in range(side):
        start, stop = i * size // side, -(-(i + 1) * size // side)
        bins[i, start:stop] = 1 / (stop - start)
    return bins
