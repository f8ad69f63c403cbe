"""Sizes that an exported model leaves open: which axes, their names, and expressions of them."""

import ast
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
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
