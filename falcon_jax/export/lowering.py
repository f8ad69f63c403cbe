"""From a jaxpr to a graph of ONNX: one rule for each primitive, and those that hold a jaxpr.

Loops and branches become Scan, Loop and If, with graphs of their own inside.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from falcon_jax.export.graph import Graph, Tensor, UnmappedError, constant, identity, is_open
from falcon_jax.frameworks.tracing import CALLS, inner_jaxprs, scan_parts

INSIDE = "falcon_jax inside "


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """An equation of a jaxpr that is to be added to a graph.

    Attributes:
        name: of its primitive.
        params: of the primitive.
        inputs: what it is applied to.
        outputs: shapes and types of what it gives.
        graph: to add to.
        opset: version of ONNX's operators.
    """

    name: str
    params: dict[str, Any]
    inputs: list[Tensor]
    outputs: list[Any]
    graph: Graph
    opset: int

    def made(
        self, name: str, order: Sequence[int] | None = None, index: int = 0, **has: Any
    ) -> Tensor:
        """Return an output that a tensor of the graph holds."""
        like = self.outputs[index]
        order = identity(len(like.shape)) if order is None else tuple(order)
        return Tensor(shape=like.shape, dtype=np.dtype(like.dtype), name=name, order=order, **has)

    def unmapped(self, why: str = "") -> UnmappedError:
        """Return the error that says that there is no counterpart, and where."""
        where = f"in {self.graph.path!r}" if self.graph.path else "in the model itself"
        return UnmappedError(
            f"the operation {self.name!r} {where} cannot be mapped to ONNX"
            + (f": {why}." if why else "; leave it out of what is exported, or write it otherwise.")
        )


Rule = Callable[[Step], Sequence[Tensor]]
_RULES: dict[str, Rule] = {}
_ELEMENTWISE: set[str] = set()
_LAZY: set[str] = set()


def rule(*names: str, elementwise: bool = False, lazy: bool = False) -> Callable[[Rule], Rule]:
    """Make a function the one that adds primitives of these names. Use as a decorator.

    Args:
        *names: of the primitives.
        elementwise: whether every entry depends on entries at the same place only.
        lazy: whether the rule takes constants, too; otherwise what is made of constants is computed
            beforehand.
    """

    def enter(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        _ELEMENTWISE.update(names if elementwise else ())
        _LAZY.update(names if lazy else ())
        return function

    return enter


# Primitives whose output is their input.
_SAME = {
    "copy",
    "copy_p",
    "name",
    "optimization_barrier",
    "sharding_constraint",
    "stop_gradient",
    "pvary",
}
# Those whose own parameters hold all that they compute.
_CALLS = CALLS.keys() | {"composite", "falcon_linear_call"}


def lower(
    jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Tensor], graph: Graph, opset: int
) -> list[Tensor]:
    """Add what a jaxpr computes to a graph.

    Args:
        jaxpr: open.
        consts: of its constants.
        inputs: of its inputs.
        graph: it gets the nodes.
        opset: version of ONNX's operators.

    Returns:
        The outputs.

    Raises:
        UnmappedError: naming an operation that has no counterpart, and its module.
    """
    known: dict[Any, Tensor] = dict(zip(jaxpr.invars, inputs, strict=True))
    fixed = dict(zip(jaxpr.constvars, consts, strict=True))

    def read(variable: Any) -> Tensor:
        if hasattr(variable, "val"):
            return _constant(variable.val, variable.aval.dtype, graph)
        if variable not in known:
            known[variable] = _constant(fixed[variable], variable.aval.dtype, graph)
        return known[variable]

    outer = graph.path
    for eqn in _needed(jaxpr):
        graph.path = _path(eqn) or outer
        step = Step(
            name=eqn.primitive.name,
            params=eqn.params,
            inputs=[read(v) for v in eqn.invars],
            outputs=[v.aval for v in eqn.outvars],
            graph=graph,
            opset=opset,
        )
        known |= dict(zip(eqn.outvars, _lowered(eqn, step), strict=True))
    graph.path = outer
    return [read(v) for v in jaxpr.outvars]


def lower_closed(closed: Any, inputs: Sequence[Tensor], graph: Graph, opset: int) -> list[Tensor]:
    """Add what a closed jaxpr, or an open one without constants, computes to a graph."""
    jaxpr = getattr(closed, "jaxpr", closed)
    return lower(jaxpr, getattr(closed, "consts", ()), inputs, graph, opset)


def _needed(jaxpr: Any) -> list[Any]:
    """Return the equations that outputs depend on."""
    needed = {v for v in jaxpr.outvars if not hasattr(v, "val")}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            kept.append(eqn)
            needed.update(v for v in eqn.invars if not hasattr(v, "val"))
    return kept[::-1]


def _path(eqn: Any) -> str:
    names = [getattr(scope, "name", "") for scope in eqn.source_info.name_stack.stack]
    inside = [name.removeprefix(INSIDE) for name in names if name.startswith(INSIDE)]
    return inside[-1] if inside else ""


def _constant(value: Any, dtype: Any, graph: Graph) -> Tensor:
    if _is_key(dtype):
        raise _random(graph)
    return constant(np.asarray(value, dtype))


def _is_key(dtype: Any) -> bool:
    return jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def _random(graph: Graph) -> UnmappedError:
    where = f" in {graph.path!r}" if graph.path else ""
    return UnmappedError(
        f"random numbers are drawn{where}, which ONNX does not; export what is computed without."
    )


def _lowered(eqn: Any, step: Step) -> Sequence[Tensor]:
    if step.name in _SAME:
        return step.inputs
    if step.name not in _LAZY | _CALLS and all(t.value is not None for t in step.inputs):
        found = _computed(eqn, step)
        if found is not None:
            return found
    if step.name in _RULES:
        found = _RULES[step.name](step)
        if found is not NotImplemented:
            return found
    inner = inner_jaxprs(tuple(step.params.values()))
    if step.name in _CALLS and inner and len(inner[0].invars) == len(step.inputs):
        closed = next(
            (v for v in step.params.values() if getattr(v, "jaxpr", None) is inner[0]), inner[0]
        )
        return lower_closed(closed, step.inputs, step.graph, step.opset)
    raise step.unmapped()


def _computed(eqn: Any, step: Step) -> list[Tensor] | None:
    """Return the outputs of an equation of constants; None if they depend on open sizes."""
    if step.name == "dim_as_value" or _mentions_open(step.params):
        return None
    values = [np.asarray(t.value) for t in step.inputs]
    if step.name in _ELEMENTWISE:
        # What is the same along an axis stays so.
        small = np.broadcast_shapes(*(v.shape for v in values))
        values = [np.broadcast_to(v, small) if v.ndim == len(small) else v for v in values]
        return [
            constant(y, like.shape)
            for y, like in zip(_bound(eqn, values, step), step.outputs, strict=True)
        ]
    sizes = [n for t in (*step.inputs, *step.outputs) for n in t.shape]
    if any(map(is_open, sizes)):
        return None
    whole = [np.broadcast_to(v, t.shape) for v, t in zip(values, step.inputs, strict=True)]
    return [constant(y) for y in _bound(eqn, whole, step)]


def _bound(eqn: Any, values: list[np.ndarray], step: Step) -> list[np.ndarray]:
    if any(_is_key(like.dtype) for like in step.outputs):
        raise _random(step.graph)
    y = eqn.primitive.bind(*map(jnp.asarray, values), **eqn.params)
    return [np.asarray(part) for part in (y if eqn.primitive.multiple_results else [y])]


def _mentions_open(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_mentions_open, value.values()))
    if isinstance(value, (tuple, list)):
        return any(map(_mentions_open, value))
    return is_open(value)


def _whole(graph: Graph, tensor: Tensor, like: Any) -> str:
    """Return a name of a body's output that is no input or constant, but a node's output."""
    name = graph.named(tensor)
    (name,) = graph.node("Identity", [name])
    graph.outputs.append((name, tuple(like.shape), np.dtype(like.dtype)))
    return name


@rule("scan")
def _scan(step: Step) -> list[Tensor]:
    (body,) = inner_jaxprs(tuple(step.params.values()))
    closed = step.params["jaxpr"]
    graph = step.graph
    fixed, carried = scan_parts(step.inputs, step.outputs, body)
    consts, state, each = (
        step.inputs[:fixed],
        step.inputs[fixed : fixed + carried],
        step.inputs[fixed + carried :],
    )
    if not each:
        return _counted(step, closed, consts, state)
    inside = Graph(graph)
    given = [
        inside.input("state", v.aval.shape, np.dtype(v.aval.dtype))
        for v in body.invars[fixed : fixed + carried]
    ]
    given += [
        inside.input("slice", v.aval.shape, np.dtype(v.aval.dtype))
        for v in body.invars[fixed + carried :]
    ]
    made = lower_closed(closed, [*consts, *given], inside, step.opset)
    for tensor, variable in zip(made, body.outvars, strict=True):
        _whole(inside, tensor, variable.aval)
    backwards = int(bool(step.params["reverse"]))
    stacked = len(step.outputs) - carried
    directions = {"scan_output_directions": [backwards] * stacked} if stacked else {}
    names = graph.node(
        "Scan",
        [graph.named(t) for t in (*state, *each)],
        len(step.outputs),
        body=inside,
        num_scan_inputs=len(each),
        scan_input_directions=[backwards] * len(each),
        **directions,
    )
    return [step.made(name, index=i) for i, name in enumerate(names)]


def _counted(
    step: Step, closed: Any, consts: Sequence[Tensor], state: Sequence[Tensor]
) -> list[Tensor]:
    """Add a loop of so many rounds that takes nothing apart; it may stack what rounds give."""
    graph = step.graph
    body = closed.jaxpr
    inside = Graph(graph)
    inside.input("round", (), np.dtype(np.int64))
    go_on = inside.input("go_on", (), np.dtype(bool))
    given = [
        inside.input("state", v.aval.shape, np.dtype(v.aval.dtype))
        for v in body.invars[len(consts) :]
    ]
    made = lower_closed(closed, [*consts, *given], inside, step.opset)
    (same,) = inside.node("Identity", [go_on.name])
    inside.outputs.append((same, (), np.dtype(bool)))
    for tensor, variable in zip(made, body.outvars, strict=True):
        _whole(inside, tensor, variable.aval)
    if step.params["reverse"] and len(step.outputs) > len(state):
        raise step.unmapped("a loop without inputs whose outputs are stacked backwards")
    rounds = graph.once("Squeeze", [graph.size(step.params["length"])])
    names = graph.node(
        "Loop",
        [rounds, "", *map(graph.named, state)],
        len(step.outputs),
        body=inside,
    )
    return [step.made(name, index=i) for i, name in enumerate(names)]


@rule("while")
def _while(step: Step) -> list[Tensor]:
    params, graph = step.params, step.graph
    test, fixed = params["cond_nconsts"], params["body_nconsts"]
    test_consts, consts = step.inputs[:test], step.inputs[test : test + fixed]
    state = step.inputs[test + fixed :]
    body = params["body_jaxpr"].jaxpr
    (first,) = lower_closed(params["cond_jaxpr"], [*test_consts, *state], graph, step.opset)
    inside = Graph(graph)
    inside.input("round", (), np.dtype(np.int64))
    inside.input("go_on", (), np.dtype(bool))
    given = [
        inside.input("state", v.aval.shape, np.dtype(v.aval.dtype)) for v in body.invars[fixed:]
    ]
    made = lower_closed(params["body_jaxpr"], [*consts, *given], inside, step.opset)
    (again,) = lower_closed(params["cond_jaxpr"], [*test_consts, *made], inside, step.opset)
    _whole(inside, again, params["cond_jaxpr"].jaxpr.outvars[0].aval)
    for tensor, variable in zip(made, body.outvars, strict=True):
        _whole(inside, tensor, variable.aval)
    names = graph.node(
        "Loop", ["", graph.named(first), *map(graph.named, state)], len(state), body=inside
    )
    return [step.made(name, index=i) for i, name in enumerate(names)]


@rule("cond")
def _cond(step: Step) -> list[Tensor]:
    which, *inputs = step.inputs
    return _branched(step, which, inputs, list(step.params["branches"]), step.graph, 0)


def _branched(
    step: Step, which: Tensor, inputs: list[Tensor], branches: list[Any], graph: Graph, first: int
) -> list[Tensor]:
    """Return the outputs of one of some branches: the first, or else one of the rest."""
    if len(branches) == 1:
        return lower_closed(branches[0], inputs, graph, step.opset)
    if which.dtype == bool:
        (chosen,) = graph.node("Not", [graph.named(which)])
    else:
        number = graph.constant(np.asarray(first, which.dtype))
        op = "LessOrEqual" if first == 0 else "Equal"
        (chosen,) = graph.node(op, [graph.named(which), number])
    then, otherwise = Graph(graph), Graph(graph)
    outputs = lower_closed(branches[0], inputs, then, step.opset)
    others = _branched(step, which, inputs, branches[1:], otherwise, first + 1)
    for inside, found in ((then, outputs), (otherwise, others)):
        for tensor, like in zip(found, step.outputs, strict=True):
            _whole(inside, tensor, like)
    names = graph.node("If", [chosen], len(step.outputs), then_branch=then, else_branch=otherwise)
    return [step.made(name, index=i) for i, name in enumerate(names)]
