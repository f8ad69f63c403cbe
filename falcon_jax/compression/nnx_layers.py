"""Layers of NNX models: found, and traced."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from falcon_jax.compression.inputs import Inputs
from falcon_jax.compression.layers import Layer, counted, spec_or_sizes, traced_jaxpr
from falcon_jax.compression.nnx_tree import (
    arrays,
    held_variables,
    in_evaluation,
    is_leaf,
    map_modules,
    named_modules,
    named_variables,
    with_arrays,
)
from falcon_jax.compression.tracing import Trace, inside_layer, mark_kernel, mark_output, read_trace
from falcon_jax.methods import ConvSpec
from falcon_jax.nn.method_conv import MethodConv
from falcon_jax.nn.trained import conv_obstacle, conv_spec

_GENERAL = (nnx.LinearGeneral, nnx.Einsum)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModuleCall:
    """A module's call but for its first argument; called with that, it gives the output.

    Attributes:
        module: in a copy of the model.
        cls: its class in the model.
        args: further positional arguments.
        kwargs: further keyword arguments.
    """

    module: Any
    cls: type[nnx.Module]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, x: Any) -> Any:
        """Return the output for an input."""
        return self.cls.__call__(self.module, x, *self.args, **self.kwargs)  # type: ignore[operator]


def find_layers(model: nnx.Module, inputs: Inputs | None = None) -> list[Layer]:
    """Return the layers of a model, in the order of use if traced, else of definition.

    Args:
        model: any NNX model; it is not changed.
        inputs: what it is called with, or None: then the layers have no calls.

    Returns:
        Convolutions of every kind, fully connected layers, and under kind ``other`` the modules
        that hold further parameters. Modules used in several places appear once.
    """
    modules = list(named_modules(model))
    normalised = {
        id(child)
        for _, module in modules
        if isinstance(module, (nnx.WeightNorm, nnx.SpectralNorm))
        for _, child in named_modules(module)
    }
    holders: dict[int, list[str]] = {}
    for path, module in modules:
        for variable in held_variables(module):
            holders.setdefault(id(variable), []).append(path)
    layers = []
    for path, module in modules:
        layer = _describe(path, module)
        if layer is None:
            continue
        if type(module) is nnx.Conv and layer.obstacle is None:
            others = [p for p in holders.get(id(module.kernel), ()) if p != path]
            if id(module) in normalised:
                layer = dataclasses.replace(layer, obstacle="kernel normalised anew in every call")
            elif others:
                shared = f"kernel shared with {others[0] or 'the model itself'!r}"
                layer = dataclasses.replace(layer, obstacle=shared)
        layers.append(layer)
    if inputs is None:
        return layers
    trace = _trace(model, inputs)
    layers = [
        dataclasses.replace(layer, obstacle=layer.obstacle or trace.kernels.get(layer.path) or None)
        for layer in layers
    ]
    order = {path: index for index, path in enumerate(trace.calls)}
    layers.sort(key=lambda layer: order.get(layer.path, len(order)))
    sizes = {
        path: math.prod(variable.shape)
        for path, variable in named_variables(model)
        if isinstance(variable, nnx.Param)
    }
    return counted(layers, trace, sizes)


def kernels(model: nnx.Module) -> dict[str, Any]:
    """Return the kernels of the convolutions, or their shapes, by path."""
    return {
        path: module.kernel.get_value()
        for path, module in named_modules(model)
        if isinstance(module, nnx.Conv) and not isinstance(module, MethodConv)
    }


def _describe(path: str, module: nnx.Module) -> Layer | None:
    params = sum(
        math.prod(leaf.shape)
        for leaf in jax.tree.leaves(nnx.state(module, nnx.Param))
        if hasattr(leaf, "shape")
    )
    if isinstance(module, MethodConv):
        return Layer(
            path=path,
            kind="conv",
            params=params,
            spec=module.spec,
            obstacle=f"compressed already by {module.method}",
            method=module.method,
        )
    if isinstance(module, nnx.Conv):
        spec, reason = spec_or_sizes(
            lambda: conv_spec(module),
            kernel_size=module.kernel_size,
            in_features=module.in_features,
            out_features=module.out_features,
            feature_group_count=module.feature_group_count,
            use_bias=module.bias is not None,
        )
        obstacle = conv_obstacle(module) or reason
        if type(module) is not nnx.Conv:
            obstacle = f"{type(module).__name__} is a subclass of nnx.Conv and may act otherwise"
        shape = module.kernel.shape
        stack = shape[: len(shape) - len(spec.kernel_shape)]
        if shape[len(stack) :] != spec.kernel_shape:
            obstacle = obstacle or "stacked along an axis other than the first"
        return Layer(
            path=path, kind="conv", params=params, spec=spec, obstacle=obstacle, stack=stack
        )
    if isinstance(module, nnx.ConvTranspose):
        spec = ConvSpec(
            kernel_size=module.kernel_size,
            in_features=module.in_features,
            out_features=module.out_features,
            use_bias=module.bias is not None,
        )
        return Layer(
            path=path,
            kind="conv_transpose",
            params=params,
            spec=spec,
            obstacle="transposed convolution",
        )
    if isinstance(module, nnx.Linear):
        shape = (module.in_features, module.out_features, module.bias is not None)
        return Layer(path=path, kind="linear", params=params, linear_shape=shape)
    if isinstance(module, _GENERAL):
        return Layer(path=path, kind="linear", params=params, adds_bias=module.bias is not None)
    own = sum(math.prod(v.shape) for v in held_variables(module) if isinstance(v, nnx.Param))
    return Layer(path=path, kind="other", params=own) if own else None


def _trace(model: nnx.Module, inputs: Inputs) -> Trace:
    def marked(path: str, layer: ModuleCall, x: Any) -> Any:
        if isinstance(layer.module, nnx.Conv) and not isinstance(layer.module, MethodConv):
            mark_kernel(path, layer.module.kernel[...], f"{path}/kernel".lstrip("/"))
        with inside_layer(path):
            y = layer(x)
        return mark_output(path, y, x.shape)

    jaxpr = jaxpr_through(
        model, inputs, lambda module: is_leaf(module) or isinstance(module, _GENERAL), marked
    )
    return read_trace(jaxpr, _param_names(model))


def _param_names(model: nnx.Module) -> list[str | None]:
    """Return the path of every parameter, None for other arrays, as a jaxpr's inputs go."""
    params = {path for path, v in named_variables(model) if isinstance(v, nnx.Param)}
    return [path if path in params else None for path in sorted(arrays(model))]


def jaxpr_through(
    model: nnx.Module,
    inputs: Inputs,
    chosen: Callable[[nnx.Module], bool],
    around: Callable[[str, ModuleCall, Any], Any],
) -> Any:
    """Return the jaxpr of a model's call in evaluation mode, with a function around some modules.

    Args:
        model: it is not changed.
        inputs: what it is called with.
        chosen: says whether ``around`` goes around a module.
        around: gets path, the module's call and its input; returns its output.

    Raises:
        ValueError: if the model cannot be called on the inputs.
    """
    wrapped = with_calls_wrapped(model, chosen, around)

    def forward(named: dict[str, Array], given: list[Array]) -> Any:
        called = with_arrays(wrapped, named)
        y = inputs.with_arrays(given).call(called)  # type: ignore[arg-type]
        others = [v for v in named_variables(called) if not isinstance(v[1], nnx.Param)]
        # What the model keeps for later is used, too.
        kept = [v.get_value() for path, v in others if v.get_value() is not named.get(path)]
        return y, kept

    try:
        return traced_jaxpr(forward, arrays(wrapped), inputs.shapes.arrays)
    except (TypeError, ValueError) as error:
        raise inputs.refused_by(model, error) from error


def with_calls_wrapped(
    model: nnx.Module,
    chosen: Callable[[nnx.Module], bool],
    around: Callable[[str, ModuleCall, Any], Any],
) -> nnx.Module:
    """Return a copy of a model in evaluation mode with a function around some modules.

    Args:
        model: it is not changed.
        chosen: says whether ``around`` goes around a module.
        around: gets path, the module's call and its input; returns its output.
    """

    def replace_call(path: str, module: nnx.Module) -> None:
        if chosen(module):
            module.__class__ = _wrapped(type(module), functools.partial(around, path))

    return in_evaluation(map_modules(replace_call, model))


def _wrapped(cls: type[nnx.Module], around: Callable[..., Any]) -> Any:
    """Return a subclass with a function around its call; only a copy's modules get it."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args:
            x, args = args[0], args[1:]
        else:
            x = kwargs.pop(next(name for name in ("inputs", "x", *kwargs) if name in kwargs))
        return around(ModuleCall(module=self, cls=cls, args=args, kwargs=kwargs), x)

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})
