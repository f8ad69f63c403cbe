"""Layers of NNX models: found, traced and replaced."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from falcon_jax.compression.inputs import Inputs
from falcon_jax.compression.layers import Call, Layer, calls_in, mark_output, traced_jaxpr
from falcon_jax.methods import ConvSpec
from falcon_jax.nn.method_conv import MethodConv
from falcon_jax.nn.trained import conv_obstacle, conv_spec

_WALKED = (nnx.Module, nnx.Variable, dict, list, tuple, functools.partial)

Visit = Callable[[str, nnx.Module], nnx.Module | None]


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
    layers = []
    for path, module in modules:
        layer = _describe(path, module)
        if layer is not None and layer.kind == "conv" and id(module) in normalised:
            layer = dataclasses.replace(layer, obstacle="kernel normalised anew in every call")
        if layer is not None:
            layers.append(layer)
    if inputs is None:
        return layers
    calls = _trace(model, inputs)
    order = {path: index for index, path in enumerate(calls)}
    layers.sort(key=lambda layer: order.get(layer.path, len(order)))
    return [dataclasses.replace(layer, calls=calls.get(layer.path, ())) for layer in layers]


def named_modules(model: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    """Yield every module with its path, once, parents first; inside tuples and partials, too."""
    seen: set[int] = set()

    def walk(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, nnx.Module]]:
        if isinstance(value, nnx.Module):
            if id(value) in seen:
                return
            seen.add(id(value))
            yield "/".join(path), value
            if _is_leaf(value):
                return
        for name, child in _children(value):
            yield from walk(child, (*path, name))

    yield from walk(model, ())


def named_variables(model: nnx.Module) -> Iterator[tuple[str, nnx.Variable]]:
    """Yield every variable with its path, once; inside tuples and partials, too."""
    seen: set[int] = set()

    def walk(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, nnx.Variable]]:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, nnx.Variable):
            yield "/".join(path), value
        for name, child in _children(value):
            yield from walk(child, (*path, name))

    yield from walk(model, ())


def weights(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Return the variables by path, all but the states of random number generators."""
    return {n: v for n, v in named_variables(model) if not isinstance(v, nnx.RngState)}


def kernels(model: nnx.Module) -> dict[str, Any]:
    """Return the kernels of the convolutions, or their shapes, by path."""
    return {
        path: module.kernel.get_value()
        for path, module in named_modules(model)
        if isinstance(module, nnx.Conv)
    }


def map_modules(visit: Visit, model: nnx.Module) -> nnx.Module:
    """Return a copy of a model in which some modules are replaced.

    Args:
        visit: gets path and module (of the copy); returns what replaces it, or None.
        model: it is not changed. Arrays are shared with the copy, variables are not.

    Returns:
        The copy. A module used in several places is replaced by one module.
    """
    done: dict[int, nnx.Module] = {}

    def walk(value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, nnx.Module):
            if id(value) not in done:
                new = visit("/".join(path), value)
                done[id(value)] = value if new is None else new
                if new is None and not _is_leaf(value):
                    for name, child in list(_children(value)):
                        replaced = walk(child, (*path, name))
                        if replaced is not child:
                            setattr(value, name, replaced)
            return done[id(value)]
        if not _holds_module(value):
            return value
        if isinstance(value, functools.partial):
            # NNX does not look into partials, so a clone of the model shares what they hold.
            value = _clone_partial(value)
        children = {name: walk(child, (*path, name)) for name, child in _children(value)}
        return _rebuild(value, children)

    return walk(nnx.clone(model), ())


def _holds_module(value: Any) -> bool:
    return isinstance(value, nnx.Module) or any(_holds_module(c) for _, c in _children(value))


def _is_leaf(module: nnx.Module) -> bool:
    return isinstance(module, (nnx.Conv, nnx.ConvTranspose, nnx.Linear, MethodConv))


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, nnx.Module):
        items = ((k, v) for k, v in vars(value).items() if not k.startswith("_pytree__"))
    elif isinstance(value, dict):
        items = ((str(k), v) for k, v in value.items())
    elif isinstance(value, (list, tuple)):
        items = ((str(i), v) for i, v in enumerate(value))
    elif isinstance(value, functools.partial):
        items = [("func", value.func), ("args", value.args), ("keywords", value.keywords)]
    else:
        return
    for name, child in items:
        if isinstance(child, _WALKED):
            yield name, child


def _clone_partial(value: functools.partial) -> functools.partial:
    parts = (value.func, value.args, value.keywords)
    func, args, keywords = jax.tree.map(
        lambda part: nnx.clone(part) if isinstance(part, nnx.Module) else part,
        parts,
        is_leaf=lambda part: isinstance(part, nnx.Module),
    )
    return functools.partial(func, *args, **keywords)


def _rebuild(value: Any, children: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        return type(value)({k: children.get(str(k), v) for k, v in value.items()})
    if isinstance(value, functools.partial):
        return functools.partial(
            children.get("func", value.func),
            *children.get("args", value.args),
            **children.get("keywords", value.keywords),
        )
    items = [children.get(str(i), v) for i, v in enumerate(value)]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


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
        spec = conv_spec(module)
        obstacle = conv_obstacle(module)
        if type(module) is not nnx.Conv:
            obstacle = f"{type(module).__name__} is a subclass of nnx.Conv and may act otherwise"
        stack = module.kernel.shape[: len(module.kernel.shape) - len(spec.kernel_shape)]
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
    own = sum(math.prod(v.shape) for v in vars(module).values() if isinstance(v, nnx.Param))
    return Layer(path=path, kind="other", params=own) if own else None


def _trace(model: nnx.Module, inputs: Inputs) -> dict[str, tuple[Call, ...]]:
    def marked(path: str, layer: Callable[[Any], Any], x: Any) -> Any:
        return mark_output(path, layer(x), x.shape)

    return calls_in(jaxpr_through(model, inputs, _is_leaf, marked))


def jaxpr_through(
    model: nnx.Module,
    inputs: Inputs,
    chosen: Callable[[nnx.Module], bool],
    around: Callable[[str, Callable[[Any], Any], Any], Any],
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

    def replace_call(path: str, module: nnx.Module) -> None:
        if chosen(module):
            module.__class__ = _wrapped(type(module), functools.partial(around, path))

    copy = map_modules(replace_call, model)
    copy.eval()
    graphdef, state = nnx.split(copy)

    def forward(state: nnx.State, arrays: list[Array]) -> Any:
        return inputs.with_arrays(arrays).call(nnx.merge(graphdef, state))  # type: ignore[arg-type]

    try:
        return traced_jaxpr(forward, state, inputs.shapes.arrays)
    except (TypeError, ValueError) as error:
        raise inputs.refused_by(model, error) from error


def _wrapped(cls: type[nnx.Module], around: Callable[..., Any]) -> Any:
    """Return a subclass with a function around its call; only the traced copy gets it."""

    def call(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        return around(lambda x: cls.__call__(self, x, *args, **kwargs), x)  # type: ignore[operator]

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})
