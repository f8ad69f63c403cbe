"""The one NNX module that every method can use, and how a trained convolution becomes one."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype, Initializer
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from falcon_jax.methods.base import Method, Params, apply_method
from falcon_jax.methods.fit import Solver, check_finite, fit
from falcon_jax.ops.convolution import conv_on_small_maps
from falcon_jax.ops.geometry import ConvSpec, PerAxis, whole_kernel


def conv_spec(conv: nnx.Conv) -> ConvSpec:
    """Return the spec of an NNX convolution."""
    return ConvSpec(
        kernel_size=conv.kernel_size,
        in_features=conv.in_features,
        out_features=conv.out_features,
        strides=conv.strides,
        padding=conv.padding,  # type: ignore[arg-type]
        kernel_dilation=conv.kernel_dilation,
        input_dilation=conv.input_dilation,
        feature_group_count=conv.feature_group_count,
        use_bias=conv.bias is not None,
    )


def conv_obstacle(conv: nnx.Conv) -> str | None:
    """Return why a convolution must stay whatever the method, or None."""
    if conv.mask is not None:
        return "masked kernel"
    kind = type(conv.kernel)
    own_access = kind.get_value is not nnx.Variable.get_value
    if own_access or any(name.startswith("on_") for name in conv.kernel.get_metadata()):
        return "kernel computed when it is read"
    if conv.conv_general_dilated not in (lax.conv_general_dilated, conv_on_small_maps):
        return "own convolution function"
    if conv.promote_dtype is not promote_dtype:
        return "own type promotion"
    if conv.preferred_element_type is not None:
        return "preferred_element_type is set"
    return None


def for_trained(
    method: Method, kernel: Float[Array, "*stacked_kernel_shape"], spec: ConvSpec
) -> Method:
    """Return the method as a layer needs it, one for all layers of a stack."""
    return method.for_layer(spec, kernel.reshape(-1, *spec.kernel_shape))


def fit_stacked(
    kernel: Float[Array, "*stacked_kernel_shape"],
    method: Method,
    spec: ConvSpec,
    solver: Solver = "exact",
    key: PRNGKeyArray | None = None,
) -> Params:
    """Fit a kernel that may have leading axes; the parameters get the same leading axes.

    Args:
        kernel: shape ``(*stack, *spec.kernel_shape)``.
        method: what to fit.
        spec: the convolution.
        solver: as in `fit`.
        key: as in `fit`; every layer of a stack starts from a key of its own.

    Returns:
        Parameters of shape ``(*stack, ...)``.
    """
    stack = kernel.shape[: kernel.ndim - len(spec.kernel_shape)]
    if not stack:
        return fit(kernel, method, solver, spec=spec, key=key)
    flat = kernel.reshape(-1, *spec.kernel_shape)
    keys = jax.random.split(jax.random.key(0) if key is None else key, flat.shape[0])
    params = jax.vmap(lambda k, s: fit(k, method, solver, spec=spec, key=s))(flat, keys)
    return {name: value.reshape(*stack, *value.shape[1:]) for name, value in params.items()}


# What nnx.Conv has beside, as it is where nothing was asked for.
_UNUSED = {
    "mask": None,
    "conv_general_dilated": lax.conv_general_dilated,
    "promote_dtype": promote_dtype,
    "preferred_element_type": None,
}


def _of_spec(name: str) -> Any:
    """Return the property for a field of the spec; set, it gives the layer another geometry."""

    def get(self: "MethodConv") -> Any:
        return getattr(self.spec, name)

    def put(self: "MethodConv", value: Any) -> None:
        spec = dataclasses.replace(self.spec, **{name: value})
        if spec.kernel_shape != self.spec.kernel_shape:
            raise ValueError(
                f"the parameters stand for kernels of shape {self.spec.kernel_shape}; with "
                f"{name}={value!r} they would be of shape {spec.kernel_shape}."
            )
        self.method.require(spec)
        self.spec = spec

    return property(get, put)


class MethodConv(nnx.Conv):
    """A convolution carried out by a compression method.

    It stands where an ``nnx.Conv`` stood: it is one to code that asks, and has its attributes;
    ``kernel`` is the standard kernel that its parameters stand for.

    The method's parameters are attributes of the module, each an ``nnx.Param`` under the name that
    the method gives it, beside ``bias`` (None without one).

    Args:
        method: how the convolution is carried out.
        spec: its geometry.
        params: the method's parameters; random ones if not given.
        bias: N entries; made by ``bias_init`` if not given and ``spec.use_bias``.
        dtype: of the computation; as input and parameters if None.
        param_dtype: of random parameters.
        precision: of products on accelerators, as in ``jax.lax``.
        bias_init: makes the bias.
        rngs: for random parameters, stream ``params``.

    Raises:
        ValueError: if the method cannot replace such a convolution, or ``rngs`` is missing.

    >>> from falcon_jax.methods.falcon import Falcon
    >>> spec = ConvSpec(kernel_size=(3, 3), in_features=16, out_features=32, strides=2)
    >>> layer = MethodConv(Falcon(rank=2), spec, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 8, 8, 16))).shape, layer.kernel.shape
    ((1, 4, 4, 32), (3, 3, 16, 32))
    """

    def __init__(
        self,
        method: Method,
        spec: ConvSpec,
        *,
        params: Params | None = None,
        bias: Array | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: lax.PrecisionLike = None,
        bias_init: Initializer = nnx.initializers.zeros_init(),  # noqa: B008  # a pure function
        rngs: nnx.Rngs | None = None,
    ):
        method.require(spec)
        method = method.for_layer(spec)
        if rngs is None and (params is None or (bias is None and spec.use_bias)):
            raise ValueError("random parameters need rngs, e.g. rngs=nnx.Rngs(0).")
        if params is None:
            assert rngs is not None
            params = {
                name: value.astype(param_dtype)
                for name, value in method.init(rngs.params(), spec).items()
            }
        if bias is None and spec.use_bias:
            assert rngs is not None
            bias = bias_init(rngs.params(), (spec.out_features,), param_dtype)
        self.method = method
        self.spec = spec
        self.param_names = tuple(sorted(params))
        for name in self.param_names:
            setattr(self, name, nnx.Param(params[name]))
        self.bias = nnx.data(None) if bias is None else nnx.Param(bias)
        self.dtype = dtype
        self.param_dtype = params[self.param_names[0]].dtype if params else param_dtype
        self.precision = precision
        for name, value in _UNUSED.items():
            setattr(self, name, value)

    in_features = _of_spec("in_features")
    out_features = _of_spec("out_features")
    kernel_size = _of_spec("kernel_size")
    strides = _of_spec("strides")
    padding = _of_spec("padding")
    input_dilation = _of_spec("input_dilation")
    kernel_dilation = _of_spec("kernel_dilation")
    feature_group_count = _of_spec("feature_group_count")
    use_bias = _of_spec("use_bias")
    kernel_shape = property(lambda self: self.spec.kernel_shape)

    @property
    def kernel(self) -> Float[Array, "*stacked_kernel_shape"]:
        """The standard kernel that the parameters stand for; with their leading axes, if any."""
        build, stack = self.method.kernel, _stack(self.method, self.spec, self.params)
        function = functools.partial(build, spec=self.spec)
        for _ in range(stack):
            function = jax.vmap(function)
        return function(self.params)

    @property
    def params(self) -> Params:
        """The method's parameters as arrays."""
        return {name: getattr(self, name)[...] for name in self.param_names}

    def __call__(
        self, inputs: Float[ArrayLike, "*batch m"], out_sharding: Any = None
    ) -> Float[Array, "*batch_out n"]:
        """Convolve inputs of shape ``(..., *spatial, M)``, any number of batch axes.

        Args:
            inputs: the inputs.
            out_sharding: how the output is laid out on a mesh of explicit axes, as in ``nnx.Conv``.
        """
        bias = None if self.bias is None else self.bias[...]
        y = apply_method(
            self.method,
            self.spec,
            self.params,
            bias,
            inputs,
            dtype=self.dtype,
            precision=self.precision,
        )
        return y if out_sharding is None else jax.reshard(y, out_sharding)


def _stack(method: Method, spec: ConvSpec, params: Params) -> int:
    """Return how many leading axes parameters have, of layers stacked for scan or vmap."""
    plain = jax.eval_shape(lambda: method.init(jax.random.key(0), spec))
    return next((params[n].ndim - len(plain[n].shape) for n in params), 0)


C = TypeVar("C", bound="NamedConv")

_NAMED_LAYERS: dict[type[Method], type["NamedConv"]] = {}
_LAYOUT = ("out_sharding", "sharding", "sharding_names", "sharding_rules", "mesh")
_GEOMETRY = ("padding", "input_dilation", "kernel_dilation", "feature_group_count", "use_bias")


class NamedConv(MethodConv):
    """A `MethodConv` made with the arguments of ``nnx.Conv``; a subclass names its method.

    Args:
        in_features: input channels M.
        out_features: output channels N.
        kernel_size: taps per spatial axis; a number for one axis.
        strides: step between outputs.
        **options: the settings of the method, such as ``rank``; ``padding``, ``input_dilation``,
            ``kernel_dilation``, ``feature_group_count``, ``use_bias``, ``dtype``, ``param_dtype``,
            ``precision``, ``bias_init`` and ``rngs`` as in ``nnx.Conv``; ``params`` and ``bias`` to
            start from.

    Raises:
        ValueError: if the method cannot replace such a convolution, or ``rngs`` is missing.
    """

    method_class: ClassVar[type[Method]]

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        if "method_class" in vars(cls):  # and not a subclass of such a class
            _NAMED_LAYERS[cls.method_class] = cls

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: PerAxis = 1,
        **options: Any,
    ):
        settings = {
            field.name: options.pop(field.name)
            for field in dataclasses.fields(self.method_class)  # type: ignore[arg-type]
            if field.name in options
        }
        geometry = {name: options.pop(name) for name in _GEOMETRY if name in options}
        spec = ConvSpec(
            in_features=in_features,
            out_features=out_features,
            kernel_size=kernel_size,
            strides=strides,
            **geometry,
        )
        super().__init__(self.method_class(**settings), spec, **options)

    @classmethod
    def from_conv(cls: type[C], conv: nnx.Conv, rank: Any = None, **settings: Any) -> C:
        """Return the layer nearest to a trained convolution.

        Args:
            conv: it is not changed.
            rank: of a method that has one; the method's default if not given.
            **settings: others of the method.

        Raises:
            ValueError: if the convolution cannot be replaced, with the reason.
        """
        if rank is not None:
            settings["rank"] = rank
        layer = fit_conv(conv, cls.method_class(**settings))
        assert isinstance(layer, cls)
        return layer


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
    kernel = whole_kernel(conv.kernel[...])
    check_finite(kernel, "the kernel")
    method = for_trained(method, kernel, spec)
    return conv_like(conv, method, fit_stacked(kernel, method, spec, solver, key))


def conv_like(conv: nnx.Conv, method: Method, params: Params) -> MethodConv:
    """Return the layer with given parameters and all else as in ``conv``.

    Parameters are of the kernel's type of variable, with its metadata but for the layout on a mesh,
    which is that of other axes.

    Args:
        conv: the convolution, of arrays or of shapes; it is not changed.
        method: how it is carried out.
        params: the method's parameters.
    """
    layer = method_conv(
        method,
        conv_spec(conv),
        params=params,
        bias=None if conv.bias is None else jnp.zeros(conv.bias.shape),  # until below
        dtype=conv.dtype,
        precision=conv.precision,
    )
    metadata = {n: v for n, v in conv.kernel.get_metadata().items() if n not in _LAYOUT}
    for name in layer.param_names:
        setattr(layer, name, type(conv.kernel)(params[name], **metadata))
    if conv.bias is not None:
        setattr(layer, "bias", conv.bias.copy())  # noqa: B010  # of any type of variable
    return layer


def standard_conv(layer: MethodConv) -> nnx.Conv | None:
    """Return the standard convolution with the kernel of a layer; None if it is stacked."""
    spec, kernel = layer.spec, layer.kernel
    if kernel.ndim > len(spec.kernel_shape):  # stacked
        return None
    conv = nnx.Conv(
        spec.in_features,
        spec.out_features,
        spec.kernel_size,
        spec.strides,
        padding=spec.padding,
        input_dilation=spec.input_dilation,
        kernel_dilation=spec.kernel_dilation,
        feature_group_count=spec.feature_group_count,
        use_bias=layer.bias is not None,
        dtype=layer.dtype,
        precision=layer.precision,  # type: ignore[arg-type]  # Flax knows fewer names
        conv_general_dilated=conv_on_small_maps,
        kernel_init=nnx.initializers.zeros_init(),
        rngs=nnx.Rngs(0),
    )
    conv.kernel[...] = kernel
    if layer.bias is not None:
        conv.bias = nnx.Param(layer.bias[...])
    return conv
