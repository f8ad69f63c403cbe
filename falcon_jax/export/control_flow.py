"""Rules for loops and branches: Scan, Loop and If, with graphs of their own inside."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from falcon_jax.export.graph import Graph, Tensor
from falcon_jax.export.lowering import Step, lower_closed, rule
from falcon_jax.frameworks.tracing import inner_jaxprs


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
    outer = [len(t.shape) for t in step.inputs]
    sliced = sum(a > len(v.aval.shape) for a, v in zip(outer, body.invars, strict=True))
    pairs = zip(step.outputs, body.outvars, strict=True)
    carried = sum(len(a.shape) == len(v.aval.shape) for a, v in pairs)
    fixed = len(step.inputs) - carried - sliced
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
        num_scan_inputs=sliced,
        scan_input_directions=[backwards] * sliced,
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
