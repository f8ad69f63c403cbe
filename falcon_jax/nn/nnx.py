"""NNX modules to be used like ``nnx.Conv``, one a method, and the way from conv to module."""

from collections.abc import Sequence
from typing import Any, ClassVar, TypedDict, Unpack

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jax import lax
from jaxtyping import Array, PRNGKeyArray

from falcon_jax.methods import ConvSpec, DepthwiseSeparable, Falcon, Method, Params, Solver
from falcon_jax.methods.falcon import Impl
from falcon_jax.methods.fitting import check_finite
from falcon_jax.methods.ranks import Rank
from falcon_jax.methods.spec import PaddingLike, PerAxis
from falcon_jax.nn.method_conv import MethodConv
from falcon_jax.nn.trained import conv_obstacle, conv_spec, fit_stacked, for_trained


class ConvOptions(TypedDict, total=False):
    """Keyword arguments that the modules below share with ``nnx.Conv`` and `MethodConv`."""

    padding: PaddingLike
    input_dilation: PerAxis
    kernel_dilation: PerAxis
    feature_group_count: int
    use_bias: bool
    params: Params | None
    bias: Array | None
    dtype: Dtype | None
    param_dtype: Dtype
    precision: lax.PrecisionLike
    bias_init: Initializer
    rngs: nnx.Rngs | None


_GEOMETRY = ("padding", "input_dilation", "kernel_dilation", "feature_group_count", "use_bias")


class _ConvLike(MethodConv):
    """A `MethodConv` made with the arguments of ``nnx.Conv``."""

    method_class: ClassVar[type[Method]]

    def __init__(
        self,
        method: Method,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: PerAxis,
        conv: ConvOptions,
    ):
        options: dict[str, Any] = dict(conv)
        geometry = {name: options.pop(name) for name in _GEOMETRY if name in options}
        spec = ConvSpec(
            in_features=in_features,
            out_features=out_features,
            kernel_size=kernel_size,
            strides=strides,
            **geometry,
        )
        super().__init__(method, spec, **options)


class FalconConv(_ConvLike):
    """A rank-k FALCON convolution, to be used like ``nnx.Conv``.

    Parameters: ``pointwise`` of shape ``(M / groups, k, N)``, ``depthwise`` of shape
    ``(*kernel_size, k, N)`` and ``bias`` of shape ``(N,)`` or None.

    Args:
        in_features: input channels M.
        out_features: output channels N.
        kernel_size: taps per spatial axis; a number for one axis.
        strides: step between outputs.
        rank: number k of terms, or ``full``.
        impl: ``separable``, ``grouped`` or ``gep``; see `Falcon`.
        **conv: ``padding``, ``input_dilation``, ``kernel_dilation``, ``feature_group_count``,
            ``use_bias``, ``dtype``, ``param_dtype``, ``precision``, ``bias_init`` and ``rngs`` as
            in ``nnx.Conv``; ``params`` and ``bias`` to start from.

    Reference:
        FALCON, Sections 3.3 and 3.4.

    >>> layer = FalconConv(16, 32, (3, 3), rank=2, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 8, 8, 16))).shape
    (1, 8, 8, 32)
    """

    method_class = Falcon

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: PerAxis = 1,
        *,
        rank: Rank = 1,
        impl: Impl = "separable",
        **conv: Unpack[ConvOptions],
    ):
        method = Falcon(rank=rank, impl=impl)
        super().__init__(method, in_features, out_features, kernel_size, strides, conv)

    @classmethod
    def from_conv(cls, conv: nnx.Conv, rank: Rank = 1, *, impl: Impl = "separable") -> "FalconConv":
        """Return the FALCON layer nearest to a trained convolution.

        Raises:
            ValueError: if the convolution cannot be replaced, with the reason.
        """
        layer = fit_conv(conv, Falcon(rank=rank, impl=impl))
        assert isinstance(layer, cls)
        return layer


class DepthwiseSeparableConv(_ConvLike):
    """A depthwise-then-pointwise convolution of rank k, to be used like ``nnx.Conv``.

    Parameters: ``depthwise`` of shape ``(*kernel_size, M, k)``, ``pointwise`` of shape
    ``(M / groups, k, N)`` and ``bias`` of shape ``(N,)`` or None.

    Args:
        in_features: input channels M.
        out_features: output channels N.
        kernel_size: taps per spatial axis; a number for one axis.
        strides: step between outputs.
        rank: depthwise kernels per input channel, or ``full``.
        **conv: as in `FalconConv`.

    Reference:
        FALCON, Section 3.6.1.
    """

    method_class = DepthwiseSeparable

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: PerAxis = 1,
        *,
        rank: Rank = 1,
        **conv: Unpack[ConvOptions],
    ):
        method = DepthwiseSeparable(rank=rank)
        super().__init__(method, in_features, out_features, kernel_size, strides, conv)

    @classmethod
    def from_conv(cls, conv: nnx.Conv, rank: Rank = 1) -> "DepthwiseSeparableConv":
        """Return the depthwise separable layer nearest to a trained convolution (GEP-in).

        Raises:
            ValueError: if the convolution cannot be replaced, with the reason.
        """
        layer = fit_conv(conv, DepthwiseSeparable(rank=rank))
        assert isinstance(layer, cls)
        return layer


_NAMED_LAYERS = (FalconConv, DepthwiseSeparableConv)


def method_conv(method: Method, spec: ConvSpec, **options: Any) -> MethodConv:
    """Return the module for a method: `FalconConv` for `Falcon`, `MethodConv` where none is named.

    Args:
        method: how the convolution is carried out.
        spec: its geometry.
        **options: ``params``, ``bias``, ``dtype`` and the rest, as in `MethodConv`.

    Returns:
        The module.
    """
    for layer in _NAMED_LAYERS:
        if type(method) is layer.method_class:
            geometry = {name: getattr(spec, name) for name in _GEOMETRY}
            return layer(
                spec.in_features,
                spec.out_features,
                spec.kernel_size,
                spec.strides,
                **method.options(),
                **geometry,
                **options,
            )
    return MethodConv(method, spec, **options)


def fit_conv(
    conv: nnx.Conv,
    method: Method,
    *,
    solver: Solver = "exact",
    key: PRNGKeyArray | None = None,
) -> MethodConv:
    """Return the layer that replaces a trained convolution.

    Bias, ``dtype`` and ``precision`` are taken over. A kernel with leading axes (of layers stacked
    for ``nnx.scan`` or ``nnx.vmap``) gives parameters with the same leading axes.

    Args:
        conv: the trained convolution; it is not changed.
        method: what replaces it.
        solver: as in `fit`.
        key: as in `fit`.

    Returns:
        A `FalconConv` for `Falcon`, and so on.

    Raises:
        ValueError: if the convolution cannot be replaced, with the reason.
    """
    spec = conv_spec(conv)
    obstacle = conv_obstacle(conv) or method.supports(spec)
    if obstacle is not None:
        raise ValueError(f"{method} cannot replace {spec}: {obstacle}.")
    kernel = conv.kernel[...]
    check_finite(kernel, "the kernel")
    method = for_trained(method, kernel, spec)
    return conv_like(conv, method, fit_stacked(kernel, method, spec, solver, key))


def conv_like(conv: nnx.Conv, method: Method, params: Params) -> MethodConv:
    """Return the layer with given parameters and all else as in ``conv``."""
    return method_conv(
        method,
        conv_spec(conv),
        params=params,
        bias=None if conv.bias is None else jnp.array(conv.bias[...]),
        dtype=conv.dtype,
        precision=conv.precision,
    )
