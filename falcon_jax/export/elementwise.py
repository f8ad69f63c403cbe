"""Rules for what is computed entry by entry, and for sums and the like along axes."""

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from falcon_jax.export.graph import Size, Tensor, constant, identity, is_open
from falcon_jax.export.lowering import Step, rule

_ONE_TO_ONE = {
    "abs": "Abs",
    "acos": "Acos",
    "acosh": "Acosh",
    "asin": "Asin",
    "asinh": "Asinh",
    "atan": "Atan",
    "atanh": "Atanh",
    "ceil": "Ceil",
    "cos": "Cos",
    "cosh": "Cosh",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "log": "Log",
    "logistic": "Sigmoid",
    "neg": "Neg",
    "sign": "Sign",
    "sin": "Sin",
    "sinh": "Sinh",
    "sqrt": "Sqrt",
    "tan": "Tan",
    "tanh": "Tanh",
    "add": "Add",
    "add_any": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "min": "Min",
    "eq": "Equal",
    "lt": "Less",
    "le": "LessOrEqual",
    "gt": "Greater",
    "ge": "GreaterOrEqual",
}
_ARITHMETIC = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}
_REDUCTIONS = {
    "reduce_sum": "ReduceSum",
    "reduce_max": "ReduceMax",
    "reduce_min": "ReduceMin",
    "reduce_prod": "ReduceProd",
}


def entrywise(
    step: Step, op: str, inputs: Sequence[Tensor] | None = None, **attributes: Any
) -> Tensor:
    """Add a node that works entry by entry, in the order in which its inputs lie."""
    return joined(
        step, inputs or step.inputs, lambda names: step.graph.node(op, names, **attributes)[0]
    )


def joined(step: Step, inputs: Sequence[Tensor], make: Callable[[list[str]], str]) -> Tensor:
    """Return what a function of the names of inputs, all in one order, gives as an output.

    Args:
        step: whose output it is.
        inputs: of the output's shape, or scalars.
        make: from names to the name of the output.
    """
    shape = step.outputs[0].shape
    full = [t for t in inputs if len(t.shape) == len(shape)]
    held = [t for t in full if t.value is None]
    moved = [t for t in held if t.order != identity(len(shape))]
    order = (moved or held or [None])[0]
    order = identity(len(shape)) if order is None else order.order
    names = [
        step.graph.named(t, order if len(t.shape) == len(shape) else None, whole=False)
        for t in inputs
    ]
    stretched = frozenset.intersection(*(t.stretched for t in full)) if full else frozenset()
    return Tensor(
        shape=shape,
        dtype=np.dtype(step.outputs[0].dtype),
        name=make(names),
        order=order,
        stretched=stretched,
    )


def scalar(value: float | int, like: Tensor) -> Tensor:
    """Return a number of the type of another tensor."""
    return constant(np.asarray(value, like.dtype))


@rule(*_ONE_TO_ONE, elementwise=True)
def _one_to_one(step: Step) -> list[Tensor]:
    if step.name in _ARITHMETIC and (known := _of_sizes(step)) is not None:
        return [known]
    return [entrywise(step, _ONE_TO_ONE[step.name])]


def _of_sizes(step: Step) -> Tensor | None:
    """Return a sum or product of sizes as a size; None if an input is no size."""
    sizes = [_size(t) for t in step.inputs]
    if step.outputs[0].shape or None in sizes or not any(map(is_open, sizes)):
        return None
    return of_size(step, _ARITHMETIC[step.name](*sizes))


def _size(tensor: Tensor) -> Size | None:
    if tensor.size is not None:
        return tensor.size
    if tensor.value is None or tensor.value.size != 1:
        return None
    number = float(tensor.value.reshape(()))
    return int(number) if number.is_integer() else None


def of_size(step: Step, size: Size) -> Tensor:
    """Return an output, a scalar, that is a size."""
    like = step.outputs[0]
    if not is_open(size):
        return constant(np.asarray(int(size), like.dtype))
    graph = step.graph
    name = graph.once("Squeeze", [graph.size(size), graph.constant(np.array([0], np.int64))])
    if np.dtype(like.dtype) != np.int64:
        name = graph.once("Cast", [name], to=np.dtype(like.dtype))
    return step.made(name, size=size)


@rule("dim_as_value", lazy=True)
def _dim_as_value(step: Step) -> list[Tensor]:
    return [of_size(step, step.params["dim"])]


@rule("convert_element_type", elementwise=True)
def _cast(step: Step) -> list[Tensor]:
    (x,) = step.inputs
    if x.size is not None and not x.shape:
        return [of_size(step, x.size)]
    to = np.dtype(step.params["new_dtype"])
    if to == x.dtype:
        return [x]
    return [entrywise(step, "Cast", to=to)]


@rule("reduce_precision", elementwise=True)
def _reduce_precision(step: Step) -> list[Tensor]:
    raise step.unmapped("ONNX has no rounding to so many bits")


@rule("max", elementwise=True)
def _max(step: Step) -> list[Tensor]:
    x, y = step.inputs
    for a, b in ((x, y), (y, x)):
        inexact = jnp.issubdtype(b.dtype, jnp.inexact)
        if a.value is None and b.value is not None and inexact and not np.any(b.value):
            return [entrywise(step, "Relu", [a])]
    return [entrywise(step, "Max")]


@rule("div", elementwise=True)
def _div(step: Step) -> list[Tensor]:
    x, y = step.inputs
    if np.issubdtype(x.dtype, np.integer):
        return [entrywise(step, "Div")]
    mean = None if x.value is not None else step.graph.mean(x.name, _size(y))
    if mean is not None:
        return [dataclasses.replace(x, name=mean)]
    return [entrywise(step, "Div")]


@rule("square", elementwise=True)
def _square(step: Step) -> list[Tensor]:
    return [entrywise(step, "Mul", [step.inputs[0], step.inputs[0]])]


@rule("integer_pow", elementwise=True)
def _integer_pow(step: Step) -> list[Tensor]:
    (x,), power = step.inputs, step.params["y"]
    if power == 2:
        return [entrywise(step, "Mul", [x, x])]
    return [entrywise(step, "Pow", [x, scalar(power, x)])]


@rule("pow", elementwise=True)
def _pow(step: Step) -> list[Tensor]:
    return [entrywise(step, "Pow")]


def _chain(step: Step, *ops: str) -> list[Tensor]:
    def make(names: list[str]) -> str:
        (name,) = names
        for op in ops:
            (name,) = step.graph.node(op, [name])
        return name

    return [joined(step, step.inputs, make)]


@rule("rsqrt", elementwise=True)
def _rsqrt(step: Step) -> list[Tensor]:
    return _chain(step, "Sqrt", "Reciprocal")


@rule("ne", elementwise=True)
def _ne(step: Step) -> list[Tensor]:
    return _chain_of_two(step, "Equal", "Not")


def _chain_of_two(step: Step, first: str, second: str) -> list[Tensor]:
    graph = step.graph
    return [joined(step, step.inputs, lambda n: graph.node(second, graph.node(first, n))[0])]


@rule("and", "or", "xor", elementwise=True)
def _logical(step: Step) -> list[Tensor]:
    kind = step.name.capitalize()
    return [entrywise(step, kind if step.inputs[0].dtype == bool else f"Bitwise{kind}")]


@rule("not", elementwise=True)
def _not(step: Step) -> list[Tensor]:
    return [entrywise(step, "Not" if step.inputs[0].dtype == bool else "BitwiseNot")]


@rule("round", elementwise=True)
def _round(step: Step) -> list[Tensor]:
    if int(step.params["rounding_method"]) != 1:
        raise step.unmapped("ONNX rounds halves to even numbers only")
    return [entrywise(step, "Round")]


@rule("is_finite", elementwise=True)
def _is_finite(step: Step) -> list[Tensor]:
    graph = step.graph

    def make(names: list[str]) -> str:
        either = graph.node("Or", [*graph.node("IsNaN", names), *graph.node("IsInf", names)])
        return graph.node("Not", either)[0]

    return [joined(step, step.inputs, make)]


@rule("log1p", "log2", "expm1", "erfc", "exp2", "cbrt", "one_minus_square", elementwise=True)
def _composed(step: Step) -> list[Tensor]:
    (x,), graph = step.inputs, step.graph
    one = graph.constant(np.asarray(1, x.dtype))

    def make(names: list[str]) -> str:
        (name,) = names
        if step.name == "log1p":
            return graph.node("Log", graph.node("Add", [name, one]))[0]
        if step.name == "log2":
            scale = graph.constant(np.asarray(1 / math.log(2), x.dtype))
            return graph.node("Mul", [*graph.node("Log", [name]), scale])[0]
        if step.name == "one_minus_square":
            return graph.node("Sub", [one, *graph.node("Mul", [name, name])])[0]
        if step.name == "expm1":
            return graph.node("Sub", [*graph.node("Exp", [name]), one])[0]
        if step.name == "erfc":
            return graph.node("Sub", [one, *graph.node("Erf", [name])])[0]
        if step.name == "exp2":
            return graph.node("Pow", [graph.constant(np.asarray(2, x.dtype)), name])[0]
        root = graph.node(
            "Pow", [*graph.node("Abs", [name]), graph.constant(np.asarray(1 / 3, x.dtype))]
        )
        return graph.node("Mul", [*graph.node("Sign", [name]), *root])[0]

    return [joined(step, step.inputs, make)]


@rule("rem", elementwise=True)
def _rem(step: Step) -> list[Tensor]:
    return [entrywise(step, "Mod", fmod=1)]


@rule("clamp", elementwise=True)
def _clamp(step: Step) -> list[Tensor]:
    low, x, high = step.inputs
    if low.shape or high.shape:
        graph = step.graph
        return [
            joined(
                step,
                [low, x, high],
                lambda n: graph.node("Min", [*graph.node("Max", n[:2]), n[2]])[0],
            )
        ]
    return [entrywise(step, "Clip", [x, low, high])]


@rule("select_n", elementwise=True)
def _select(step: Step) -> list[Tensor]:
    which, *cases = step.inputs
    if len(cases) != 2 or which.dtype != bool:
        raise step.unmapped("a choice between more than two arrays")
    return [entrywise(step, "Where", [which, cases[1], cases[0]])]


@rule(*_REDUCTIONS)
def _reduce(step: Step) -> list[Tensor]:
    (x,) = step.inputs
    axes = tuple(step.params["axes"])
    return [reduced(step, x, _REDUCTIONS[step.name], axes)]


@rule("reduce_and", "reduce_or")
def _reduce_logical(step: Step) -> list[Tensor]:
    (x,), graph = step.inputs, step.graph
    op = "ReduceMin" if step.name == "reduce_and" else "ReduceMax"
    (name,) = graph.node("Cast", [graph.named(x, x.order)], to=np.dtype(np.int32))
    number = Tensor(shape=x.shape, dtype=np.dtype(np.int32), name=name, order=x.order)
    y = reduced(step, number, op, tuple(step.params["axes"]))
    (name,) = graph.node("Cast", [y.name], to=np.dtype(bool))
    return [step.made(name, y.order)]


@rule("argmax", "argmin")
def _arg(step: Step) -> list[Tensor]:
    (x,), (axis,), graph = step.inputs, step.params["axes"], step.graph
    op = {"argmax": "ArgMax", "argmin": "ArgMin"}[step.name]
    (name,) = graph.node(op, [graph.named(x, x.order)], axis=x.order.index(axis), keepdims=0)
    if np.dtype(step.outputs[0].dtype) != np.int64:
        (name,) = graph.node("Cast", [name], to=np.dtype(step.outputs[0].dtype))
    return [step.made(name, without(x.order, (axis,)))]


def reduced(step: Step, x: Tensor, op: str, axes: tuple[int, ...]) -> Tensor:
    """Return a reduction over some axes, in the order in which the others lie."""
    graph = step.graph
    name = graph.named(x, x.order)
    places = np.array(sorted(x.order.index(axis) for axis in axes), np.int64)
    (y,) = graph.node(op, [name, graph.constant(places)], keepdims=0)
    made = step.made(y, without(x.order, axes))
    if op == "ReduceSum":
        graph.note_sum(y, name, places, math.prod(x.shape[axis] for axis in axes))
    return made


def without(order: tuple[int, ...], axes: Sequence[int]) -> tuple[int, ...]:
    """Return the order of the axes that are left when some are gone."""
    kept = [axis for axis in order if axis not in axes]
    ranks = {axis: rank for rank, axis in enumerate(sorted(kept))}
    return tuple(ranks[axis] for axis in kept)
