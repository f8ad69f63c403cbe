"""A model's call for inference: a function, or a jaxpr of canonical operations, with open sizes."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax import export

from falcon_jax.frameworks.interface import Model, framework_of
from falcon_jax.frameworks.layers import Inputs, array_leaves
from falcon_jax.ops.choice import canonical_forms
from falcon_jax.settings import no_such
from falcon_jax.wording import reason

# Names of the axes between batch and channels, by how many there are.
_SPATIAL: Mapping[int, tuple[str, ...]] = {
    1: ("length",),
    2: ("height", "width"),
    3: ("depth", "height", "width"),
}
AXES = ("batch", "depth", "height", "width", "length")

AUTO = "auto"
# What "auto" tries, in this order: the first with which the model can be traced is taken.
_TRIED: tuple[tuple[str, ...], ...] = (
    ("batch", "depth", "height", "width", "length"),
    ("batch",),
    (),
)


def inference(model: Any) -> Callable[..., Any]:
    """Return what a model computes in evaluation mode, as a pure function of its inputs.

    Args:
        model: an NNX model, a bound Linen module, or already a function of arrays.

    Raises:
        ValueError: if it is none of these.
    """
    if isinstance(model, Model):
        return framework_of(model).named_inference(model)
    if not callable(model):
        raise ValueError(
            "what is exported is an nnx.Module, a bound linen.Module, or a function of arrays; got "
            f"a {type(model).__name__}."
        )
    return model


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traced:
    """A model's inference as a jaxpr.

    Attributes:
        jaxpr: closed, of canonical operations where they are ours.
        input_names: of the arrays among the arguments.
        output_names: of the arrays that it returns.
        shapes: of the inputs, with names in place of open sizes.
        fixed: why sizes that were tried are not open; empty if all are.
    """

    jaxpr: Any
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    shapes: OpenShapes
    fixed: str


def trace_inference(model: Any, sample: Any, axes: str | Sequence[str]) -> Traced:
    """Trace a model's inference, with open sizes.

    Args:
        model: as in `inference`.
        sample: what it is called with, as `falcon_jax.Inputs` has it; shapes will do.
        axes: which axes are open, of batch, height, width and so on; ``auto`` for all that the
            model lets be.

    Returns:
        The jaxpr and the names.

    Raises:
        ValueError: if the model cannot be called on the sample, or not with these sizes open.
    """
    inputs = Inputs.of(sample)
    function = inference(model)
    traced, _, fixed = with_open_sizes(
        model, inputs, axes, lambda shapes: _traced(model, function, shapes)
    )
    return dataclasses.replace(traced, fixed=fixed)


Made = TypeVar("Made")


def with_open_sizes(
    model: Any, inputs: Inputs, axes: str | Sequence[str], make: Callable[[OpenShapes], Made]
) -> tuple[Made, OpenShapes, str]:
    """Make something of a model with as many sizes open as was asked for.

    Args:
        model: to be named in errors.
        inputs: what it is called with.
        axes: as in `trace_inference`.
        make: makes it for shapes; where it fails, fewer are tried, or none.

    Returns:
        What was made, for which shapes, and why not more are open; empty if all are.

    Raises:
        ValueError: if it fails for all that is allowed.
    """
    if axes == AUTO:
        tried = [_present(inputs, names) for names in _TRIED]
    else:
        tried = [(axes,) if isinstance(axes, str) else tuple(axes)]
    failed: Exception | None = None
    fixed = ""
    for names in dict.fromkeys(tried):
        for bounded in (False, True):
            shapes = open_shapes(inputs, names, bounded=bounded)
            try:
                return make(shapes), shapes, fixed
            except Exception as error:  # of anything that a model does with a size that is open
                if not shapes.names:
                    raise inputs.refused_by(model, error) from error
                failed = failed or error
        assert failed is not None
        fixed = fixed or f"not all of {', '.join(names)} can be open: {reason(failed, 200)}"
    make(open_shapes(inputs, (), bounded=False))  # raises if the sizes are not what is wrong
    assert failed is not None
    raise ValueError(
        f"{type(model).__name__} cannot be exported with {', '.join(tried[0])} open; leave fewer "
        f"sizes open, or give open_sizes='auto' for those that can be. It said: {reason(failed)}"
    ) from failed


def _present(inputs: Inputs, axes: Sequence[str]) -> tuple[str, ...]:
    """Return those of some axes that an input has."""
    ranks = {len(array.shape) for array in inputs.arrays}
    return tuple(axis for axis in axes if any(axis in axes_of(rank) for rank in ranks))


def _traced(model: Any, function: Callable[..., Any], shapes: OpenShapes) -> Traced:
    structure: list[Any] = []

    def forward(*arrays: Any) -> list[Any]:
        y = shapes.inputs.with_arrays(list(arrays)).call(function)
        structure.append(y)
        return array_leaves(y)

    with canonical_forms():
        jaxpr = jax.make_jaxpr(forward)(*shapes.inputs.arrays)
    if not jaxpr.jaxpr.outvars:
        raise ValueError(f"{type(model).__name__} returns no array.")
    return Traced(
        jaxpr=jaxpr,
        input_names=input_names(shapes.inputs),
        output_names=output_names(structure[-1]),
        shapes=shapes,
        fixed="",
    )


def input_names(inputs: Inputs) -> tuple[str, ...]:
    """Return ``x`` for one positional array; else ``x0``, ``x1`` and names of keywords."""
    leaves = jax.tree_util.tree_leaves_with_path((inputs.args, dict(inputs.kwargs)))
    arrays = [path for path, leaf in leaves if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]
    if len(arrays) == 1 and arrays[0][0].idx == 0:  # type: ignore[attr-defined]
        return ("x",)
    return tuple(_joined(path[1:], "x") for path in arrays)


def output_names(value: Any) -> tuple[str, ...]:
    """Return ``y`` for one array; else names by position, key or attribute."""
    leaves = jax.tree_util.tree_leaves_with_path(value)
    if len(leaves) == 1 and not leaves[0][0]:
        found = array_leaves(value)
        return ("y",) if len(found) == 1 else tuple(f"y{i}" for i in range(len(found)))
    names: list[str] = []
    for path, leaf in leaves:
        count = len(array_leaves(leaf))
        name = _joined(path, "y")
        names += [name] if count == 1 else [f"{name}_{i}" for i in range(count)]
    return tuple(names)


def _joined(path: Sequence[Any], prefix: str) -> str:
    """Return one name for a path in a tree: its keys joined, positions after a letter."""
    words = [jax.tree_util.keystr((key,), simple=True) for key in path]
    name = "_".join(words)
    return f"{prefix}{name}" if words and words[0].isdecimal() else name or prefix


def outputs_of(values: Any) -> list[np.ndarray]:
    """Return the arrays that a model returned, in the order of an exported one's outputs."""
    return [np.asarray(leaf) for leaf in array_leaves(values)]
