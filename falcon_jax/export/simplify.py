"""A graph made smaller with the same result: what constants do to a convolution, it does itself."""

import collections
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from falcon_jax.export.graph import Graph, Node

_LINEAR = {"Conv": 1, "ConvTranspose": 1, "Gemm": -1, "MatMul": -1}  # axis of output channels


def simplify(graph: Graph) -> None:
    """Fold BatchNorms, biases and other constants, and leave out what nobody uses.

    ``g (W x + b) + o = (g W) x + (g b + o)``

    Args:
        graph: it is changed; its inputs and outputs stay.
    """
    for _ in range(2):  # what became the identity goes in the second round
        _fold(graph, _uses(graph))
    _drop_unused(graph)


def _uses(graph: Graph) -> collections.Counter[str]:
    uses = collections.Counter(name for name, *_ in graph.outputs)
    for node in graph.nodes:
        uses.update(node.inputs)
        for body in _bodies(node):
            uses.update(_uses(body))
    return uses


def _bodies(node: Node) -> list[Graph]:
    return [value for value in node.attributes.values() if isinstance(value, Graph)]


def _fold(graph: Graph, uses: Mapping[str, int]) -> None:
    made: dict[str, Node] = {}
    kept: list[Node] = []
    for node in graph.nodes:
        for body in _bodies(node):
            _fold(body, uses)
        before = _folded_into(graph, node, made, uses)
        if before is None:
            kept.append(node)
        else:
            before.outputs = node.outputs
            node = before
        made |= dict.fromkeys(node.outputs, node)
    graph.nodes = kept


def _folded_into(
    graph: Graph, node: Node, made: Mapping[str, Node], uses: Mapping[str, int]
) -> Node | None:
    """Return the node before, changed, if it can do what this one does, too."""

    def single(name: str) -> Node | None:
        before = made.get(name)
        return (
            before if before is not None and uses[name] == 1 and len(before.outputs) == 1 else None
        )

    if node.op == "Identity":
        return single(node.inputs[0])
    if node.op == "Min":
        return _clipped(graph, node, *map(single, node.inputs))
    if node.op not in ("Add", "Sub", "Mul", "Div") or len(node.inputs) != 2:
        return None
    constants = graph.root.constants
    for place in (0, 1):
        before, value = single(node.inputs[place]), constants.get(node.inputs[1 - place])
        if before is None or value is None or not jnp.issubdtype(value.dtype, jnp.inexact):
            continue
        affine = _affine(node.op, value.astype(np.float64), data_first=place == 0)
        if affine is None:
            continue
        if _takes(graph, before, *affine, single):
            _take(graph, before, *affine, single)
            return before
        if before.op == "Mul" and _scales(graph, before, node.op, *affine):
            return before
    return None


def _clipped(graph: Graph, node: Node, *before: Node | None) -> Node | None:
    """Return a ReLU that got an upper bound."""
    for relu, name in zip(before, node.inputs[::-1], strict=True):
        bound = graph.root.constants.get(name)
        if relu is not None and relu.op == "Relu" and bound is not None and bound.size == 1:
            zero = graph.constant(np.zeros((), bound.dtype))
            relu.op = "Clip"
            relu.inputs += [zero, graph.constant(bound.reshape(()))]
            return relu
    return None


def _affine(
    op: str, value: np.ndarray, *, data_first: bool
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return gain and offset; None for a quotient by the data."""
    one, zero = np.ones(()), np.zeros(())
    if op == "Add":
        return one, value
    if op == "Mul":
        return value, zero
    if op == "Sub":
        return (one, np.asarray(-value)) if data_first else (np.full((), -1.0), value)
    return (np.asarray(1 / value), zero) if data_first and np.all(value) else None


Single = Callable[[str], Node | None]


def _terms(node: Node, single: Single) -> list[Node]:
    """Return the linear nodes that a sum is of, or the one that a node is; none if it is neither.

    Only those whose results nobody else uses.
    """
    if node.op in _LINEAR:
        return [node]
    if node.op != "Add":
        return []
    before = [single(name) for name in node.inputs]
    parts = [_terms(part, single) if part is not None else [] for part in before]
    return [*parts[0], *parts[1]] if all(parts) else []


def _takes(graph: Graph, node: Node, gain: np.ndarray, offset: np.ndarray, single: Single) -> bool:
    """Say if a linear node, or the terms of a sum of them, can have a gain and an offset."""
    terms = _terms(node, single)
    constants = graph.root.constants
    for term in terms:
        if any(name not in constants for name in term.inputs[1:]):
            return False
        weight = constants[term.inputs[1]]
        for part in (gain, offset):
            if part.size != 1 and not _of_channels(part, term, weight):
                return False
        if term.op == "MatMul" and np.any(offset):
            return False
    return bool(terms)


def _take(graph: Graph, node: Node, gain: np.ndarray, offset: np.ndarray, single: Single) -> None:
    """Change linear nodes such that their sum has a gain and an offset."""
    for index, term in enumerate(_terms(node, single)):
        _scale(graph, term, gain.reshape(-1), 0 if index else offset.reshape(-1))


def _scale(graph: Graph, node: Node, gain: np.ndarray, offset: np.ndarray | int) -> None:
    constants = graph.root.constants
    weight = constants[node.inputs[1]]
    bias = constants[node.inputs[2]] if len(node.inputs) > 2 else np.zeros(())
    channels, rank = _channels(node, weight), weight.ndim
    every = np.broadcast_to(gain, (channels,))
    if node.op == "ConvTranspose":  # (groups, inputs of a group, outputs of a group, ...)
        groups = node.attributes.get("group", 1)
        split = weight.reshape(groups, -1, *weight.shape[1:])
        factor = every.reshape(groups, 1, -1, *(1,) * (rank - 2))
        new = (split * factor).reshape(weight.shape)
    elif node.op == "Conv":
        new = weight * every.reshape(-1, *(1,) * (rank - 1))
    else:
        new = weight * every
    stem = node.inputs[1]
    node.inputs[1] = graph.constant(new.astype(weight.dtype), stem)
    new_bias = np.broadcast_to(bias.astype(np.float64) * gain + offset, (channels,))
    if len(node.inputs) > 2 or np.any(new_bias):
        node.inputs[2:] = [graph.constant(new_bias.astype(weight.dtype), f"{stem}_bias")]


def _channels(node: Node, weight: np.ndarray) -> int:
    if node.op == "Conv":
        return weight.shape[0]
    if node.op == "ConvTranspose":
        return weight.shape[1] * node.attributes.get("group", 1)
    return weight.shape[-1]


def _of_channels(part: np.ndarray, node: Node, weight: np.ndarray) -> bool:
    """Return whether an array has one number for each output channel, as it is broadcast."""
    channels = _channels(node, weight)
    if _LINEAR[node.op] == -1:
        fits = node.op == "MatMul" or part.ndim <= 2
        return fits and part.shape[-1] == channels == part.size
    return part.ndim == weight.ndim and part.shape[1] == channels == part.size


def _scales(graph: Graph, node: Node, op: str, gain: np.ndarray, offset: np.ndarray) -> bool:
    """Change a product with a number such that its output has another factor; say if it can."""
    places = [i for i in (0, 1) if node.inputs[i] in graph.root.constants]
    if op not in ("Mul", "Div") or gain.size != 1 or len(places) != 1:
        return False
    value = graph.root.constants[node.inputs[places[0]]]
    if value.size != 1:
        return False
    product = (value.astype(np.float64) * gain.reshape(())).astype(value.dtype)
    if np.all(product == 1):
        data = node.inputs[1 - places[0]]
        node.op, node.inputs = "Identity", [data]
    else:
        node.inputs[places[0]] = graph.constant(product)
    return True


def _drop_unused(graph: Graph) -> None:
    """Leave out nodes that nobody uses, and constants."""

    def dropped(inside: Graph, needed: set[str]) -> None:
        """Drop nodes of a graph; ``needed`` grows by what it uses of the graphs around it."""
        needed.update(name for name, *_ in inside.outputs)
        kept = []
        for node in reversed(inside.nodes):
            if needed.isdisjoint(node.outputs):
                continue
            for body in _bodies(node):
                dropped(body, needed)
            needed.update(node.inputs)
            kept.append(node)
        inside.nodes = kept[::-1]

    needed: set[str] = set()
    dropped(graph, needed)
    for name in [name for name in graph.constants if name not in needed]:
        del graph.constants[name]
