"""What can be asked of NNX models: arrays, layers, kernels, parameters, calls."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array

from falcon_jax.frameworks.layers import (
    Inference,
    Inputs,
    Layer,
    counted,
    spec_or_sizes,
    traced_jaxpr,
)
from falcon_jax.frameworks.nnx_tree import (
    check_seen,
    clone,
    held_variables,
    in_evaluation,
    is_leaf,
    map_arrays,
    map_modules,
    named_modules,
    named_variables,
)
from falcon_jax.frameworks.tracing import Trace, inside_layer, mark_kernel, mark_output, read_trace
from falcon_jax.methods.base import Method, Params
from falcon_jax.nn.layers import DepthwiseConv
from falcon_jax.nn.method_conv import (
    MethodConv,
    conv_like,
    conv_obstacle,
    conv_spec,
    standard_conv,
)
from falcon_jax.ops.geometry import ConvSpec, whole_kernel

_GENERAL = (nnx.LinearGeneral, nnx.Einsum)
_KERNELS = (nnx.Conv, nnx.ConvTranspose, nnx.Linear, DepthwiseConv, *_GENERAL)


def arrays(model: nnx.Module) -> dict[str, Any]:
    """Return the arrays by path, all but random keys and the counts of their streams.

    Raises:
        ValueError: if two have one path, or the model has some that cannot be seen.
    """
    check_seen(model)
    named: dict[str, Any] = {}

    def note(path: str, value: Any) -> Any:
        if path in named:
            raise ValueError(
                f"two arrays of the model are at {path!r}; rename one, so that each has a path."
            )
        named[path] = value
        return value

    map_arrays(note, model)
    return named


def with_arrays(model: nnx.Module, named: Mapping[str, Any]) -> nnx.Module:
    """Return a copy of a model with other arrays, by path as `arrays` has them."""
    new = clone(model)

    def replaced(path: str, value: Any) -> Any:
        array = named[path]
        traced = isinstance(array, Tracer)
        return np.asarray(array) if isinstance(value, np.ndarray) and not traced else array

    map_arrays(replaced, new)
    return new


def check_whole(model: nnx.Module) -> None:
    """Raise if a model was made of shapes and has random streams, whose state is not saved.

    Raises:
        ValueError: naming the first.
    """
    for path, variable in named_variables(model):
        if isinstance(variable.get_raw_value(), jax.ShapeDtypeStruct):
            raise ValueError(
                f"build_model makes shapes in place of arrays, and the model's random stream at "
                f"{path!r} is not in the directory; let build_model make the model itself, not "
                "nnx.eval_shape of it."
            )


def arrays_like(model: nnx.Module, names: Iterable[str]) -> dict[str, Any]:
    """Return the arrays by path; whatever a saved model has, it has to have them all."""
    return arrays(model)


def with_shapes(model: nnx.Module, inputs: Inputs | None) -> nnx.Module:
    """Return the model, which has its arrays or their shapes."""
    return model


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
        that hold further parameters. Modules used in several places appear once; parameters of
        several modules count where they are first.
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
    counted_already: set[int] = set()
    for path, module in modules:
        params = 0
        for variable in held_variables(module):
            if isinstance(variable, nnx.Param) and id(variable) not in counted_already:
                counted_already.add(id(variable))
                params += math.prod(variable.shape)
        layer = _describe(path, module, params)
        if layer is None:
            continue
        if type(module) is nnx.Conv and layer.obstacle is None:
            if id(module) in normalised:
                layer = dataclasses.replace(layer, obstacle="kernel normalised anew in every call")
            for name, variable in (("kernel", module.kernel), ("bias", module.bias)):
                others = [p for p in holders.get(id(variable), ()) if p != path]
                if others and layer.obstacle is None:
                    shared = f"{name} shared with {others[0] or 'the model itself'!r}"
                    layer = dataclasses.replace(layer, obstacle=shared)
        layers.append(layer)
    if inputs is None:
        return layers
    trace = _trace(model, inputs)
    layers = [
        dataclasses.replace(layer, obstacle=layer.obstacle or _traced_obstacle(layer, trace))
        for layer in layers
    ]
    order = {path: index for index, path in enumerate(trace.calls)}
    layers.sort(key=lambda layer: order.get(layer.path, len(order)))
    names = _names_by_holder(model)
    sizes = {
        names[path]: math.prod(variable.shape)
        for path, variable in named_variables(model)
        if isinstance(variable, nnx.Param)
    }
    return counted(layers, trace, sizes)


def _traced_obstacle(layer: Layer, trace: Trace) -> str | None:
    if obstacle := trace.kernels.get(layer.path):
        return obstacle
    if layer.kind == "conv" and f"{layer.path}/kernel".lstrip("/") in trace.used_outside:
        return "kernel used elsewhere in the call, too"
    return None


def kernels(model: nnx.Module, paths: Iterable[str]) -> dict[str, Any]:
    """Return the kernels of some convolutions, or their shapes, by path."""
    modules: dict[str, Any] = dict(named_modules(model))
    found = {path: modules[path].kernel.get_value() for path in paths}
    return {p: whole_kernel(k) if isinstance(k, jax.Array) else k for p, k in found.items()}


def methods_of(model: nnx.Module) -> dict[str, Method]:
    """Return the methods of compressed layers, by path."""
    return {p: m.method for p, m in named_modules(model) if isinstance(m, MethodConv)}


def replace_convs(
    model: nnx.Module, layers: Mapping[str, tuple[Method, ConvSpec, Params]]
) -> nnx.Module:
    """Return a copy of a model whose convolutions are carried out by methods.

    Args:
        model: it is not changed.
        layers: method, spec and parameters, by path.
    """

    def replacement(path: str, module: nnx.Module) -> nnx.Module | None:
        if path not in layers:
            return None
        method, _, params = layers[path]
        assert isinstance(module, nnx.Conv)
        return conv_like(module, method, params)

    return map_modules(replacement, model)


def with_built_kernels(model: nnx.Module) -> nnx.Module:
    """Return a copy with standard convolutions for methods that would build a kernel."""

    def built(path: str, module: nnx.Module) -> nnx.Module | None:
        if not isinstance(module, MethodConv) or not module.method.builds_kernel():
            return None
        return standard_conv(module)

    return map_modules(built, model)


def params(model: nnx.Module) -> dict[str, Any]:
    """Return the parameters by path."""
    return {p: v.get_value() for p, v in named_variables(model) if isinstance(v, nnx.Param)}


def with_params(model: nnx.Module, named: Mapping[str, Any]) -> nnx.Module:
    """Return a copy of a model with some parameters replaced, by path as `params` has them."""
    new = clone(model)
    for path, variable in named_variables(new):
        if path in named:
            variable.set_value(named[path])
    return new


def weight_names(model: nnx.Module) -> list[str]:
    """Return the paths of kernels, and of all parameters of a convolution under a method."""
    names: set[str] = set()
    for path, module in named_modules(model):
        if isinstance(module, MethodConv):
            names |= {f"{path}/{name}".lstrip("/") for name in module.param_names}
        elif isinstance(module, _KERNELS):
            names.add(f"{path}/kernel".lstrip("/"))
    return [path for path, _ in named_variables(model) if path in names]


def inference(model: nnx.Module) -> Inference:
    """Return the call of a model in evaluation mode as a pure function of its arrays."""
    copied = in_evaluation(model)

    def call(state: Any, *args: Any, **kwargs: Any) -> tuple[Any, bool]:
        # What the call writes, it writes to the variables of a clone, in partials and all.
        cloned = with_arrays(copied, state)
        before = [v.get_raw_value() for _, v in named_variables(cloned)]
        y = cloned(*args, **kwargs)  # type: ignore[operator]
        after = [v.get_raw_value() for _, v in named_variables(cloned)]
        return y, len(before) != len(after) or any(map(operator.is_not, before, after))

    return Inference(state=arrays(copied), call=call)


def named_inference(model: nnx.Module) -> Callable[..., Any]:
    """Return the call of a model in evaluation mode; operations are in scopes named by module."""

    def scope(path: str, module: nnx.Module) -> None:
        cls = type(module)
        if callable(module):

            def call(self: Any, *args: Any, **kwargs: Any) -> Any:
                with inside_layer(path):
                    return cls.__call__(self, *args, **kwargs)  # type: ignore[operator]

            made = {"__call__": call, "__module__": cls.__module__}
            module.__class__ = type(cls.__name__, (cls,), made)  # of a copy

    found = inference(map_modules(scope, model))
    return lambda *args, **kwargs: found.call(found.state, *args, **kwargs)[0]


def _describe(path: str, module: nnx.Module, params: int) -> Layer | None:
    if isinstance(module, MethodConv):
        return Layer(
            path=path,
            kind="conv",
            params=params,
            spec=dataclasses.replace(module.spec, use_bias=module.bias is not None),
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
    if isinstance(module, DepthwiseConv):
        spec = dataclasses.replace(module.spec, use_bias=module.bias is not None)
        obstacle = f"{type(module).__name__} is a depthwise convolution already"
        return Layer(path=path, kind="conv", params=params, spec=spec, obstacle=obstacle)
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
    return Layer(path=path, kind="other", params=params) if params else None


def _trace(model: nnx.Module, inputs: Inputs) -> Trace:
    def marked(path: str, layer: ModuleCall, x: Any) -> Any:
        if isinstance(layer.module, nnx.Conv) and not isinstance(layer.module, MethodConv):
            with inside_layer(path):
                mark_kernel(path, layer.module.kernel[...], f"{path}/kernel".lstrip("/"))
        with inside_layer(path):
            y = layer(x)
        return mark_output(path, y, x.shape)

    jaxpr = jaxpr_through(
        model, inputs, lambda module: is_leaf(module) or isinstance(module, _GENERAL), marked
    )
    return read_trace(jaxpr.jaxpr, _param_names(model))


def _param_names(model: nnx.Module) -> list[str | None]:
    """Return the name of every parameter, None for other arrays, as a jaxpr's inputs go."""
    names = _names_by_holder(model)
    return [names.get(path) for path in sorted(arrays(model))]


def _names_by_holder(model: nnx.Module) -> dict[str, str]:
    """Return by path the parameters' names: the path of the module that holds one, and the rest.

    Parameters in a container belong to the module that has the container.
    """
    paths = {id(v): path for path, v in named_variables(model) if isinstance(v, nnx.Param)}
    names = {path: path for path in paths.values()}
    for holder, module in named_modules(model):
        for variable in held_variables(module):
            path = paths.get(id(variable))
            if path is not None and path.startswith(f"{holder}/" if holder else ""):
                rest = path.removeprefix(f"{holder}/" if holder else "").replace("/", ".")
                names[path] = f"{holder}/{rest}".lstrip("/")
    return names


def jaxpr_through(
    model: nnx.Module,
    inputs: Inputs,
    chosen: Callable[[nnx.Module], bool],
    around: Callable[[str, ModuleCall, Any], Any],
) -> Any:
    """Return the jaxpr of a call in evaluation mode, closed, with a function around some modules.

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
