"""Layers of Linen modules: found by watching a call."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import errors, traverse_util
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax import lax
from jaxtyping import Array

from falcon_jax.compression.inputs import Inputs
from falcon_jax.compression.layers import Layer, calls_in, mark_output, traced_jaxpr
from falcon_jax.methods import ConvSpec, Method
from falcon_jax.nn.linen import ConvLike
from falcon_jax.nn.linen_compressed import CompressedModule

Variables = Mapping[str, Any]

_NORMALISED = (nn.WeightNorm, nn.SpectralNorm)


def abstract_variables(module: nn.Module, inputs: Inputs) -> Variables:
    """Return the shapes of the variables that a module makes for such inputs.

    Raises:
        ValueError: if the module cannot be called on them.
    """

    def init(arrays: list[Array]) -> Variables:
        return inputs.with_arrays(arrays).call(
            lambda *args, **kwargs: module.init(jax.random.key(0), *args, **kwargs)
        )

    return _explained(module, inputs, lambda: jax.eval_shape(init, inputs.shapes.arrays))


def find_layers(module: nn.Module, inputs: Inputs, variables: Variables) -> list[Layer]:
    """Return the layers of a module, in the order of use.

    Args:
        module: any Linen module.
        inputs: what it is called with.
        variables: its variables, arrays or shapes.

    Returns:
        Convolutions of every kind, fully connected layers, and under kind ``other`` whatever else
        holds parameters. Modules used in several places appear once.

    Raises:
        ValueError: if the module cannot be called on the inputs.
    """
    watched = _Watch()
    calls = calls_in(intercepted_jaxpr(module, inputs, variables, watched.intercept))
    own: dict[str, dict[str, tuple[int, ...]]] = {}
    for path, leaf in named_params(variables).items():
        owner, _, name = path.rpartition("/")
        own.setdefault(owner, {})[name] = leaf.shape
    layers = []
    for path, seen in watched.layers.items():
        shapes = own.pop(path, {})
        layers.append(
            dataclasses.replace(
                seen.layer,
                params=_count(shapes),
                calls=calls.get(path, ()),
                stack=_stack(shapes, seen.layer.spec),
                obstacle=seen.layer.obstacle or _stacking_obstacle(shapes, seen),
            )
        )
    layers += [
        Layer(path=path, kind="other", params=_count(shapes)) for path, shapes in own.items()
    ]
    return layers


def intercepted_jaxpr(
    module: nn.Module, inputs: Inputs, variables: Variables, intercept: Callable[..., Any]
) -> Any:
    """Return the jaxpr of a module's call with every method going through an interceptor.

    Args:
        module: any Linen module.
        inputs: what it is called with.
        variables: its variables, arrays or shapes.
        intercept: as ``linen.intercept_methods`` takes it.

    Raises:
        ValueError: if the module cannot be called on the inputs.
    """

    def forward(variables: Variables, arrays: list[Array]) -> Any:
        def apply(*args: Any, **kwargs: Any) -> Any:
            rngs = {"params": jax.random.key(0)}  # stands in for every other stream
            with nn.intercept_methods(intercept):
                return module.apply(variables, *args, rngs=rngs, mutable=True, **kwargs)

        return inputs.with_arrays(arrays).call(apply)

    return _explained(
        module, inputs, lambda: traced_jaxpr(forward, variables, inputs.shapes.arrays)
    )


def named_params(variables: Variables) -> dict[str, Any]:
    """Return the parameters by ``/``-joined path."""
    params = nn.meta.unbox(variables.get("params", {}))
    return traverse_util.flatten_dict(dict(params), sep="/")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Seen:
    layer: Layer
    kernel_shape: tuple[int, ...] | None
    boxed: bool


class _Watch:
    """Notes the layers whose calls it intercepts, and marks their outputs."""

    def __init__(self):
        self.layers: dict[str, _Seen] = {}
        self._replaced: dict[str, tuple[Method, ConvSpec]] = {}
        self._biased: set[str] = set()
        self._normalised = 0

    def intercept(
        self,
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module = context.module
        if isinstance(module, CompressedModule) and context.method_name == "__call__":
            self._replaced |= module.replaced()
            self._biased |= set(module.folded_convs().values())
        normalises = isinstance(module, _NORMALISED)
        self._normalised += normalises
        try:
            y = next_fun(*args, **kwargs)
        finally:
            self._normalised -= normalises
        if context.method_name != "__call__":
            return y
        x: Any = args[0] if args else next(iter(kwargs.values()), None)
        path = "/".join(module.path)
        layer = self._describe(path, module, x)
        if layer is None:
            return y
        kernel = module.get_variable("params", "kernel")
        self.layers.setdefault(
            path,
            _Seen(
                layer=layer,
                kernel_shape=None if kernel is None else nn.meta.unbox(kernel).shape,
                boxed=isinstance(kernel, nn.meta.AxisMetadata),
            ),
        )
        return mark_output(path, y, x.shape)

    def _describe(self, path: str, module: nn.Module, x: Any) -> Layer | None:
        if path in self._replaced:
            method, spec = self._replaced[path]
            return _compressed(path, method, spec)
        if isinstance(module, ConvLike):
            spec = module.spec(x.shape[-1])
            return _compressed(path, module.method().for_layer(spec), spec)
        if isinstance(module, nn.Conv):
            obstacle = "kernel normalised anew in every call" if self._normalised else None
            spec = conv_spec(module, x.shape[-1])
            if path in self._biased:
                spec = dataclasses.replace(spec, use_bias=True)
            return Layer(
                path=path,
                kind="conv",
                params=0,
                spec=spec,
                obstacle=obstacle or _conv_obstacle(module),
            )
        if isinstance(module, nn.ConvTranspose):
            spec = ConvSpec(
                kernel_size=module.kernel_size,
                in_features=x.shape[-1],
                out_features=module.features,
                use_bias=module.use_bias,
            )
            return Layer(
                path=path,
                kind="conv_transpose",
                params=0,
                spec=spec,
                obstacle="transposed convolution",
            )
        if isinstance(module, nn.Dense):
            shape = (x.shape[-1], module.features, module.use_bias)
            return Layer(path=path, kind="linear", params=0, linear_shape=shape)
        return None


def conv_spec(conv: nn.Conv, in_features: int) -> ConvSpec:
    """Return the spec of a Linen convolution of so many input channels."""
    return ConvSpec(
        kernel_size=conv.kernel_size,
        in_features=in_features,
        out_features=conv.features,
        strides=conv.strides,
        padding=conv.padding,  # type: ignore[arg-type]
        kernel_dilation=conv.kernel_dilation,
        input_dilation=conv.input_dilation,
        feature_group_count=conv.feature_group_count,
        use_bias=conv.use_bias,
    )


def _conv_obstacle(conv: nn.Conv) -> str | None:
    if type(conv) is not nn.Conv:
        return f"{type(conv).__name__} is a subclass of linen.Conv and may act otherwise"
    if conv.mask is not None:
        return "masked kernel"
    if conv.conv_general_dilated not in (None, lax.conv_general_dilated):
        return "own convolution function"
    if conv.conv_general_dilated_cls is not None:
        return "own convolution function"
    if conv.promote_dtype is not promote_dtype:
        return "own type promotion"
    if getattr(conv, "preferred_element_type", None) is not None:
        return "preferred_element_type is set"
    return None


def _compressed(path: str, method: Method, spec: ConvSpec) -> Layer:
    return Layer(
        path=path,
        kind="conv",
        params=0,
        spec=spec,
        method=method,
        obstacle=f"compressed already by {method}",
    )


def _count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _stack(shapes: Mapping[str, tuple[int, ...]], spec: ConvSpec | None) -> tuple[int, ...]:
    kernel = shapes.get("kernel")
    if kernel is None or spec is None:
        return ()
    return kernel[: len(kernel) - len(spec.kernel_shape)]


def _stacking_obstacle(shapes: Mapping[str, tuple[int, ...]], seen: _Seen) -> str | None:
    kernel = shapes.get("kernel")
    if kernel is None or seen.kernel_shape is None or seen.layer.spec is None:
        return None
    if seen.boxed:
        return "kernel in a box of Flax metadata, such as its partitioning"
    if kernel != _stack(shapes, seen.layer.spec) + seen.kernel_shape:
        return "stacked along an axis other than the first"
    return None


def _explained(module: nn.Module, inputs: Inputs, trace: Callable[[], Any]) -> Any:
    try:
        return trace()
    except (TypeError, ValueError, NameError, errors.FlaxError) as error:
        raise inputs.refused_by(module, error) from error
