"""A graph of ONNX: nodes, constants and sizes that are left open; and made smaller afterwards."""

import ast
import collections
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import export

Size = Any  # a whole number, or an expression of open sizes as `jax.export` has them


def is_open(size: Size) -> bool:
    """Return whether a size is an expression rather than a number."""
    return export.is_symbolic_dim(size)


Shape = tuple[int | str, ...]


def shown_shape(shape: Sequence[Any]) -> Shape:
    """Return a shape with names and expressions for open sizes."""
    return tuple(str(n) if is_open(n) else int(n) for n in shape)


def evaluate(size: Size, names: Mapping[str, Any], operations: Mapping[str, Callable]) -> Any:
    """Return the value of an expression, whatever its values are.

    Args:
        size: the expression.
        names: value of every open size.
        operations: functions of two values: ``add``, ``sub``, ``mul``, ``floordiv``, ``mod``,
            ``max`` and ``min``; ``number``, of a whole number, makes a value.
    """

    def walk(node: ast.expr) -> Any:
        match node:
            case ast.Name(id=name):
                return names[name]
            case ast.Constant(value=int(value)):
                return operations["number"](value)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(value))):
                return operations["number"](-value)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return operations["sub"](operations["number"](0), walk(operand))
            case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int(power))):
                value = base = walk(left)
                for _ in range(power - 1):
                    value = operations["mul"](value, base)
                return value
            case ast.BinOp(left=left, op=op, right=right):
                return operations[_BINARY[type(op)]](walk(left), walk(right))
            case ast.Call(func=ast.Name(id=name), args=[left, right]):
                return operations[name](walk(left), walk(right))
        raise ValueError(f"the size {size} is no expression that can be exported.")

    # The text is how JAX shows, and reads, such an expression; only the power is not Python's.
    return walk(ast.parse(str(size).replace("^", "**"), mode="eval").body)


_BINARY = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul"}


class UnmappedError(ValueError):
    """An operation that ONNX has no counterpart for, or that no rule here knows."""


@dataclasses.dataclass
class Node:
    """An operation of ONNX.

    Attributes:
        op: its type.
        inputs: names; empty for one that is left out.
        outputs: names.
        attributes: plain values; a `Graph` for a body.
        path: of the module that it belongs to.
    """

    op: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]
    path: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """An array of a traced function, as the graph holds it.

    Attributes:
        shape: as JAX has it.
        dtype: of its elements.
        name: of the graph's tensor; empty for a constant.
        order: axes of JAX's array in the order in which the graph's tensor has them.
        stretched: axes of JAX's array of which the graph holds one entry for all.
        value: of a constant, axes as JAX has them, stretched ones of size 1.
        size: what it stands for, if it is a size, or a number computed of sizes.
    """

    shape: tuple[Size, ...]
    dtype: np.dtype
    name: str = ""
    order: tuple[int, ...]
    stretched: frozenset[int] = frozenset()
    value: np.ndarray | None = None
    size: Size | None = None

    @property
    def held(self) -> tuple[Size, ...]:
        """Sizes that the graph has, axes as JAX has them."""
        return tuple(1 if i in self.stretched else n for i, n in enumerate(self.shape))


def constant(value: Any, shape: Sequence[Size] | None = None) -> Tensor:
    """Return a constant, with a shape in which axes of size 1 may be stretched."""
    array = np.asarray(value)
    sizes = array.shape if shape is None else tuple(shape)
    stretched = frozenset(
        i for i, (n, m) in enumerate(zip(sizes, array.shape, strict=True)) if m == 1 and not _one(n)
    )
    return Tensor(
        shape=sizes,
        dtype=array.dtype,
        order=identity(len(sizes)),
        stretched=stretched,
        value=array,
    )


class Graph:
    """Nodes in order, and the constants that they use; a body knows the graph around it.

    Attributes:
        nodes: so far.
        inputs: name, shape and type of each; of a body, in the order that its node fixes.
        outputs: likewise.
        path: of the module whose operations are being added.
    """

    def __init__(self, parent: "Graph | None" = None):
        self.nodes: list[Node] = []
        self.inputs: list[tuple[str, tuple[Size, ...], np.dtype]] = []
        self.outputs: list[tuple[str, tuple[Size, ...], np.dtype]] = []
        self.parent = parent
        self.path = "" if parent is None else parent.path
        self._own: set[str] = set()
        self._sums: dict[str, _Sum] = {}
        self._made: dict[tuple[Any, ...], str] = {}
        root = self if parent is None else parent.root
        self.root: Graph = root
        if parent is None:
            self.constants: dict[str, np.ndarray] = {}
            self.counts: collections.Counter[str] = collections.Counter()
            self.open: dict[str, tuple[str, int]] = {}
            self._known: dict[tuple[Any, ...], str] = {}

    def fresh(self, stem: str) -> str:
        """Return a name that is used nowhere."""
        counts = self.root.counts
        name = stem
        while name in counts:
            name = f"{stem}_{counts[stem]}"
            counts[stem] += 1
        counts[name] = 1
        return name

    def constant(self, value: Any, stem: str = "constant") -> str:
        """Return the name of a constant; small ones that are equal have the same."""
        array = np.ascontiguousarray(value).reshape(np.shape(value))
        content = hashlib.blake2b(array.reshape(-1).view(np.uint8).data).digest()
        key = (str(array.dtype), array.shape, content)
        known = self.root._known
        if key not in known:
            known[key] = self.fresh(stem)
            self.root.constants[known[key]] = array
        return known[key]

    def input(self, stem: str, shape: Sequence[Size], dtype: np.dtype) -> Tensor:
        """Add an input and return it."""
        name = self.fresh(stem)
        self.inputs.append((name, tuple(shape), dtype))
        self._own.add(name)
        return Tensor(shape=tuple(shape), dtype=dtype, name=name, order=identity(len(shape)))

    def node(
        self, op: str, inputs: Sequence[str], outputs: int = 1, **attributes: Any
    ) -> list[str]:
        """Add a node and return the names of its outputs."""
        stem = "/".join(part for part in (self.path, op) if part)
        names = [self.fresh(stem) for _ in range(outputs)]
        self._own.update(names)
        self.nodes.append(Node(op, list(inputs), names, attributes, self.path))
        return names

    def once(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Return the output of a node that may be there already."""
        # As far out as its inputs are known: what is made in a loop is made in every round.
        graph = self
        while graph.parent is not None and not any(name in graph._own for name in inputs):
            graph = graph.parent
        key = (op, tuple(inputs), repr(sorted(attributes.items())))
        if key not in graph._made:
            (graph._made[key],) = graph.node(op, inputs, **attributes)
        return graph._made[key]

    # Sizes, as tensors of one int64.

    def size(self, size: Size) -> str:
        """Return the name of a tensor of shape (1,) that holds a size."""
        if not is_open(size):
            return self.constant(np.array([int(size)], np.int64))
        operations = {
            "number": lambda n: self.constant(np.array([n], np.int64)),
            "add": lambda a, b: self.once("Add", [a, b]),
            "sub": lambda a, b: self.once("Sub", [a, b]),
            "mul": lambda a, b: self.once("Mul", [a, b]),
            "floordiv": self._floordiv,
            "mod": lambda a, b: self.once("Mod", [a, b]),
            "max": lambda a, b: self.once("Max", [a, b]),
            "min": lambda a, b: self.once("Min", [a, b]),
        }
        return evaluate(size, _OpenSizes(self), operations)

    def _floordiv(self, a: str, b: str) -> str:
        # ONNX's division of integers rounds towards zero; the remainder has the divisor's sign.
        return self.once("Div", [self.once("Sub", [a, self.once("Mod", [a, b])]), b])

    def shape(self, sizes: Sequence[Size]) -> str:
        """Return the name of a tensor that holds a shape."""
        if not any(map(is_open, sizes)):
            return self.constant(np.array([int(n) for n in sizes], np.int64))
        return self.once("Concat", [self.size(n) for n in sizes], axis=0)

    # Arrays in the order that is asked for.

    def named(
        self, tensor: Tensor, order: Sequence[int] | None = None, *, whole: bool = True
    ) -> str:
        """Return the name of a tensor that holds an array with its axes in some order.

        Args:
            tensor: the array.
            order: of JAX's axes; as JAX has them if not given.
            whole: whether stretched axes must have all their entries.
        """
        order = tuple(range(len(tensor.shape))) if order is None else tuple(order)
        stretched = whole and bool(tensor.stretched)
        if tensor.value is not None:
            value = tensor.value
            if stretched and not any(map(is_open, tensor.shape)):
                value = np.broadcast_to(value, tensor.shape)
                stretched = False
            name = self.constant(np.transpose(value, order))
        else:
            name = self._moved(tensor, order)
        if stretched:
            name = self.once("Expand", [name, self.shape([tensor.shape[i] for i in order])])
        return name

    def _moved(self, tensor: Tensor, order: tuple[int, ...]) -> str:
        if order == tensor.order:
            return tensor.name
        held = tensor.held
        moving = [[i for i in o if not _one(held[i])] for o in (order, tensor.order)]
        # A shape that is known is cheaper than a transpose, one that must be computed is not.
        if moving[0] == moving[1] and sum(is_open(n) for n in held) < 2:
            return self.reshaped(
                tensor.name, [held[i] for i in tensor.order], [held[i] for i in order]
            )
        return self.once("Transpose", [tensor.name], perm=[tensor.order.index(i) for i in order])

    def reshaped(self, name: str, old: Sequence[Size], new: Sequence[Size]) -> str:
        """Return the name of a tensor with another shape, both shapes as the graph has them."""
        old, new = tuple(old), tuple(new)
        if len(old) == len(new) and all(a is b or a == b for a, b in zip(old, new, strict=True)):
            return name
        wanted = [-1 if is_open(n) else int(n) for n in new]
        open_axes = [i for i, n in enumerate(wanted) if n == -1]
        if len(open_axes) > 1:  # as in the old shape, where they stand at the same place
            for i in open_axes[:]:
                if len(open_axes) > 1 and i < len(old) and old[i] == new[i]:
                    wanted[i] = 0
                    open_axes.remove(i)
        if len(open_axes) > 1 or (0 in wanted and 0 in new):
            sizes = self.shape(new)
        else:
            sizes = self.constant(np.array(wanted, np.int64))
        made = self.once("Reshape", [name, sizes])
        if name in self._sums:
            source = self._sums[name]
            self._sums[made] = dataclasses.replace(source, sizes=(*source.sizes, sizes))
        return made

    def note_sum(self, name: str, source: str, axes: np.ndarray, count: Size) -> None:
        """Note what a sum is one of, so that its quotient can be a mean."""
        self._sums[name] = _Sum(source, axes, count)

    def mean(self, name: str, divisor: Size | None) -> str | None:
        """Return the name of a sum's quotient if that is the mean; None otherwise."""
        summed = self._sums.get(name)
        if summed is None or divisor is None or summed.count != divisor:
            return None
        (mean,) = self.node("ReduceMean", [summed.source, self.constant(summed.axes)], keepdims=0)
        for sizes in summed.sizes:
            (mean,) = self.node("Reshape", [mean, sizes])
        return mean

    def walk(self) -> Iterator[Node]:
        """Yield all nodes, those of bodies after the node that has them."""
        for node in self.nodes:
            yield node
            for value in node.attributes.values():
                if isinstance(value, Graph):
                    yield from value.walk()


@dataclasses.dataclass(frozen=True)
class _Sum:
    """A sum over axes of a tensor, reshaped since: its source, the axes, and of how many entries.

    Attributes:
        source: what is summed.
        axes: its axes.
        count: entries that go into a sum.
        sizes: names of the shapes that the sum got.
    """

    source: str
    axes: np.ndarray
    count: Size
    sizes: tuple[str, ...] = ()


class _OpenSizes(dict[str, str]):
    """Names of tensors that hold open sizes, read from the graph's inputs."""

    def __init__(self, graph: Graph):
        super().__init__()
        self._graph = graph

    def __missing__(self, name: str) -> str:
        tensor, axis = self._graph.root.open[name]
        return self._graph.once("Shape", [tensor], start=axis, end=axis + 1)


def _one(size: Size) -> bool:
    return not is_open(size) and int(size) == 1


def is_one(size: Size) -> bool:
    """Return whether a size is the number 1."""
    return _one(size)


def inverse(order: Sequence[int]) -> tuple[int, ...]:
    """Return the places of the axes in an order."""
    return tuple(int(i) for i in np.argsort(np.asarray(order, int)))


def identity(axes: int) -> tuple[int, ...]:
    """Return the order in which JAX has so many axes."""
    return tuple(range(axes))


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
