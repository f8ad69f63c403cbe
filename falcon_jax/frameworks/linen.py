"""Linen modules: their layers found by watching a call."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import errors, traverse_util
from flax import linen as nn
from flax.core import DenyList, unfreeze
from flax.linen.dtypes import promote_dtype
from jax import lax
from jaxtyping import Array

from falcon_jax.frameworks.layers import (
    Inference,
    Inputs,
    Layer,
    counted,
    spec_or_sizes,
    traced_jaxpr,
)
from falcon_jax.frameworks.tracing import (
    Trace,
    inside_layer,
    mark_kernel,
    mark_output,
    read_trace,
)
from falcon_jax.methods.base import Method, Params
from falcon_jax.nn.compressed import CompressedModule, NamedConv, with_methods
from falcon_jax.ops.geometry import ConvSpec, whole_kernel
from falcon_jax.wording import differences

Variables = Mapping[str, Any]

_LINEAR = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.ConvLocal)

_IMMUTABLE = (
    errors.ModifyScopeVariableError,
    errors.ScopeCollectionNotFound,
    errors.ScopeVariableNotFoundError,
)


def abstract_variables(module: nn.Module, inputs: Inputs) -> Variables:
    """Return the shapes of the variables that a module makes for such inputs.

    Raises:
        ValueError: if the module cannot be called on them.
    """

    def init(arrays: list[Array]) -> Variables:
        def made(*args: Any, rngs: Any = None, **kwargs: Any) -> Variables:
            return module.init(jax.random.key(0), *args, **kwargs)

        return inputs.with_arrays(arrays).call(made)

    variables = _explained(module, inputs, lambda: jax.eval_shape(init, inputs.shapes.arrays))
    for keys in traverse_util.flatten_dict(dict(variables.get("params", {}))):
        slashed = [key for key in keys[:-1] if "/" in str(key)]
        if slashed:
            raise ValueError(
                f"a submodule of {type(module).__name__} is named {slashed[0]!r}; paths are joined "
                "with '/', so a Linen module's name has none. Give it another name, such as "
                f"{slashed[0].replace('/', '_')!r}, and rename its variables alike."
            )
    return variables


def unbound(model: nn.Module) -> tuple[nn.Module, Variables]:
    """Return the module and the variables of a bound one.

    Raises:
        ValueError: if it is not bound.
    """
    if model.scope is None:
        raise ValueError(
            f"{type(model).__name__} is a Linen module without variables; give "
            "module.bind(variables), with all collections, such as 'params' and 'batch_stats'."
        )
    return model.unbind()


def with_shapes(model: nn.Module, inputs: Inputs | None) -> nn.Module:
    """Return a module bound to the shapes of the variables that it makes; a bound one as it is."""
    if model.scope is not None:
        return model
    return model.bind(abstract_variables(model, required(model, inputs)))


def required(model: nn.Module, inputs: Inputs | None) -> Inputs:
    """Return inputs if there are any.

    Raises:
        ValueError: if not: a Linen module does nothing without.
    """
    if inputs is None:
        raise ValueError(
            f"{type(model).__name__} is a Linen module: its layers show themselves only when it "
            "is called. Give sample, an example input; shapes suffice (jax.ShapeDtypeStruct)."
        )
    return inputs


def find_layers(model: nn.Module, inputs: Inputs | None) -> list[Layer]:
    """Return the layers of a module, in the order of use.

    Args:
        model: any Linen module, bound or not; without variables, their shapes are found out.
        inputs: what it is called with.

    Returns:
        Convolutions of every kind, fully connected layers, and under kind ``other`` whatever else
        holds parameters. Modules used in several places appear once.

    Raises:
        ValueError: if there are no inputs, the variables are not the module's, or it cannot be
            called on the inputs.
    """
    inputs = required(model, inputs)
    module, variables = (model, None) if model.scope is None else model.unbind()
    expected = abstract_variables(module, inputs)
    missing = "" if variables is None else _missing(module, expected, variables)
    variables = expected if variables is None else variables
    own: dict[str, dict[str, tuple[int, ...]]] = {}
    for path, leaf in named_params(variables).items():
        owner, _, name = path.rpartition("/")
        own.setdefault(owner, {})[name] = leaf.shape
    watched = _Watch(own)
    try:
        jaxpr = intercepted_jaxpr(module, inputs, variables, watched.intercept)
    except ValueError as error:
        if missing:
            raise ValueError(f"{error} The variables given lack:\n{missing}") from error
        raise
    trace = read_trace(jaxpr.jaxpr, _param_names(variables))
    sizes = {f"{p}/{n}".lstrip("/"): math.prod(s) for p, ns in own.items() for n, s in ns.items()}
    layers = []
    for path, seen in watched.layers.items():
        shapes = own.pop(path, {})
        layers.append(
            dataclasses.replace(
                seen.layer,
                params=_count(shapes),
                stack=_stack(shapes, seen.layer.spec),
                obstacle=seen.layer.obstacle
                or _stacking_obstacle(shapes, seen)
                or _kernel_obstacle(path, seen, trace),
            )
        )
    layers += [
        Layer(path=path, kind="other", params=_count(shapes)) for path, shapes in own.items()
    ]
    return counted(layers, trace, sizes)


def intercepted_jaxpr(
    module: nn.Module, inputs: Inputs, variables: Variables, intercept: Callable[..., Any]
) -> Any:
    """Return the closed jaxpr of a module's call with every method going through an interceptor.

    No collection is mutable, as in evaluation; where the module writes to one, all but parameters
    and batch statistics are, and where it writes to these, all.

    Args:
        module: any Linen module.
        inputs: what it is called with.
        variables: its variables, arrays or shapes.
        intercept: as ``linen.intercept_methods`` takes it.

    Raises:
        ValueError: if the module cannot be called on the inputs.
    """
    check_are_variables(module, variables)

    def trace(mutable: Any) -> Any:
        def forward(variables: Variables, arrays: list[Array]) -> Any:
            def apply(*args: Any, **kwargs: Any) -> Any:
                with nn.intercept_methods(intercept):
                    y = applied(module, variables, *args, mutable=mutable, **kwargs)
                return y if mutable is False else y[0]

            return inputs.with_arrays(arrays).call(apply)

        return traced_jaxpr(forward, variables, inputs.shapes.arrays)

    def attempts() -> Any:
        try:
            return trace(False)
        except _IMMUTABLE:
            try:
                return trace(DenyList(("params", "batch_stats")))
            except errors.ModifyScopeVariableError:
                return trace(True)

    return _explained(module, inputs, attempts)


def applied(module: nn.Module, variables: Variables, *args: Any, **kwargs: Any) -> Any:
    """Return what a module gives; where no keys are given, it draws from one that stays the same.

    Args:
        module: any Linen module.
        variables: its variables.
        *args: as ``apply`` takes them.
        **kwargs: likewise; ``rngs`` too.
    """
    # Linen takes the stream "params" for every other one that is not there.
    options = {"rngs": {"params": jax.random.key(0)}} | kwargs
    return module.apply(variables, *args, **options)  # type: ignore[arg-type]


def check_are_variables(module: nn.Module, variables: Any) -> None:
    """Raise unless something has the form of a Linen module's variables.

    Raises:
        ValueError: saying what was given, and what to give.
    """
    form = "a mapping of collections, {'params': ...} and others such as 'batch_stats'"
    name = type(variables).__name__
    if not isinstance(variables, Mapping):
        advice = ""
        if isinstance(getattr(variables, "params", None), Mapping):
            advice = " From a training state, give {'params': state.params}, and with BatchNorm "
            advice += "'batch_stats', too."
        raise ValueError(
            f"the variables of {type(module).__name__} are {form}; got a {name}.{advice}"
        )
    for keys, leaf in jax.tree_util.tree_leaves_with_path(dict(variables)):
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)):
            where = "/".join(str(getattr(key, "key", key)) for key in keys)
            raise ValueError(
                f"{where} in the variables is a {type(leaf).__name__}; give arrays of JAX or NumPy."
            )


def _missing(module: nn.Module, expected: Variables, variables: Any) -> str:
    """Return which variables beside parameters are missing; raise for others that do not fit."""
    check_are_variables(module, variables)
    wanted, found = _named(expected), _named(variables)
    bare = {name.removeprefix("params/") for name in wanted if name.startswith("params/")}
    if "params" not in variables and bare and bare <= set(_named({"params": variables}, below=1)):
        raise ValueError(
            f"these are the parameters of {type(module).__name__} alone; bind the module to "
            "{'params': params}, and with BatchNorm to 'batch_stats', too."
        )
    checked = {n: a for n, a in wanted.items() if n.split("/", 1)[0] in ("params", "batch_stats")}
    alike = {n: _of_type(a, checked[n]) if n in checked else a for n, a in found.items()}
    unfit = {n for n in checked if n not in found and n.startswith("params/")}
    unfit |= {n for n in checked if n in found and differences({n: checked[n]}, {n: alike[n]})}
    if unfit:
        comparable = {n: a for n, a in alike.items() if n.split("/", 1)[0] in variables}
        params = {n: a for n, a in comparable.items() if n in checked or n.startswith("params/")}
        lines = differences(checked, params)
        name = type(module).__name__
        raise ValueError(
            f"these are not the variables of this {name}, or {name} cannot be called on the "
            f"sample:\n{lines}"
        )
    return differences({n: a for n, a in wanted.items() if n not in found}, {})


def _of_type(array: Any, like: Any) -> Any:
    """Return the shape of an array, of another's type if the two differ in precision only."""
    floats = all(jnp.issubdtype(a.dtype, jnp.floating) for a in (array, like))
    return jax.ShapeDtypeStruct(array.shape, like.dtype if floats else array.dtype)


def _named(variables: Variables, *, below: int = 0) -> dict[str, Any]:
    """Return the variables by ``/``-joined path, from so many levels below the collections on."""
    flat = traverse_util.flatten_dict(dict(nn.meta.unbox(variables)))
    return {"/".join(map(str, keys[below:])): leaf for keys, leaf in flat.items()}


def _param_names(variables: Variables) -> list[str | None]:
    """Return the path of every parameter, None for other variables, as a jaxpr's inputs go."""
    names: list[str | None] = []
    for keys, _ in jax.tree_util.tree_leaves_with_path(variables):
        collection, *path = [key.key for key in keys if isinstance(key, jax.tree_util.DictKey)]
        names.append("/".join(path) if collection == "params" else None)
    return names


def named_params(variables: Variables) -> dict[str, Any]:
    """Return the parameters by ``/``-joined path."""
    params = nn.meta.unbox(variables.get("params", {}))
    return traverse_util.flatten_dict(dict(params), sep="/")


def kernels(model: nn.Module, paths: Iterable[str]) -> dict[str, Any]:
    """Return the kernels of some convolutions by path; none of a module that is not bound."""
    if model.scope is None:
        return {}
    params = named_params(unbound(model)[1])
    found = {path: params[f"{path}/kernel".lstrip("/")] for path in paths}
    return {p: whole_kernel(k) if isinstance(k, jax.Array) else k for p, k in found.items()}


def methods_of(model: nn.Module) -> dict[str, Method]:
    """Return the methods of compressed layers, by path."""
    return {path: method for path, method, _ in getattr(model, "layers", ())}


def replace_convs(
    model: nn.Module, layers: Mapping[str, tuple[Method, ConvSpec, Params]]
) -> nn.Module:
    """Return a bound module whose convolutions are carried out by methods.

    Args:
        model: a bound module.
        layers: method, spec and parameters, by path.
    """
    module, variables = unbound(model)
    flat: Any = traverse_util.flatten_dict(unfreeze(variables["params"]), keep_empty_nodes=True)
    for path, (_, _, params) in layers.items():
        parts = tuple(path.split("/")) if path else ()
        del flat[*parts, "kernel"]
        flat |= {(*parts, name): value for name, value in params.items()}
    new = dict(variables) | {"params": traverse_util.unflatten_dict(flat)}
    small = with_methods(module, {path: (m, spec) for path, (m, spec, _) in layers.items()})
    return small.bind(new)


def with_built_kernels(model: nn.Module) -> nn.Module:
    """Return a bound module with standard convolutions for methods that would build a kernel."""
    module, variables = unbound(model)
    flat: Any = traverse_util.flatten_dict(unfreeze(dict(variables)), keep_empty_nodes=True)
    built = {}
    for path, method, spec in getattr(module, "layers", ()):
        owner = ("params", *path.split("/")) if path else ("params",)
        params = {k[-1]: v for k, v in flat.items() if k[:-1] == owner and k[-1] != "bias"}
        plain = jax.eval_shape(lambda key, m=method, s=spec: m.init(key, s), jax.random.key(0))
        if not method.builds_kernel() or any(params[n].ndim > len(plain[n].shape) for n in plain):
            continue
        for name in params:
            del flat[*owner, name]
        flat[*owner, "kernel"] = method.kernel(params, spec)
        built[path] = None
    if not built:
        return model
    return with_methods(module, built).bind(traverse_util.unflatten_dict(flat))


def arrays(model: nn.Module) -> dict[str, Any]:
    """Return the variables of a bound module by path, the collection first."""
    return _named(unbound(model)[1])


def check_whole(model: nn.Module) -> None:
    """Do nothing: a module is bound to all that it has."""


def arrays_like(model: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """Return the variables of the collections that names speak of, and the parameters."""
    collections = {name.split("/", 1)[0] for name in names} | {"params"}
    return {n: array for n, array in arrays(model).items() if n.split("/", 1)[0] in collections}


def with_arrays(model: nn.Module, named: Mapping[str, Any]) -> nn.Module:
    """Return a module bound to other variables, by path as `arrays` has them."""
    module, _ = unbound(model)
    return module.bind(traverse_util.unflatten_dict(dict(named), sep="/"))


def params(model: nn.Module) -> dict[str, Any]:
    """Return the parameters of a bound module by path."""
    return named_params(unbound(model)[1])


def with_params(model: nn.Module, named: Mapping[str, Any]) -> nn.Module:
    """Return a bound module with some parameters replaced, by path as `params` has them."""
    module, variables = unbound(model)
    flat: Any = traverse_util.flatten_dict(unfreeze(variables["params"]), keep_empty_nodes=True)
    for name, value in named.items():
        keys = tuple(name.split("/"))
        boxed = isinstance(flat[keys], nn.meta.AxisMetadata)
        flat[keys] = flat[keys].replace_boxed(value) if boxed else value
    new = dict(variables) | {"params": traverse_util.unflatten_dict(flat)}
    return module.bind(new)


def weight_names(model: nn.Module) -> list[str]:
    """Return the paths of kernels, and of all parameters of a convolution under a method."""
    compressed = methods_of(model)

    def is_weight(name: str) -> bool:
        owner, _, last = name.rpartition("/")
        return last == "kernel" or (owner in compressed and last != "bias")

    return [name for name in params(model) if is_weight(name)]


def inference(model: nn.Module) -> Inference:
    """Return the call of a bound module as a pure function of its variables."""
    module, variables = unbound(model)

    def call(state: Any, *args: Any, **kwargs: Any) -> tuple[Any, bool]:
        return applied(module, state, *args, **kwargs), False

    return Inference(state=variables, call=call)


def named_inference(model: nn.Module) -> Callable[..., Any]:
    """Return the call of a bound module; operations are in scopes named by module."""
    module, variables = unbound(model)

    def named(
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        with inside_layer("/".join(context.module.path)):
            return next_fun(*args, **kwargs)

    def call(*args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(named):
            return applied(module, variables, *args, **kwargs)

    return call


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Seen:
    layer: Layer
    kernel_shape: tuple[int, ...] | None
    boxed: bool


class _Watch:
    """Notes the layers whose calls it intercepts, and marks their kernels and outputs."""

    def __init__(self, params: Mapping[str, Mapping[str, Any]]):
        self.layers: dict[str, _Seen] = {}
        self._params = params
        self._frames: list[tuple[nn.Module | None, str]] = []
        self._replaced: dict[str, tuple[Method, ConvSpec]] = {}
        self._biased: set[str] = set()

    def intercept(
        self,
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module = context.module
        again = bool(self._frames) and self._frames[-1][0] is module  # as by super().__call__
        if module.scope is None or again:
            return next_fun(*args, **kwargs)
        called = context.method_name == "__call__"
        path = "/".join(module.path)
        if isinstance(module, CompressedModule) and called:
            self._replaced |= module.replaced()
            self._biased |= set(module.folded_convs().values())
        x: Any = args[0] if args else next(iter(kwargs.values()), None)
        layer = self._describe(path, module, x) if called and hasattr(x, "shape") else None
        if layer is not None:
            layer = self._noted(layer, module)
        self._frames.append((None, path) if layer is None else (module, layer.path))
        try:
            if layer is None:
                return next_fun(*args, **kwargs)
            with inside_layer(layer.path):
                if layer.kind == "conv" and layer.method is None:
                    kernel: Any = nn.meta.unbox(module.get_variable("params", "kernel"))
                    mark_kernel(layer.path, kernel, f"{path}/kernel".lstrip("/"))
                y = next_fun(*args, **kwargs)
            return mark_output(layer.path, y, x.shape) if hasattr(y, "shape") else y
        finally:
            self._frames.pop()

    def _noted(self, layer: Layer, module: nn.Module) -> Layer:
        """Note a layer, under a name of its own if its path is not that of its parameters."""
        kernel = module.get_variable("params", "kernel")
        seen = _Seen(
            layer=layer,
            kernel_shape=None if kernel is None else nn.meta.unbox(kernel).shape,
            boxed=isinstance(kernel, nn.meta.AxisMetadata),
        )
        if layer.method is None and "kernel" not in self._params.get(layer.path, {}):
            # Applied as a function: its path starts anew.
            outer = self._frames[-1][1] if self._frames else ""
            name = f"{outer}/{type(module).__name__}".lstrip("/")
            taken = (f"{name}_{index}" if index else name for index in itertools.count())
            path = next(p for p in taken if self._is_new(dataclasses.replace(layer, path=p)))
            seen = dataclasses.replace(seen, layer=dataclasses.replace(layer, path=path))
        elif not self._is_new(layer):
            old = self.layers[layer.path]
            clash = dataclasses.replace(old.layer, obstacle="two layers have this path")
            self.layers[layer.path] = dataclasses.replace(old, layer=clash)
        return self.layers.setdefault(seen.layer.path, seen).layer

    def _is_new(self, layer: Layer) -> bool:
        old = self.layers.get(layer.path)
        return old is None or (old.layer.kind, old.layer.spec) == (layer.kind, layer.spec)

    def _describe(self, path: str, module: nn.Module, x: Any) -> Layer | None:
        if path in self._replaced:
            method, spec = self._replaced[path]
            return _compressed(path, method, spec)
        if isinstance(module, NamedConv):
            spec = module.spec(x.shape[-1])
            return _compressed(path, module.method().for_layer(spec), spec)
        if isinstance(module, nn.Conv):
            spec, reason = spec_or_sizes(
                lambda: conv_spec(module, x.shape[-1]),
                kernel_size=module.kernel_size,
                in_features=x.shape[-1],
                out_features=module.features,
                feature_group_count=module.feature_group_count,
                use_bias=bool(module.use_bias),
            )
            if path in self._biased:
                spec = dataclasses.replace(spec, use_bias=True)
            return Layer(
                path=path,
                kind="conv",
                params=0,
                spec=spec,
                obstacle=_conv_obstacle(module) or reason,
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
        if type(module) is nn.Dense:
            shape = (x.shape[-1], module.features, module.use_bias)
            return Layer(path=path, kind="linear", params=0, linear_shape=shape)
        if isinstance(module, _LINEAR):
            return Layer(path=path, kind="linear", params=0, adds_bias=bool(module.use_bias))
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
        use_bias=bool(conv.use_bias),
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


def _kernel_obstacle(path: str, seen: _Seen, trace: Trace) -> str | None:
    if seen.layer.kind != "conv" or seen.layer.method is not None:
        return None
    obstacle = trace.kernels.get(path, "kernel computed in the call")
    if not obstacle and f"{path}/kernel".lstrip("/") in trace.used_outside:
        return "kernel used elsewhere in the call, too"
    return obstacle or None


def _explained(module: nn.Module, inputs: Inputs, trace: Callable[[], Any]) -> Any:
    try:
        return trace()
    except (TypeError, ValueError, NameError, errors.FlaxError) as error:
        raise inputs.refused_by(module, error) from error
