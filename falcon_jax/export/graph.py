"""A graph of ONNX in the making: nodes, constants, and sizes that are left open."""

import ast
import collections
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import export

from falcon_jax.frameworks.layers import Inputs
from falcon_jax.settings import no_such

# Names of the axes between batch and channels, by how many there are.
_SPATIAL: Mapping[int, tuple[str, ...]] = {
    1: ("length",),
    2: ("height", "width"),
    3: ("depth", "height", "width"),
}
AXES = ("batch", "depth", "height", "width", "length")

Size = Any  # a whole number, or an expression of open sizes as `jax.export` has them


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenShapes:
    """Example inputs whose shapes have names in place of some sizes.

    Attributes:
        inputs: with those shapes.
        names: of the open sizes.
        least: what each of them is taken to be at least; empty if nothing had to be assumed.
    """

    inputs: Inputs
    names: tuple[str, ...]
    least: Mapping[str, int]


def open_shapes(inputs: Inputs, axes: Sequence[str], *, bounded: bool) -> OpenShapes:
    """Return inputs whose batch, height and so on are open.

    Args:
        inputs: with sizes.
        axes: which are to be open, of `AXES`; what the inputs do not have is left out.
        bounded: whether the sizes in ``inputs`` are the least.

    Raises:
        ValueError: if there is no such axis, or the inputs have none of them.
    """
    unknown = [axis for axis in axes if axis not in AXES]
    if unknown:
        raise ValueError(no_such("axis to leave open", unknown[0], AXES))
    shapes = inputs.shapes
    sizes: dict[str, int] = {}
    named = [_named(a.shape, axes, sizes) for a in shapes.arrays]
    if axes and not sizes:
        raise ValueError(
            f"the sample has no axis {' or '.join(axes)}: an array has the batch first, channels "
            "last, and up to three spatial axes between them."
        )
    if not sizes:
        return OpenShapes(inputs=shapes, names=(), least={})
    least = {n: size for n, size in sizes.items() if bounded and not n.startswith("batch")}
    constraints = [f"{name} >= {size}" for name, size in least.items()]
    scope = export.SymbolicScope(constraints)
    symbols = dict(zip(sizes, export.symbolic_shape(", ".join(sizes), scope=scope), strict=True))
    arrays = [
        jax.ShapeDtypeStruct(tuple(symbols.get(s, s) for s in shape), a.dtype)  # type: ignore[arg-type]
        for shape, a in zip(named, shapes.arrays, strict=True)
    ]
    return OpenShapes(inputs=shapes.with_arrays(arrays), names=tuple(sizes), least=least)


def _named(
    shape: tuple[int, ...], axes: Sequence[str], sizes: dict[str, int]
) -> tuple[int | str, ...]:
    """Return a shape with names; sizes that differ between inputs have numbered names."""
    found: list[int | str] = list(shape)
    for axis, role in enumerate(axes_of(len(shape))):
        if role in axes:
            numbered = (f"{role}{number}" for number in range(1, len(sizes) + 2))
            names = (
                name for name in (role, *numbered) if sizes.get(name, shape[axis]) == shape[axis]
            )
            found[axis] = next(names)
            sizes[str(found[axis])] = shape[axis]
    return tuple(found)


def axes_of(rank: int) -> tuple[str, ...]:
    """Return the names of the axes of an array; that of channels is empty.

    >>> axes_of(4)
    ('batch', 'height', 'width', '')
    """
    return ("batch", *_SPATIAL.get(rank - 2, ()), "")[:rank]


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
