"""What a traced call of a model shows: calls of layers, products, and uses of parameters."""

import collections
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from falcon_jax.ops.geometry import whole_kernel
from falcon_jax.ops.linear import JVP_CALL, PRODUCTS

_CALL, _KERNEL, _INSIDE = "falcon_jax layer ", "falcon_jax kernel ", "falcon_jax inside "
_INPUT, _ANSWER, _FLAT = "falcon_jax input ", "falcon_jax answer ", "falcon_jax flat "

# Primitives that only call another jaxpr, and the parameter that holds it.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}
# Primitives after which a parameter is still itself.
_SAME = (
    *("copy", "copy_p", "name", "optimization_barrier", "reshard"),
    *("sharding_constraint", "stop_gradient"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """One use of a layer: shapes of input and output, and how often in a forward pass."""

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    times: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """What a forward pass does.

    Attributes:
        calls: of every layer that `mark_output`, by path in the order of first use.
        inside: multiply-adds of convolutions and matrix products with parameters inside a layer.
        outside: all those outside of layers, by path of the parameters' holder; under ``None``
            those that no parameter takes part in.
        used: parameters that something is computed from.
        used_outside: parameters that something outside of layers uses as they are.
        kernels: for layers that `mark_kernel`, why the kernel that one uses is not the variable
            that it should be; empty if it is that one, in every call.
    """

    calls: Mapping[str, tuple[Call, ...]]
    inside: Mapping[str, int]
    outside: Mapping[str | None, int]
    used: frozenset[str]
    used_outside: frozenset[str]
    kernels: Mapping[str, str]


def inside_layer(path: str) -> Any:
    """Return the context for a layer's computation; its products are then known as the layer's."""
    return jax.named_scope(_INSIDE + path)


def mark_output(path: str, y: Array, input_shape: tuple[int, ...]) -> Array:
    """Return the output of a layer under a name that tells of this call in a jaxpr.

    Args:
        path: of the layer.
        y: its output; it depends on the layer's parameters, so vmapped layers have mapped outputs.
        input_shape: of the layer's input.
    """
    return checkpoint_name(y, _CALL + json.dumps([path, input_shape, y.shape]))


def mark_kernel(path: str, kernel: Array, variable: str) -> None:
    """Note in a jaxpr which kernel a layer uses in this call.

    Args:
        path: of the layer.
        kernel: the array that it uses.
        variable: path of the variable that this should be.
    """
    # A reshape takes mapped axes to the front, so that they can be told from the kernel's.
    flat = lax.reshape(whole_kernel(kernel), (kernel.size,))
    checkpoint_name(flat, _KERNEL + json.dumps([path, variable, kernel.ndim]))


def mark_input(path: str, x: Array) -> None:
    """Note in a jaxpr what a layer gets in this call."""
    checkpoint_name(lax.reshape(x, (x.size,)), _INPUT + json.dumps([path, x.shape]))


def mark_answer(path: str, y: Array) -> Array:
    """Return what a layer gives in this call, noted in a jaxpr; what follows uses this array."""
    y = checkpoint_name(y, _ANSWER + json.dumps([path, y.shape]))
    checkpoint_name(lax.reshape(y, (y.size,)), _FLAT + json.dumps([path, y.shape]))
    return y


MarkKind = Literal["kernel", "input", "answer", "flat"]


def read_mark(eqn: Any) -> tuple[MarkKind, str, tuple[int, ...]] | None:
    """Return kind, path and shape of a layer's mark; None of other equations.

    The marked array has its mapped axes in front, and then one; an ``answer`` is as the layer
    gave it. Of a kernel, the shape is its number of axes.
    """
    name = str(eqn.params.get("name", ""))
    if name.startswith(_KERNEL):
        path, _, axes = json.loads(name.removeprefix(_KERNEL))
        return "kernel", path, (axes,)
    kinds: dict[str, MarkKind] = {_INPUT: "input", _ANSWER: "answer", _FLAT: "flat"}
    for prefix, kind in kinds.items():
        if name.startswith(prefix):
            path, shape = json.loads(name.removeprefix(prefix))
            return kind, path, tuple(shape)
    return None


def read_trace(jaxpr: Any, names: Sequence[str | None]) -> Trace:
    """Return what a jaxpr tells of the layers and parameters.

    Args:
        jaxpr: of a forward pass.
        names: of its first inputs, the variables: the path of a parameter; None for all others.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    values: list[_Value | None] = [None] * len(jaxpr.invars)
    for index, name in enumerate(names):
        if name is not None:
            shapes[name] = jaxpr.invars[index].aval.shape
            values[index] = _Value(frozenset([name]), tuple(range(len(shapes[name]))))
    reader = _Reader(shapes)
    for value in reader.read(jaxpr, values, 1, None):
        if value is not None and value.axes is not None:
            reader.used_outside |= value.params
    return Trace(
        calls={path: tuple(found) for path, found in reader.calls.items()},
        inside=reader.inside,
        outside=reader.outside,
        used=frozenset(reader.used),
        used_outside=frozenset(reader.used_outside),
        kernels=reader.kernels,
    )


def bind(primitive: Any, params: Mapping[str, Any], inputs: Sequence[Any]) -> list[Any]:
    """Return the outputs of an equation's primitive for other inputs."""
    given = primitive.get_bind_params(dict(params))
    functions, given = given if isinstance(given, tuple) else ((), given)  # JAX before 0.10
    outputs = primitive.bind(*functions, *inputs, **given)
    return list(outputs) if primitive.multiple_results else [outputs]


def scan_parts(inputs: Sequence[Any], outputs: Sequence[Any], body: Any) -> tuple[int, int]:
    """Return how many inputs of a scan all of its steps share, and how many it carries.

    The rest have one axis less inside. The parameters that say so differ between versions of JAX.

    Args:
        inputs: of the scan: variables, or what else has a shape.
        outputs: of the scan.
        body: the jaxpr of one step.
    """

    def as_inside(outer: Sequence[Any], inner: Sequence[Any]) -> int:
        ranks = [[len(getattr(v, "aval", v).shape) for v in vs] for vs in (outer, inner)]
        return sum(a == b for a, b in zip(*ranks, strict=True))

    carried = as_inside(outputs, body.outvars)
    return as_inside(inputs, body.invars) - carried, carried


def inner_jaxprs(value: Any) -> list[Any]:
    """Return the jaxprs in the parameters of an equation."""
    if isinstance(value, (tuple, list)):
        return [jaxpr for item in value for jaxpr in inner_jaxprs(item)]
    if hasattr(value, "eqns"):
        return [value]
    return [value.jaxpr] if hasattr(value, "jaxpr") else []


def mult_adds_of(eqn: Any) -> int:
    """Return the multiply-adds of an equation that is a convolution or matrix product; else 0."""
    shapes = [variable.aval.shape for variable in eqn.invars]
    if eqn.primitive.name == "conv_general_dilated":
        features = shapes[1][eqn.params["dimension_numbers"].rhs_spec[0]]
        taken = math.prod(shapes[1]) // max(features, 1)
    elif eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        taken = math.prod(shapes[0][axis] for axis in contracted)
    elif eqn.primitive.name == JVP_CALL and PRODUCTS in _scopes(eqn):
        mapped = sum(of_kernel for _, of_kernel in eqn.params["levels"])
        taken = math.prod(shapes[1][mapped:-1])
    else:
        return 0
    return taken * math.prod(eqn.outvars[0].aval.shape)


@dataclasses.dataclass(frozen=True)
class _Value:
    """An array that depends on parameters and constants only.

    Attributes:
        params: those that it is computed from.
        axes: of the one parameter that it is, in this order; None if it is computed.
        flat: likewise, before the axes were joined into one.
    """

    params: frozenset[str]
    axes: tuple[int, ...] | None = None
    flat: tuple[int, ...] | None = None


class _Reader:
    """Goes through a jaxpr, with what is known of each of its arrays; None: depends on inputs."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        self._shapes = shapes
        self.calls: dict[str, list[Call]] = {}
        self.inside: collections.Counter[str] = collections.Counter()
        self.outside: collections.Counter[str | None] = collections.Counter()
        self.used: set[str] = set()
        self.used_outside: set[str] = set()
        self.kernels: dict[str, str] = {}

    def read(
        self, jaxpr: Any, values: Sequence[_Value | None], times: int, layer: str | None
    ) -> list[_Value | None]:
        known: dict[Any, _Value | None] = dict(zip(jaxpr.invars, values, strict=True))

        def value_of(variable: Any) -> _Value | None:
            constant = _Value(frozenset())
            return constant if hasattr(variable, "val") else known.get(variable, constant)

        for eqn in jaxpr.eqns:
            given = [value_of(variable) for variable in eqn.invars]
            named = _innermost(eqn)
            within = layer if named is None else named
            made = self._call(eqn, given, times, within)
            if made is None:
                made = [self._primitive(eqn, given, times, within)] * len(eqn.outvars)
            known |= dict(zip(eqn.outvars, made, strict=True))
        return [value_of(variable) for variable in jaxpr.outvars]

    def _call(
        self, eqn: Any, given: list[_Value | None], times: int, layer: str | None
    ) -> list[_Value | None] | None:
        """Read what an equation calls; None if it calls nothing."""
        jaxprs = inner_jaxprs(tuple(eqn.params.values()))
        if not jaxprs:
            return None
        unknown: list[_Value | None] = [None] * len(eqn.outvars)
        name = eqn.primitive.name
        if name == "scan":
            # What is passed axis by axis has one axis less inside, and so have the stacked outputs.
            (body,) = jaxprs
            fixed, carried = scan_parts(eqn.invars, eqn.outvars, body)
            each = [_without_first_axis(value) for value in given[fixed + carried :]]
            inner = [*given[:fixed], *[None] * carried, *each]
            self.read(body, inner, times * int(eqn.params["length"]), layer)
            return unknown
        if name == "while":
            test, fixed = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
            carried = [None] * (len(given) - test - fixed)
            self.read(eqn.params["cond_jaxpr"].jaxpr, [*given[:test], *carried], times, layer)
            consts = given[test : test + fixed]
            self.read(eqn.params["body_jaxpr"].jaxpr, [*consts, *carried], times, layer)
            return unknown
        if name == "cond":
            given = given[1:]
        outputs = unknown
        for inner in jaxprs:
            fits = len(inner.invars) == len(given)
            outputs = self.read(inner, given if fits else [None] * len(inner.invars), times, layer)
        return outputs if len(jaxprs) == 1 and len(outputs) == len(unknown) else unknown

    def _primitive(
        self, eqn: Any, given: list[_Value | None], times: int, layer: str | None
    ) -> _Value | None:
        params = frozenset[str]().union(*(value.params for value in given if value is not None))
        self._count(mult_adds_of(eqn), params, times, layer)
        name = str(eqn.params.get("name", ""))
        if name.startswith(_CALL):
            path, input_shape, output_shape = json.loads(name.removeprefix(_CALL))
            # Under vmap the marked array has grown by the mapped axes.
            grown = math.prod(eqn.outvars[0].aval.shape) // max(math.prod(output_shape), 1)
            call = Call(
                input_shape=tuple(input_shape),
                output_shape=tuple(output_shape),
                times=times * grown,
            )
            self.calls.setdefault(path, []).append(call)
        elif name.startswith(_KERNEL):
            path, variable, axes = json.loads(name.removeprefix(_KERNEL))
            found = self.kernels.get(path) or self._not_variable(given[0], variable, axes)
            self.kernels[path] = found
        if None in given:
            made = None
        elif len(given) == 1 and given[0] is not None and given[0].axes is not None:
            made = _still_itself(eqn, given[0])
        else:
            made = _Value(params)
        if made is None or made.axes is None:
            self.used |= params
            if layer is None:
                as_they_are = [v.params for v in given if v is not None and v.axes is not None]
                self.used_outside |= frozenset[str]().union(*as_they_are)
        return made

    def _not_variable(self, value: _Value | None, variable: str, axes: int) -> str:
        if value is None or value.flat is None:
            return "kernel computed in the call"
        if value.params != {variable}:
            return f"kernel of another path, {', '.join(value.params)}"
        whole = len(self._shapes[variable])
        if value.flat[-axes:] != tuple(range(whole - axes, whole)):
            return "stacked along an axis other than the first"
        return ""

    def _count(self, products: int, params: frozenset[str], times: int, layer: str | None) -> None:
        mult_adds = times * products
        if layer is not None:
            self.inside[layer] += mult_adds if params else 0
            return
        # A product with several parameters, such as concatenated ones, is shared out by size.
        rest, sizes = mult_adds, {name: math.prod(self._shapes[name]) for name in sorted(params)}
        whole = max(sum(sizes.values()), 1)
        for name, size in sizes.items():
            share = mult_adds * size // whole
            self.outside[name.rpartition("/")[0]] += share
            rest -= share
        self.outside[min(params).rpartition("/")[0] if params else None] += rest


def _still_itself(eqn: Any, value: _Value) -> _Value:
    """Return what becomes of a parameter: itself, with axes in another order, or something new."""
    assert value.axes is not None
    name = eqn.primitive.name
    if name in _SAME:
        return value
    if name == "transpose":
        order = tuple(value.axes[axis] for axis in eqn.params["permutation"])
        return dataclasses.replace(value, axes=order)
    if name == "convert_element_type":
        kinds = (eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype)
        if all(jax.numpy.issubdtype(kind, jax.numpy.floating) for kind in kinds):
            return value
    if name == "reshape":
        return _Value(value.params, flat=value.axes)
    return _Value(value.params)


def _without_first_axis(value: _Value | None) -> _Value | None:
    if value is None or value.axes is None:
        return value
    return dataclasses.replace(value, axes=value.axes[1:])


def _scopes(eqn: Any) -> list[str]:
    return [getattr(scope, "name", "") for scope in eqn.source_info.name_stack.stack]


def _innermost(eqn: Any) -> str | None:
    """Return the path of the layer that an equation is inside of, as far as its own names tell."""
    names = _scopes(eqn)
    inside = [name.removeprefix(_INSIDE) for name in names if name.startswith(_INSIDE)]
    return inside[-1] if inside else None
