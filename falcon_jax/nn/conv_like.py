"""From a method, or a trained convolution, to the NNX module that stands for it."""

from collections.abc import Sequence
from typing import Any, ClassVar, TypedDict, TypeVar

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jax import lax
from jaxtyping import Array, PRNGKeyArray

from falcon_jax.methods import ConvSpec, Method, Params, Solver
from falcon_jax.methods.fitting import check_finite
from falcon_jax.nn.method_conv import MethodConv
from falcon_jax.nn.trained import conv_obstacle, conv_spec, fit_stacked, for_trained
from falcon_jax.ops.geometry import PaddingLike, PerAxis


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


_NAMED_LAYERS: dict[type[Method], type["ConvLike"]] = {}
_GEOMETRY = ("padding", "input_dilation", "kernel_dilation", "feature_group_count", "use_bias")


class ConvLike(MethodConv):
    """A `MethodConv` made with the arguments of ``nnx.Conv``; a subclass names its method."""

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


L = TypeVar("L", bound=type[ConvLike])


def named_layer(cls: L) -> L:
    """Make a class the one that `method_conv` returns for its method. Use as a decorator."""
    _NAMED_LAYERS[cls.method_class] = cls
    return cls


def method_conv(method: Method, spec: ConvSpec, **options: Any) -> MethodConv:
    """Return the module for a method: `FalconConv` for `Falcon`, `MethodConv` where none is named.

    Args:
        method: how the convolution is carried out.
        spec: its geometry.
        **options: ``params``, ``bias``, ``dtype`` and the rest, as in `MethodConv`.

    Returns:
        The module.
    """
    layer: Any = _NAMED_LAYERS.get(type(method))
    if layer is None:
        return MethodConv(method, spec, **options)
    geometry = {name: getattr(spec, name) for name in _GEOMETRY}
    sizes = (spec.in_features, spec.out_features, spec.kernel_size, spec.strides)
    return layer(*sizes, **method.options(), **geometry, **options)


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
