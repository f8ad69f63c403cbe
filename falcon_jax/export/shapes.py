"""Rules for what moves entries about: shapes, slices, pads, gathers, and products of matrices."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from falcon_jax.export.elementwise import without
from falcon_jax.export.graph import (
    Graph,
    Size,
    Tensor,
    constant,
    identity,
    inverse,
    is_one,
    is_open,
)
from falcon_jax.export.lowering import Step, rule

_END = np.iinfo(np.int64).max


@rule("broadcast_in_dim", lazy=True)
def _broadcast(step: Step) -> list[Tensor]:
    """Keep new axes at size 1: what works entry by entry stretches them by itself."""
    x = step.inputs[0]
    shape = tuple(step.outputs[0].shape)
    places = tuple(step.params["broadcast_dimensions"])
    held: list[Size] = [1] * len(shape)
    for axis, place in enumerate(places):
        held[place] = x.held[axis]
    stretched = frozenset(
        i for i, (n, m) in enumerate(zip(shape, held, strict=True)) if is_one(m) and not is_one(n)
    )
    if x.value is not None:
        like = constant(x.value.reshape([int(n) for n in held]), shape)
        return [like]
    # As the input lies, the new axes where JAX has them among those.
    order = tuple(places[axis] for axis in x.order)
    order = _with_new_axes(order, len(shape))
    name = step.graph.reshaped(x.name, [x.held[i] for i in x.order], [held[i] for i in order])
    return [Tensor(shape=shape, dtype=x.dtype, name=name, order=order, stretched=stretched)]


def _with_new_axes(order: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Return an order of all axes in which those that are new go before the next greater one."""
    full = list(order)
    for axis in range(count):
        if axis not in order:
            at = next((i for i, other in enumerate(full) if other > axis), len(full))
            full.insert(at, axis)
    return tuple(full)


@rule("transpose")
def _transpose(step: Step) -> list[Tensor]:
    x, permutation = step.inputs[0], tuple(step.params["permutation"])
    places = inverse(permutation)
    if x.value is not None:
        return [constant(np.transpose(x.value, permutation), step.outputs[0].shape)]
    return [
        Tensor(
            shape=tuple(x.shape[i] for i in permutation),
            dtype=x.dtype,
            name=x.name,
            order=tuple(places[axis] for axis in x.order),
            stretched=frozenset(places[axis] for axis in x.stretched),
        )
    ]


@rule("reshape", "squeeze", "expand_dims")
def _reshape(step: Step) -> list[Tensor]:
    x, new, graph = step.inputs[0], tuple(step.outputs[0].shape), step.graph
    groups = _groups(x.shape, new)
    if groups is None or any(
        x.stretched.intersection(axes) and not len(axes) == len(made) == 1 for axes, made in groups
    ):
        x = _whole(graph, x)
    order = None if groups is None or x.value is not None else _regrouped(x, groups)
    if groups is None or order is None:
        x = _whole(graph, x)
        return [step.made(graph.reshaped(graph.named(x), x.shape, new))]
    stretched = frozenset(made[0] for axes, made in groups if x.stretched.intersection(axes))
    held = [1 if i in stretched else n for i, n in enumerate(new)]
    name = graph.reshaped(x.name, [x.held[i] for i in x.order], [held[i] for i in order])
    return [step.made(name, order, stretched=stretched)]


def _whole(graph: Graph, x: Tensor) -> Tensor:
    """Return a tensor of the graph without stretched axes, in the order that it has."""
    if x.value is None and not x.stretched:
        return x
    name = graph.named(x, x.order)
    return Tensor(shape=x.shape, dtype=x.dtype, name=name, order=x.order)


def _groups(old: Sequence[Size], new: Sequence[Size]) -> list[tuple[list[int], list[int]]] | None:
    """Return which axes become which, in the smallest groups of equal products.

    Axes of size 1 are in groups without a counterpart. None if products cannot be compared.
    """
    groups: list[tuple[list[int], list[int]]] = []
    left = [i for i, n in enumerate(old) if not is_one(n)]
    right = [i for i, n in enumerate(new) if not is_one(n)]
    while left or right:
        axes, made = left[:1], right[:1]
        if not axes or not made:
            return None
        del left[:1], right[:1]
        a, b = old[axes[0]], new[made[0]]
        while a != b:
            # What can still be joined on either side: the smaller product grows.
            grow_left = _less(a, b)
            if grow_left is None:
                return None
            source = left if grow_left else right
            if not source:
                return None
            axis = source.pop(0)
            if grow_left:
                axes.append(axis)
                a = a * old[axis]
            else:
                made.append(axis)
                b = b * new[axis]
        groups.append((axes, made))
    groups += [([i], []) for i, n in enumerate(old) if is_one(n)]
    groups += [([], [i]) for i, n in enumerate(new) if is_one(n)]
    return groups


def _less(a: Size, b: Size) -> bool | None:
    """Return whether a product of sizes is the smaller one; None if nobody knows."""
    try:
        return bool(a < b)
    except Exception:  # of JAX, where it depends on the sizes that are open
        return None


def _regrouped(x: Tensor, groups: list[tuple[list[int], list[int]]]) -> tuple[int, ...] | None:
    """Return the order of the new axes if no entry has to move; None otherwise."""
    group_of = {axis: (axes, made) for axes, made in groups for axis in axes if made}
    order: list[int] = []
    lying = [axis for axis in x.order if axis in group_of]
    while lying:
        axes, made = group_of[lying[0]]
        if lying[: len(axes)] != axes:
            return None
        del lying[: len(axes)]
        order += made
    ones = [made[0] for axes, made in groups if not axes]
    return _with_new_axes(tuple(order), len(order) + len(ones)) if ones else tuple(order)


@rule("slice")
def _slice(step: Step) -> list[Tensor]:
    x = step.inputs[0]
    starts, limits = step.params["start_indices"], step.params["limit_indices"]
    strides = step.params["strides"] or (1,) * len(starts)
    cut = [
        axis
        for axis, n in enumerate(x.shape)
        if not (_is(starts[axis], 0) and _is(limits[axis], n) and strides[axis] == 1)
    ]
    return [_sliced(step, x, [(a, starts[a], limits[a], strides[a]) for a in cut])]


def _is(a: Size, b: Size) -> bool:
    return bool(a == b)


def _sliced(step: Step, x: Tensor, cuts: Sequence[tuple[int, Size, Size, int]]) -> Tensor:
    """Return an array cut along axes: axis, start, limit and stride of each."""
    graph = step.graph
    cuts = [cut for cut in cuts if cut[0] not in x.stretched]
    stretched = x.stretched
    name = graph.named(x, x.order, whole=False)
    if cuts:
        axes, starts, limits, strides = zip(*cuts, strict=True)
        (name,) = graph.node(
            "Slice",
            [
                name,
                graph.shape(starts),
                graph.shape(limits),
                graph.constant(np.array([x.order.index(a) for a in axes], np.int64)),
                graph.constant(np.array(strides, np.int64)),
            ],
        )
    return step.made(name, x.order, stretched=stretched)


@rule("rev")
def _rev(step: Step) -> list[Tensor]:
    x = step.inputs[0]
    return [_sliced(step, x, [(axis, -1, -_END, -1) for axis in step.params["dimensions"]])]


@rule("split")
def _split(step: Step) -> list[Tensor]:
    x, axis, graph = step.inputs[0], step.params["axis"], step.graph
    if len(step.outputs) == 1:
        return [x]
    sizes = np.array([int(n) for n in step.params["sizes"]], np.int64)
    x = _whole(graph, x) if axis in x.stretched else x
    names = graph.node(
        "Split",
        [graph.named(x, x.order, whole=False), graph.constant(sizes)],
        len(sizes),
        axis=x.order.index(axis),
    )
    return [step.made(n, x.order, i, stretched=x.stretched) for i, n in enumerate(names)]


@rule("dynamic_slice")
def _dynamic_slice(step: Step) -> list[Tensor]:
    x, *starts = step.inputs
    sizes = step.params["slice_sizes"]
    axes = [a for a, n in enumerate(x.shape) if not _is(sizes[a], n)]
    begins = {axis: _within(step, starts[axis], x.shape[axis] - sizes[axis]) for axis in axes}
    name, order = _window(step.graph, x, begins, sizes)
    return [step.made(name, order)]


def _within(step: Step, index: Tensor, last: Size) -> str | int:
    """Return an index, as JAX has it between 0 and the last: a number, or the name of a tensor."""
    graph = step.graph
    if index.value is not None and (not is_open(last) or int(index.value) == 0):
        return int(np.clip(int(index.value), 0, None if is_open(last) else int(last)))
    (at,) = graph.node("Cast", [graph.named(index)], to=np.dtype(np.int64))
    (at,) = graph.node("Reshape", [at, graph.constant(np.ones(1, np.int64))])
    (at,) = graph.node("Min", [at, graph.size(last)])
    return graph.node("Max", [at, graph.constant(np.zeros(1, np.int64))])[0]


def _window(
    graph: Graph, x: Tensor, begins: dict[int, str | int], sizes: Sequence[Size]
) -> tuple[str, tuple[int, ...]]:
    """Return a window of an array: its name and its order; ``begins`` are by axis."""
    x = _whole(graph, x)
    if not begins:
        return x.name, x.order
    starts, ends = [], []
    for axis, begin in begins.items():
        if isinstance(begin, int):
            starts.append(graph.size(begin))
            ends.append(graph.size(begin + sizes[axis]))
        else:
            starts.append(begin)
            ends += graph.node("Add", [begin, graph.size(sizes[axis])])
    places = graph.constant(np.array([x.order.index(axis) for axis in begins], np.int64))
    bounds = [graph.once("Concat", names, axis=0) for names in (starts, ends)]
    (name,) = graph.node("Slice", [x.name, *bounds, places])
    return name, x.order


@rule("concatenate")
def _concatenate(step: Step) -> list[Tensor]:
    graph, axis = step.graph, step.params["dimension"]
    held = [t for t in step.inputs if t.value is None]
    order = held[0].order
    names = [graph.named(t, order) for t in step.inputs]
    (name,) = graph.node("Concat", names, axis=order.index(axis))
    return [step.made(name, order)]


@rule("stack")
def _stack(step: Step) -> list[Tensor]:
    graph, axis = step.graph, step.params["axis"]
    place = graph.constant(np.array([axis], np.int64))
    names = [graph.once("Unsqueeze", [graph.named(t), place]) for t in step.inputs]
    return [step.made(graph.node("Concat", names, axis=axis)[0])]


@rule("unstack")
def _unstack(step: Step) -> list[Tensor]:
    graph, axis = step.graph, step.params["axis"]
    sizes = graph.constant(np.ones(len(step.outputs), np.int64))
    place = graph.constant(np.array([axis], np.int64))
    names = [graph.named(step.inputs[0])]
    if len(step.outputs) > 1:
        names = graph.node("Split", [*names, sizes], len(step.outputs), axis=axis)
    return [
        step.made(graph.node("Squeeze", [name, place])[0], index=i) for i, name in enumerate(names)
    ]


@rule("tile")
def _tile(step: Step) -> list[Tensor]:
    x, graph = _whole(step.graph, step.inputs[0]), step.graph
    repeats = graph.shape([step.params["reps"][axis] for axis in x.order])
    return [step.made(graph.node("Tile", [x.name, repeats])[0], x.order)]


@rule("pad")
def _pad(step: Step) -> list[Tensor]:
    x, fill = step.inputs
    config = step.params["padding_config"]
    graph = step.graph
    x = _whole(graph, x)
    name = graph.named(x, x.order)
    shape = list(x.shape)
    for axis, (_, _, inner) in enumerate(config):
        if inner:
            place = x.order.index(axis)
            name = dilated(graph, name, [shape[i] for i in x.order], place, inner + 1, fill)
            shape[axis] = (shape[axis] - 1) * (inner + 1) + 1
    pairs = {x.order.index(a): (low, high) for a, (low, high, _) in enumerate(config)}
    return [step.made(padded(graph, name, pairs, graph.named(fill)), x.order)]


def padded(
    graph: Graph, name: str, pairs: dict[int, tuple[Size, Size]], fill: str | None = None
) -> str:
    """Return a tensor padded with a constant; negative numbers cut.

    Args:
        graph: to add to.
        name: of the tensor.
        pairs: low and high by place of the axis in the tensor.
        fill: name of a scalar; zero if not given.
    """
    pairs = {
        p: (low, high) for p, (low, high) in pairs.items() if not (_is(low, 0) and _is(high, 0))
    }
    if not pairs:
        return name
    sizes = graph.shape([low for low, _ in pairs.values()] + [high for _, high in pairs.values()])
    places = graph.constant(np.array(list(pairs), np.int64))
    return graph.node("Pad", [name, sizes, fill or "", places])[0]


def dilated(
    graph: Graph, name: str, shape: Sequence[Size], place: int, step: int, fill: Tensor
) -> str:
    """Return a tensor with ``step - 1`` entries of a constant between those along an axis."""
    old, n = list(shape), shape[place]
    apart = [*old[: place + 1], 1, *old[place + 1 :]]
    name = graph.reshaped(name, old, apart)
    name = padded(graph, name, {place + 1: (0, step - 1)}, graph.named(fill))
    apart[place + 1] = step
    joined = [*old[:place], n * step, *old[place + 1 :]]
    name = graph.reshaped(name, apart, joined)
    return padded(graph, name, {place: (0, 1 - step)}, graph.named(fill))


@rule("iota")
def _iota(step: Step) -> list[Tensor]:
    graph, like, axis = step.graph, step.outputs[0], step.params["dimension"]
    zero, one = (graph.constant(np.asarray(i, np.int64)) for i in (0, 1))
    size = graph.once("Squeeze", [graph.size(like.shape[axis])])
    name = graph.once("Range", [zero, size, one])
    if np.dtype(like.dtype) != np.int64:
        name = graph.once("Cast", [name], to=np.dtype(like.dtype))
    held = [n if i == axis else 1 for i, n in enumerate(like.shape)]
    name = graph.reshaped(name, [like.shape[axis]], held)
    stretched = frozenset(i for i, n in enumerate(like.shape) if i != axis and not is_one(n))
    return [step.made(name, stretched=stretched)]


@rule("cumsum")
def _cumsum(step: Step) -> list[Tensor]:
    x, graph = _whole(step.graph, step.inputs[0]), step.graph
    place = graph.constant(np.asarray(x.order.index(step.params["axis"]), np.int64))
    backwards = int(step.params["reverse"])
    (name,) = graph.node("CumSum", [graph.named(x, x.order), place], reverse=backwards)
    return [step.made(name, x.order)]


@rule("top_k")
def _top_k(step: Step) -> list[Tensor]:
    x, graph = step.inputs[0], step.graph
    count = graph.constant(np.array([int(step.params["k"])], np.int64))
    axis = step.params.get("axis", -1) % len(x.shape)
    values, places = graph.node("TopK", [graph.named(x), count], 2, axis=axis)
    (places,) = graph.node("Cast", [places], to=np.dtype(step.outputs[1].dtype))
    return [step.made(values), step.made(places, index=1)]


@rule("sort")
def _sort(step: Step) -> list[Tensor]:
    if len(step.inputs) != 1:
        raise step.unmapped("several arrays sorted together")
    x, graph, axis = step.inputs[0], step.graph, step.params["dimension"]
    count = graph.size(x.shape[axis])
    values, _ = graph.node("TopK", [graph.named(x), count], 2, axis=axis, largest=0)
    return [step.made(values)]


@rule("gather")
def _gather(step: Step) -> list[Tensor]:
    """Take one window, or slices along one axis, as ``x[indices]`` and ``jnp.take`` do."""
    x, indices = step.inputs
    numbers, sizes, graph = step.params["dimension_numbers"], step.params["slice_sizes"], step.graph
    axes = tuple(numbers.start_index_map)
    mode = str(step.params["mode"]).rpartition(".")[2]
    if len(indices.shape) == 1 and not numbers.operand_batching_dims:
        return [_one_window(step, x, indices, mode)]
    taken = all(_is(sizes[a], 1 if a in axes else n) for a, n in enumerate(x.shape))
    if numbers.operand_batching_dims or tuple(numbers.collapsed_slice_dims) != axes or not taken:
        raise step.unmapped("slices of more than one entry, or a place of its own in each example")
    rank, places = len(step.outputs[0].shape), indices.shape[:-1]
    # JAX names where it wants the axes of the slices; those of the indices are the others.
    offset = list(numbers.offset_dims)
    batch = [a for a in range(rank) if a not in offset]
    last = [x.shape[a] - 1 for a in axes]
    at, inside = _inside(graph, indices, last)
    if len(axes) == 1:
        (axis,) = axes
        flat = graph.reshaped(inside, indices.shape, places)
        (name,) = graph.node("Gather", [graph.named(x), flat], axis=axis)
        order = (*offset[:axis], *batch, *offset[axis:])
    else:
        first = (*axes, *(a for a in range(len(x.shape)) if a not in axes))
        (name,) = graph.node("GatherND", [graph.named(x, first), inside])
        order = (*batch, *offset)
    if "FILL" in mode and inside != at:
        (right,) = graph.node("Equal", [at, inside])
        (right,) = graph.node("Cast", [right], to=np.dtype(np.int32))
        (right,) = graph.node("ReduceMin", [right, graph.constant(np.array([-1]))], keepdims=0)
        (right,) = graph.node("Cast", [right], to=np.dtype(bool))
        sizes_of = dict(zip(batch, places, strict=True))
        right = graph.reshaped(right, places, [sizes_of.get(axis, 1) for axis in order])
        fill = step.params["fill_value"]
        if fill is None:
            fill = np.nan if jnp.issubdtype(x.dtype, jnp.inexact) else 0
        (name,) = graph.node("Where", [right, name, graph.constant(np.asarray(fill, x.dtype))])
    return [step.made(name, order)]


def _inside(graph: Graph, indices: Tensor, last: Sequence[Size]) -> tuple[str, str]:
    """Return the names of int64 indices, as they are and such that none lies outside."""
    if indices.value is not None and not any(map(is_open, last)):
        value = np.asarray(np.broadcast_to(indices.value, indices.shape), np.int64)
        bound = np.array([int(n) for n in last], np.int64)
        return graph.constant(value), graph.constant(np.clip(value, 0, bound))
    (at,) = graph.node("Cast", [graph.named(indices)], to=np.dtype(np.int64))
    (inside,) = graph.node("Max", [at, graph.constant(np.zeros(1, np.int64))])
    return at, graph.node("Min", [inside, graph.shape(last)])[0]


def _one_window(step: Step, x: Tensor, indices: Tensor, mode: str) -> Tensor:
    """Return what a gather at one place takes, its collapsed axes left out."""
    numbers, sizes, graph = step.params["dimension_numbers"], step.params["slice_sizes"], step.graph
    if "FILL" in mode and indices.value is None:
        raise step.unmapped("an index that is computed, and may lie outside")
    begins: dict[int, str | int] = {}
    for place, axis in enumerate(numbers.start_index_map):
        if indices.value is not None:
            index = constant(indices.value[place])
        else:
            at = graph.constant(np.asarray(place, np.int64))
            (name,) = graph.node("Gather", [graph.named(indices), at], axis=0)
            index = Tensor(shape=(), dtype=indices.dtype, name=name, order=())
        if not _is(sizes[axis], x.shape[axis]):
            begins[axis] = _within(step, index, x.shape[axis] - sizes[axis])
    name, order = _window(graph, x, begins, sizes)
    collapsed = [order.index(axis) for axis in numbers.collapsed_slice_dims]
    if collapsed:
        places = graph.constant(np.array(sorted(collapsed), np.int64))
        (name,) = graph.node("Squeeze", [name, places])
    return step.made(name, without(order, numbers.collapsed_slice_dims))


@rule("dot_general")
def _dot(step: Step) -> list[Tensor]:
    a, b = step.inputs
    (left, right), (left_batch, right_batch) = step.params["dimension_numbers"]
    graph = step.graph
    out = np.dtype(step.outputs[0].dtype)
    if a.dtype != b.dtype:
        raise step.unmapped(f"a product of {a.dtype} and {b.dtype}")
    ranks = len(a.shape), len(b.shape)
    plain = len(left) == 1 and not left_batch and ranks[1] == 2 and left[0] == ranks[0] - 1
    if plain and b.value is not None:
        order = identity(2) if right[0] == 0 else (1, 0)
        names = [graph.named(a), graph.named(b, order)]
        op = "Gemm" if ranks[0] == 2 else "MatMul"
        return [_cast(step, graph.node(op, names)[0], a.dtype, out)]
    # One letter an axis, in the order in which the arrays lie.
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    of_a = [next(letters) for _ in a.shape]
    of_b = [next(letters) for _ in b.shape]
    for i, j in zip((*left, *left_batch), (*right, *right_batch), strict=True):
        of_b[j] = of_a[i]
    result = [of_a[i] for i in left_batch]
    result += [n for i, n in enumerate(of_a) if i not in (*left, *left_batch)]
    result += [n for j, n in enumerate(of_b) if j not in (*right, *right_batch)]
    a, b = _whole(graph, a), _whole(graph, b)
    terms = ["".join(of[i] for i in t.order) for of, t in ((of_a, a), (of_b, b))]
    names = [graph.named(a, a.order), graph.named(b, b.order)]
    (name,) = graph.node("Einsum", names, equation=f"{terms[0]},{terms[1]}->{''.join(result)}")
    return [_cast(step, name, a.dtype, out)]


def _cast(step: Step, name: str, dtype: np.dtype, wanted: np.dtype) -> Tensor:
    if dtype != wanted:
        (name,) = step.graph.node("Cast", [name], to=wanted)
    return step.made(name)


@rule("axis_size", "psum", "axis_index")
def _devices(step: Step) -> list[Tensor]:
    raise step.unmapped("it is for several devices")
