"""Conv units: what the models put where a paper says "convolution, BatchNorm, ReLU"."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from falcon_jax.methods.base import Method
from falcon_jax.nn.layers import BatchNorm
from falcon_jax.nn.method_conv import method_conv
from falcon_jax.ops.convolution import conv_on_small_maps
from falcon_jax.ops.depthwise import depthwise_conv
from falcon_jax.ops.geometry import ConvSpec
from falcon_jax.ops.separable import pointwise_conv


def channel_shuffle(x: Float[Array, "*batch c"], groups: int) -> Float[Array, "*batch c"]:
    """Deal channels out so that those of every group end up in all groups.

    ``y[..., i g + j] = x[..., j C / g + i]``

    Args:
        x: input with C channels last.
        groups: number g of groups that the channels lie in; it divides C.

    Returns:
        Output of the same shape.

    Raises:
        ValueError: if the groups do not divide the channels.

    Reference:
        ShuffleNet (Zhang et al., 2018), Section 3.1.

    >>> channel_shuffle(jnp.arange(6.0), 2)
    Array([0., 3., 1., 4., 2., 5.], dtype=float32)
    """
    channels = x.shape[-1]
    if groups < 1 or channels % groups:
        raise ValueError(f"{groups} groups do not divide {channels} channels.")
    grouped = x.reshape(*x.shape[:-1], groups, channels // groups)
    return jnp.swapaxes(grouped, -1, -2).reshape(x.shape)


def scaled(features: int, width: float | int) -> int:
    """Return the channels that a width multiplier leaves, rounded down.

    ``int(width * features)``

    Args:
        features: channels at width 1.
        width: the multiplier alpha.

    Returns:
        At least 1.

    Raises:
        ValueError: if the multiplier is not positive or no channel is left.

    Reference:
        MobileNet (Howard et al., 2017), Section 3.3.

    >>> scaled(64, 1.75)
    112
    """
    if not width > 0 or int(width * features) < 1:
        raise ValueError(
            f"width={width!r} leaves no channel of {features}; give a number of at least "
            f"1 / {features}."
        )
    return int(width * features)


PAD_ONE = ((1, 1), (1, 1))


def conv_3x3(
    in_features: int,
    out_features: int,
    strides: int,
    *,
    use_bias: bool,
    dtype: Dtype | None,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Return a standard 3x3 convolution, padded by one."""
    return nnx.Conv(
        in_features,
        out_features,
        (3, 3),
        strides,
        padding=PAD_ONE,
        use_bias=use_bias,
        dtype=dtype,
        conv_general_dilated=conv_on_small_maps,
        kernel_init=nnx.initializers.he_uniform(),
        rngs=rngs,
    )


def depthwise_3x3(
    features: int, strides: int, *, use_bias: bool, dtype: Dtype | None, rngs: nnx.Rngs
) -> nnx.Conv:
    """Return a 3x3 convolution with a kernel of its own for every channel, padded by one."""
    return nnx.Conv(
        features,
        features,
        (3, 3),
        strides,
        padding=PAD_ONE,
        feature_group_count=features,
        use_bias=use_bias,
        dtype=dtype,
        conv_general_dilated=_depthwise,
        kernel_init=nnx.initializers.he_uniform(),
        rngs=rngs,
    )


def pointwise(
    in_features: int,
    out_features: int,
    *,
    groups: int = 1,
    use_bias: bool,
    dtype: Dtype | None,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Return a 1x1 convolution, one for each group of channels."""
    return nnx.Conv(
        in_features,
        out_features,
        (1, 1),
        padding="VALID",
        feature_group_count=groups,
        use_bias=use_bias,
        dtype=dtype,
        conv_general_dilated=_pointwise,
        kernel_init=nnx.initializers.he_uniform(),
        rngs=rngs,
    )


def _depthwise(
    lhs: Float[Array, "b h w c"],
    rhs: Float[Array, "d1 d2 1 c"],
    window_strides: tuple[int, ...],
    padding: Any,
    **options: Any,
) -> Float[Array, "b h_out w_out c"]:
    pairs = tuple(map(tuple, padding))
    return depthwise_conv(lhs, jnp.squeeze(rhs, 2), strides=tuple(window_strides), padding=pairs)


def _pointwise(
    lhs: Float[Array, "b h w m"],
    rhs: Float[Array, "1 1 m_group n"],
    window_strides: tuple[int, ...],
    padding: Any,
    *,
    feature_group_count: int,
    precision: Any,
    **options: Any,
) -> Float[Array, "b h w n"]:
    kernel = rhs.reshape(rhs.shape[2:])
    return pointwise_conv(lhs, kernel, feature_group_count=feature_group_count, precision=precision)


@runtime_checkable
class UnitFactory(Protocol):
    """Makes the unit that stands for one 3x3 convolution."""

    def __call__(
        self,
        in_features: int,
        out_features: int,
        *,
        strides: int,
        activate: bool,
        dtype: Dtype | None,
        rngs: nnx.Rngs,
    ) -> nnx.Module:
        """Return a module from ``in_features`` to ``out_features`` channels.

        Args:
            in_features: input channels.
            out_features: output channels.
            strides: step between outputs on both axes.
            activate: whether the unit ends with its activation.
            dtype: of the computation.
            rngs: for parameters.
        """
        ...


class ConvUnit(nnx.Module):
    """Convolution, BatchNorm and an activation.

    Args:
        conv: any convolution module.
        features: its output channels.
        activation: ends the unit; None for none.
        normalize: whether BatchNorm follows the convolution.
        dtype: of the computation; statistics are float32.
        rngs: for parameters.

    >>> unit = ConvUnit(nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0)), 8, rngs=nnx.Rngs(0))
    >>> unit.eval()
    >>> float(unit(jnp.ones((1, 4, 4, 3))).min()) >= 0
    True
    """

    def __init__(
        self,
        conv: nnx.Module,
        features: int,
        *,
        activation: Callable[[Array], Array] | None = jax.nn.relu,
        normalize: bool = True,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        self.conv = conv
        self.norm = nnx.data(None)
        if normalize:
            self.norm = batch_norm(features, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Float[Array, "b h w m"]) -> Float[Array, "b h_out w_out n"]:
        """Apply the unit to a batch of feature maps."""
        y = self.conv(x)  # type: ignore[operator]
        y = y if self.norm is None else self.norm(y)
        return y if self.activation is None else self.activation(y)


def batch_norm(features: int, *, dtype: Dtype | None, rngs: nnx.Rngs) -> BatchNorm:
    """Return BatchNorm with PyTorch's settings: new statistics weigh 0.1, epsilon 1e-5."""
    return BatchNorm(features, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs)


def dense(
    in_features: int, out_features: int, *, dtype: Dtype | None, rngs: nnx.Rngs
) -> nnx.Linear:
    """Return a fully connected layer, its weights uniform: normal ones compile far slower."""
    return nnx.Linear(
        in_features,
        out_features,
        dtype=dtype,
        kernel_init=nnx.initializers.lecun_uniform(),
        rngs=rngs,
    )


def standard_unit(
    in_features: int,
    out_features: int,
    *,
    strides: int = 1,
    activate: bool = True,
    dtype: Dtype | None = None,
    rngs: nnx.Rngs,
) -> ConvUnit:
    """Return a unit around a standard 3x3 convolution with bias, as the paper's models have it.

    Args:
        in_features: input channels M.
        out_features: output channels N.
        strides: step between outputs.
        activate: whether ReLU ends the unit.
        dtype: of the computation; parameters and statistics are float32.
        rngs: stream ``params``.

    Returns:
        The unit, of ``conv`` and ``norm``.

    >>> unit = standard_unit(3, 8, strides=2, rngs=nnx.Rngs(0))
    >>> unit(jnp.ones((1, 4, 4, 3))).shape
    (1, 2, 2, 8)
    """
    conv = conv_3x3(in_features, out_features, strides, use_bias=True, dtype=dtype, rngs=rngs)
    return ConvUnit(conv, out_features, activation=_relu_if(activate), dtype=dtype, rngs=rngs)


def unbiased_unit(
    in_features: int,
    out_features: int,
    *,
    strides: int = 1,
    activate: bool = True,
    dtype: Dtype | None = None,
    rngs: nnx.Rngs,
) -> ConvUnit:
    """Return a unit around a standard 3x3 convolution without bias, as torchvision's ResNets.

    Args:
        in_features: input channels M.
        out_features: output channels N.
        strides: step between outputs.
        activate: whether ReLU ends the unit.
        dtype: of the computation; parameters and statistics are float32.
        rngs: stream ``params``.

    Returns:
        The unit, of ``conv`` and ``norm``.

    >>> unbiased_unit(3, 8, rngs=nnx.Rngs(0)).conv.bias is None
    True
    """
    conv = conv_3x3(in_features, out_features, strides, use_bias=False, dtype=dtype, rngs=rngs)
    return ConvUnit(conv, out_features, activation=_relu_if(activate), dtype=dtype, rngs=rngs)


def plain_unit(
    in_features: int,
    out_features: int,
    *,
    strides: int = 1,
    activate: bool = True,
    dtype: Dtype | None = None,
    rngs: nnx.Rngs,
) -> ConvUnit:
    """Return a unit around a standard 3x3 convolution with bias, without BatchNorm.

    Args:
        in_features: input channels M.
        out_features: output channels N.
        strides: step between outputs.
        activate: whether ReLU ends the unit.
        dtype: of the computation; parameters are float32.
        rngs: stream ``params``.

    Returns:
        The unit, of ``conv``; ``norm`` is None.

    >>> plain_unit(3, 8, rngs=nnx.Rngs(0)).norm is None
    True
    """
    conv = conv_3x3(in_features, out_features, strides, use_bias=True, dtype=dtype, rngs=rngs)
    return ConvUnit(
        conv, out_features, activation=_relu_if(activate), normalize=False, dtype=dtype, rngs=rngs
    )


def method_unit(method: Method) -> UnitFactory:
    """Return a factory of units around a compressed 3x3 convolution without bias.

    BatchNorm follows and takes the mean away, so the authors' layers have no bias either.

    Args:
        method: carries the convolutions out, e.g. ``Falcon(rank=2)``.

    Returns:
        A unit factory; parameters are random.

    >>> from falcon_jax.methods.falcon import Falcon
    >>> unit = method_unit(Falcon(rank=2))(8, 16, rngs=nnx.Rngs(0))
    >>> unit.conv.depthwise.shape, unit.conv.bias is None
    ((3, 3, 2, 16), True)
    """

    def unit(
        in_features: int,
        out_features: int,
        *,
        strides: int = 1,
        activate: bool = True,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ) -> ConvUnit:
        spec = ConvSpec(
            kernel_size=(3, 3),
            in_features=in_features,
            out_features=out_features,
            strides=strides,
            padding=PAD_ONE,
            use_bias=False,
        )
        conv = method_conv(method, spec, dtype=dtype, rngs=rngs)
        return ConvUnit(conv, out_features, activation=_relu_if(activate), dtype=dtype, rngs=rngs)

    return unit


def _relu_if(activate: bool) -> Callable[[Array], Array] | None:
    return jax.nn.relu if activate else None
