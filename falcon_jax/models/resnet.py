"""ResNets built from conv units, for 32x32 and for 224x224 images."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from falcon_jax.models.units import (
    PAD_ONE,
    ConvUnit,
    UnitFactory,
    dense,
    scaled,
    standard_unit,
    unbiased_unit,
)


class BasicBlock(nnx.Module):
    """Two conv units beside a shortcut; ReLU after their sum.

    The shortcut is a 1x1 convolution with BatchNorm where the stride or the width changes, and the
    input itself elsewhere.

    Args:
        in_features: input channels.
        features: channels of the units.
        strides: of the first unit and the shortcut.
        unit: factory of the conv units.
        shortcut: whether there is one.
        dtype: of the computation.
        rngs: for parameters.
    """

    expansion: ClassVar[int] = 1

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        strides: int,
        unit: UnitFactory,
        shortcut: bool = True,
        dtype: Dtype | None,
        rngs: nnx.Rngs,
    ):
        self.unit1 = unit(
            in_features, features, strides=strides, activate=True, dtype=dtype, rngs=rngs
        )
        self.unit2 = unit(features, features, strides=1, activate=False, dtype=dtype, rngs=rngs)
        self.shortcut = nnx.data(
            _shortcut(in_features, features, strides, dtype, rngs) if shortcut else None
        )
        self.residual = shortcut

    def __call__(self, x: Float[Array, "b h w m"]) -> Float[Array, "b h_out w_out n"]:
        """Apply the block to a batch of feature maps."""
        y = self.unit2(self.unit1(x))  # type: ignore[operator]
        return _after(y, x, self.shortcut, self.residual)


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 units beside a shortcut; ReLU after their sum.

    The last unit gives 4 times the channels; the stride is the 3x3 unit's.

    Args:
        in_features: input channels.
        features: channels of the first two units.
        strides: of the 3x3 unit and the shortcut.
        unit: factory of the 3x3 unit.
        shortcut: whether there is one.
        dtype: of the computation.
        rngs: for parameters.
    """

    expansion: ClassVar[int] = 4

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        strides: int,
        unit: UnitFactory,
        shortcut: bool = True,
        dtype: Dtype | None,
        rngs: nnx.Rngs,
    ):
        out_features = self.expansion * features
        self.unit1 = _pointwise_unit(
            in_features, features, strides=1, activate=True, dtype=dtype, rngs=rngs
        )
        self.unit2 = unit(
            features, features, strides=strides, activate=True, dtype=dtype, rngs=rngs
        )
        self.unit3 = _pointwise_unit(
            features, out_features, strides=1, activate=False, dtype=dtype, rngs=rngs
        )
        self.shortcut = nnx.data(
            _shortcut(in_features, out_features, strides, dtype, rngs) if shortcut else None
        )
        self.residual = shortcut

    def __call__(self, x: Float[Array, "b h w m"]) -> Float[Array, "b h_out w_out n"]:
        """Apply the block to a batch of feature maps."""
        y = self.unit3(self.unit2(self.unit1(x)))  # type: ignore[operator]
        return _after(y, x, self.shortcut, self.residual)


def residual_stage(
    block: Callable[..., BasicBlock | Bottleneck],
    in_features: int,
    features: int,
    *,
    count: int,
    strides: int,
    unit: UnitFactory,
    shortcut: bool,
    dtype: Dtype | None,
    rngs: nnx.Rngs,
) -> nnx.List:
    """Return blocks in a row, the first one with strides.

    Args:
        block: class of the blocks.
        in_features: input channels.
        features: channels of the blocks' 3x3 units.
        count: number of blocks.
        strides: of the first block.
        unit: factory of the 3x3 units.
        shortcut: whether the blocks have shortcuts.
        dtype: of the computation.
        rngs: for parameters.

    Returns:
        The blocks.
    """
    expansion: int = block.expansion  # type: ignore[attr-defined]
    return nnx.List(
        block(
            expansion * features if index else in_features,
            features,
            strides=1 if index else strides,
            unit=unit,
            shortcut=shortcut,
            dtype=dtype,
            rngs=rngs,
        )
        for index in range(count)
    )


def residual_stages(
    block: Callable[..., BasicBlock | Bottleneck],
    widths: Sequence[int],
    counts: Sequence[int],
    *,
    strides: int,
    unit: UnitFactory,
    shortcut: bool,
    dtype: Dtype | None,
    rngs: nnx.Rngs,
) -> tuple[list[nnx.List], int]:
    """Return the stages of a network whose stem is as wide as its first stage, and its outputs.

    Args:
        block: class of the blocks.
        widths: of the stages.
        counts: of blocks, stage by stage.
        strides: of the first stage; all others have stride 2.
        unit: factory of the 3x3 units.
        shortcut: whether the blocks have shortcuts.
        dtype: of the computation.
        rngs: for parameters.
    """
    inputs, stages = widths[0], []
    for index, (features, count) in enumerate(zip(widths, counts, strict=True)):
        stages.append(
            residual_stage(
                block,
                inputs,
                features,
                count=count,
                strides=2 if index else strides,
                unit=unit,
                shortcut=shortcut,
                dtype=dtype,
                rngs=rngs,
            )
        )
        inputs = block.expansion * features  # type: ignore[attr-defined]
    return stages, inputs


def _after(y: Array, x: Array, shortcut: nnx.Module | None, residual: bool) -> Array:
    if residual:
        y = y + (x if shortcut is None else shortcut(x))  # type: ignore[operator]
    return jax.nn.relu(y)


def _shortcut(
    in_features: int, out_features: int, strides: int, dtype: Dtype | None, rngs: nnx.Rngs
) -> ConvUnit | None:
    if strides == 1 and in_features == out_features:
        return None
    return _pointwise_unit(
        in_features, out_features, strides=strides, activate=False, dtype=dtype, rngs=rngs
    )


def _pointwise_unit(
    in_features: int,
    out_features: int,
    *,
    strides: int,
    activate: bool,
    dtype: Dtype | None,
    rngs: nnx.Rngs,
) -> ConvUnit:
    conv = nnx.Conv(
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
    activation = jax.nn.relu if activate else None
    return ConvUnit(conv, out_features, activation=activation, dtype=dtype, rngs=rngs)


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
        self.stem = stem_unit(
            in_features, widths[0], strides=1, activate=True, dtype=dtype, rngs=rngs
        )
        options = {"unit": unit, "shortcut": shortcut, "dtype": dtype, "rngs": rngs}
        stages, outputs = residual_stages(BasicBlock, widths, blocks, strides=2, **options)
        self.stages = nnx.List(stages)
        self.head = dense(outputs, num_classes, dtype=dtype, rngs=rngs)

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
    """Return ResNet18 for 32x32 images.

    Args:
        num_classes: outputs.
        in_features: channels M of the images.
        rngs: stream ``params``.
        **options: others of `CifarResNet`: ``width``, ``unit``, ``stem_unit``, ``shortcut`` and
            ``dtype``.

    Returns:
        The network with random weights, from images of shape ``(batch, 32, 32, M)`` to float32
        logits of shape ``(batch, num_classes)``.

    Raises:
        ValueError: as `CifarResNet` does.
    """
    return CifarResNet(
        (2, 2, 2, 2), num_classes=num_classes, in_features=in_features, rngs=rngs, **options
    )


def resnet34_cifar(
    *, num_classes: int = 10, in_features: int = 3, rngs: nnx.Rngs, **options
) -> CifarResNet:
    """Return ResNet34 for 32x32 images.

    Args:
        num_classes: outputs.
        in_features: channels M of the images.
        rngs: stream ``params``.
        **options: others of `CifarResNet`: ``width``, ``unit``, ``stem_unit``, ``shortcut`` and
            ``dtype``.

    Returns:
        The network with random weights, from images of shape ``(batch, 32, 32, M)`` to float32
        logits of shape ``(batch, num_classes)``.

    Raises:
        ValueError: as `CifarResNet` does.
    """
    return CifarResNet(
        (3, 4, 6, 3), num_classes=num_classes, in_features=in_features, rngs=rngs, **options
    )


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
        self.stem = stem_unit(
            in_features, widths[0], strides=1, activate=True, dtype=dtype, rngs=rngs
        )
        options = {"unit": unit, "shortcut": shortcut, "dtype": dtype, "rngs": rngs}
        counts = (blocks,) * len(widths)
        stages, outputs = residual_stages(block, widths, counts, strides=1, **options)
        self.stages = nnx.List(stages)
        self.head = dense(outputs, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w m"]) -> Float[Array, "b classes"]:
        """Return float32 logits for a batch of images."""
        x = self.stem(x)  # type: ignore[operator]
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.head(x.mean(axis=(1, 2))).astype(jnp.float32)


def resnet20_cifar(*, rngs: nnx.Rngs, **options) -> ThreeStageResNet:
    """Return ResNet-20 for 32x32 images.

    Args:
        rngs: stream ``params``.
        **options: others of `ThreeStageResNet`: ``num_classes`` (10 if not given), ``in_features``,
            ``width``, ``unit``, ``stem_unit``, ``shortcut`` and ``dtype``.

    Returns:
        The network with random weights, from images of shape ``(batch, 32, 32, 3)`` to float32
        logits of shape ``(batch, num_classes)``.

    Raises:
        ValueError: as `ThreeStageResNet` does.
    """
    return ThreeStageResNet(BasicBlock, 3, rngs=rngs, **options)


def resnet56_cifar(*, rngs: nnx.Rngs, **options) -> ThreeStageResNet:
    """Return ResNet-56 for 32x32 images.

    Args:
        rngs: stream ``params``.
        **options: others of `ThreeStageResNet`: ``num_classes`` (10 if not given), ``in_features``,
            ``width``, ``unit``, ``stem_unit``, ``shortcut`` and ``dtype``.

    Returns:
        The network with random weights, from images of shape ``(batch, 32, 32, 3)`` to float32
        logits of shape ``(batch, num_classes)``.

    Raises:
        ValueError: as `ThreeStageResNet` does.
    """
    return ThreeStageResNet(BasicBlock, 9, rngs=rngs, **options)


def resnet110_cifar(*, rngs: nnx.Rngs, **options) -> ThreeStageResNet:
    """Return ResNet-110 for 32x32 images.

    Args:
        rngs: stream ``params``.
        **options: others of `ThreeStageResNet`: ``num_classes`` (10 if not given), ``in_features``,
            ``width``, ``unit``, ``stem_unit``, ``shortcut`` and ``dtype``.

    Returns:
        The network with random weights, from images of shape ``(batch, 32, 32, 3)`` to float32
        logits of shape ``(batch, num_classes)``.

    Raises:
        ValueError: as `ThreeStageResNet` does.
    """
    return ThreeStageResNet(BasicBlock, 18, rngs=rngs, **options)


def resnet164_cifar(*, rngs: nnx.Rngs, **options) -> ThreeStageResNet:
    """Return ResNet-164, of bottlenecks, for 32x32 images.

    Args:
        rngs: stream ``params``.
        **options: others of `ThreeStageResNet`: ``num_classes`` (10 if not given), ``in_features``,
            ``width``, ``unit``, ``stem_unit``, ``shortcut`` and ``dtype``.

    Returns:
        The network with random weights, from images of shape ``(batch, 32, 32, 3)`` to float32
        logits of shape ``(batch, num_classes)``.

    Raises:
        ValueError: as `ThreeStageResNet` does.
    """
    return ThreeStageResNet(Bottleneck, 18, rngs=rngs, **options)


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
        options = {"unit": unit, "shortcut": shortcut, "dtype": dtype, "rngs": rngs}
        stages, outputs = residual_stages(block, widths, blocks, strides=1, **options)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.head = dense(outputs, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w m"]) -> Float[Array, "b classes"]:
        """Return float32 logits for a batch of images."""
        x = nnx.max_pool(self.stem(x), (3, 3), (2, 2), PAD_ONE)  # type: ignore[arg-type]
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = block(x)
        return self.head(x.mean(axis=(1, 2))).astype(jnp.float32)


def resnet18(*, num_classes: int = 1000, rngs: nnx.Rngs, **options) -> ResNet:
    """Return ResNet18 for 224x224 images.

    Args:
        num_classes: outputs.
        rngs: stream ``params``.
        **options: others of `ResNet`: ``in_features``, ``width``, ``unit``, ``shortcut`` and
            ``dtype``.

    Returns:
        The network with random weights, from images of shape ``(batch, 224, 224, 3)`` to float32
        logits of shape ``(batch, num_classes)``.

    Raises:
        ValueError: as `ResNet` does.
    """
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes=num_classes, rngs=rngs, **options)


def resnet34(*, num_classes: int = 1000, rngs: nnx.Rngs, **options) -> ResNet:
    """Return ResNet34 for 224x224 images.

    Args:
        num_classes: outputs.
        rngs: stream ``params``.
        **options: others of `ResNet`: ``in_features``, ``width``, ``unit``, ``shortcut`` and
            ``dtype``.

    Returns:
        The network with random weights, from images of shape ``(batch, 224, 224, 3)`` to float32
        logits of shape ``(batch, num_classes)``.

    Raises:
        ValueError: as `ResNet` does.
    """
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes=num_classes, rngs=rngs, **options)


def resnet50(*, num_classes: int = 1000, rngs: nnx.Rngs, **options) -> ResNet:
    """Return ResNet50 for 224x224 images.

    Args:
        num_classes: outputs.
        rngs: stream ``params``.
        **options: others of `ResNet`: ``in_features``, ``width``, ``unit``, ``shortcut`` and
            ``dtype``.

    Returns:
        The network with random weights, from images of shape ``(batch, 224, 224, 3)`` to float32
        logits of shape ``(batch, num_classes)``.

    Raises:
        ValueError: as `ResNet` does.
    """
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes=num_classes, rngs=rngs, **options)


def resnet101(*, num_classes: int = 1000, rngs: nnx.Rngs, **options) -> ResNet:
    """Return ResNet101 for 224x224 images.

    Args:
        num_classes: outputs.
        rngs: stream ``params``.
        **options: others of `ResNet`: ``in_features``, ``width``, ``unit``, ``shortcut`` and
            ``dtype``.

    Returns:
        The network with random weights, from images of shape ``(batch, 224, 224, 3)`` to float32
        logits of shape ``(batch, num_classes)``.

    Raises:
        ValueError: as `ResNet` does.
    """
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes=num_classes, rngs=rngs, **options)


def resnet152(*, num_classes: int = 1000, rngs: nnx.Rngs, **options) -> ResNet:
    """Return ResNet152 for 224x224 images.

    Args:
        num_classes: outputs.
        rngs: stream ``params``.
        **options: others of `ResNet`: ``in_features``, ``width``, ``unit``, ``shortcut`` and
            ``dtype``.

    Returns:
        The network with random weights, from images of shape ``(batch, 224, 224, 3)`` to float32
        logits of shape ``(batch, num_classes)``.

    Raises:
        ValueError: as `ResNet` does.
    """
    return ResNet(Bottleneck, (3, 8, 36, 3), num_classes=num_classes, rngs=rngs, **options)
