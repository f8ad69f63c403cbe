"""Conv units: what the models put where a paper says "convolution, BatchNorm, ReLU".

A model takes a unit factory, so that one description serves the standard network and every way to
replace its convolutions.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from falcon_jax.methods import ConvSpec, Method
from falcon_jax.models.convolutions import PAD_ONE, conv_3x3
from falcon_jax.nn.batch_norm import BatchNorm
from falcon_jax.nn.conv_like import method_conv


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
    """Return a unit around a standard 3x3 convolution with bias, as the paper's models have it."""
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
    """Return a unit around a standard 3x3 convolution without bias, as torchvision's ResNets."""
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
    """Return a unit around a standard 3x3 convolution with bias, without BatchNorm."""
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
