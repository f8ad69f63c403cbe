"""Rules for what looks at windows of maps: convolutions, pooling, resizing."""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from falcon_jax.export.graph import Graph, Size, Tensor, constant, is_open
from falcon_jax.export.lowering import Step, rule
from falcon_jax.export.shapes import dilated, padded


@rule("conv_general_dilated")
def _conv(step: Step) -> list[Tensor]:
    x, kernel = step.inputs
    params, graph = step.params, step.graph
    layout = params["dimension_numbers"]
    if params["batch_group_count"] != 1:
        raise step.unmapped("batch_group_count is not 1, as in gradients of convolutions")
    if x.dtype != kernel.dtype:
        raise step.unmapped(f"a convolution of {x.dtype} with {kernel.dtype}")
    name = graph.named(x, layout.lhs_spec)
    shape = [x.shape[i] for i in layout.lhs_spec]
    size = [int(kernel.shape[i]) for i in layout.rhs_spec[2:]]
    strides, dilation = params["window_strides"], params["rhs_dilation"]
    pads, apart = params["padding"], params["lhs_dilation"]
    extents = [(k - 1) * d + 1 for k, d in zip(size, dilation, strict=True)]
    groups = int(params["feature_group_count"])
    transposed = [(e - 1 - low, e - 1 - high) for e, (low, high) in zip(extents, pads, strict=True)]
    if any(d > 1 for d in apart):
        if set(strides) == {1} and _not_negative(transposed):
            return [_transposed_conv(step, name, kernel, transposed, groups)]
        zero = constant(np.zeros((), x.dtype))
        for axis, d in enumerate(apart):
            if d > 1:
                name = dilated(graph, name, shape, axis + 2, d, zero)
                shape[axis + 2] = (shape[axis + 2] - 1) * d + 1
    made = [step.outputs[0].shape[i] for i in layout.out_spec]
    attributes: dict[str, Any] = {}
    if _is_same(shape[2:], made[2:], extents, strides, pads):
        attributes["auto_pad"] = "SAME_UPPER"
    else:
        name, pads = _open_or_negative(graph, name, pads)
        attributes["pads"] = _flat(pads)
    (name,) = graph.node(
        "Conv",
        [name, graph.named(kernel, layout.rhs_spec)],
        kernel_shape=size,
        strides=list(strides),
        dilations=list(dilation),
        group=groups,
        **attributes,
    )
    return [step.made(name, layout.out_spec)]


def _is_same(
    old: Sequence[Size],
    new: Sequence[Size],
    extents: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[tuple[Size, Size]],
) -> bool:
    """Return whether open pads are those that ONNX finds by itself for as many points a stride."""
    if not any(is_open(p) for p in itertools.chain(*pads)):
        return False
    for n, m, extent, stride, (low, high) in zip(old, new, extents, strides, pads, strict=True):
        total = (m - 1) * stride + extent - n
        if m != -(-n // stride) or low + high != total or low != total // 2:
            return False
    return True


def _transposed_conv(
    step: Step, name: str, kernel: Tensor, pads: Sequence[tuple[int, int]], groups: int
) -> Tensor:
    """Return a convolution of points that lie apart: ONNX's transposed one."""
    params, graph = step.params, step.graph
    layout = params["dimension_numbers"]
    if kernel.value is None:
        raise step.unmapped("a transposed convolution whose kernel is computed")
    value = np.transpose(np.broadcast_to(kernel.value, kernel.shape), layout.rhs_spec)
    n, m, *size = value.shape  # per group: n / groups outputs of m inputs
    value = np.flip(value, tuple(range(2, value.ndim)))
    value = value.reshape(groups, n // groups, m, *size).swapaxes(1, 2)
    weight = graph.constant(value.reshape(groups * m, n // groups, *size))
    (name,) = graph.node(
        "ConvTranspose",
        [name, weight],
        kernel_shape=size,
        strides=list(params["lhs_dilation"]),
        dilations=list(params["rhs_dilation"]),
        pads=_flat(pads),
        group=groups,
    )
    return step.made(name, layout.out_spec)


def _not_negative(pads: Sequence[tuple[Size, Size]]) -> bool:
    return not any(is_open(p) or p < 0 for p in itertools.chain(*pads))


def _flat(pads: Sequence[tuple[Size, Size]]) -> list[int]:
    return [int(low) for low, _ in pads] + [int(high) for _, high in pads]


def _open_or_negative(
    graph: Graph, name: str, pads: Sequence[tuple[Size, Size]], fill: str | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """Return a tensor with those pads that a node cannot have itself, and the others."""
    own = [pair if _not_negative([pair]) else (0, 0) for pair in pads]
    others = {i + 2: pair for i, pair in enumerate(pads) if not _not_negative([pair])}
    return padded(graph, name, others, fill), own


@rule("reduce_window_max", "reduce_window_min", "reduce_window_sum")
def _pool(step: Step) -> list[Tensor]:
    x, params, graph = step.inputs[0], step.params, step.graph
    window, strides = params["window_dimensions"], params["window_strides"]
    pads, dilation = params["padding"], params["window_dilation"]
    if any(d != 1 for d in params["base_dilation"]):
        raise step.unmapped("points of the input are apart")
    rank = len(x.shape)
    # Two axes that no window goes along stand for batch and channels: the first and the last.
    still = [
        a for a in range(rank) if window[a] == 1 and strides[a] == 1 and tuple(pads[a]) == (0, 0)
    ]
    added = max(2 - len(still), 0)
    front = [still[0], still[-1]] if not added else still
    spatial = [a for a in range(rank) if a not in front]
    if not 1 <= len(spatial) <= 3:
        raise step.unmapped(f"windows along {len(spatial)} axes; ONNX has them along up to three")
    order = (*front, *spatial)
    name = graph.named(x, order)
    shape = [x.shape[a] for a in order]
    if added:
        name = graph.reshaped(name, shape, [1] * added + shape)
    sizes = [int(window[a]) for a in spatial]
    fill = graph.constant(_neutral(step.name, x.dtype))
    if step.name == "reduce_window_min":
        (name,) = graph.node("Neg", [name])
    name, own = _open_or_negative(graph, name, [pads[a] for a in spatial], fill)
    attributes: dict[str, Any] = {
        "kernel_shape": sizes,
        "strides": [int(strides[a]) for a in spatial],
        "pads": _flat(own),
    }
    if any(dilation[a] != 1 for a in spatial):
        attributes["dilations"] = [int(dilation[a]) for a in spatial]
    if step.name == "reduce_window_sum":
        if "dilations" in attributes and step.opset < 19:
            raise step.unmapped("a mean of points that are apart needs opset 19")
        (name,) = graph.node("AveragePool", [name], count_include_pad=1, **attributes)
        (name,) = graph.node("Mul", [name, graph.constant(np.asarray(math.prod(sizes), x.dtype))])
    else:
        (name,) = graph.node("MaxPool", [name], **attributes)
        if step.name == "reduce_window_min":
            (name,) = graph.node("Neg", [name])
    if added:
        made = [step.outputs[0].shape[a] for a in order]
        name = graph.reshaped(name, [1] * added + made, made)
    return [step.made(name, order)]


def _neutral(name: str, dtype: np.dtype) -> np.ndarray:
    if name == "reduce_window_sum":
        return np.zeros((), dtype)
    if np.issubdtype(dtype, np.integer):
        return np.asarray(np.iinfo(dtype).min, dtype)
    return np.asarray(-np.inf, dtype)


# What ONNX calls the ways to resize, such that it does what `jax.image.resize` does.
_RESIZES: dict[str, dict[str, Any]] = {
    "nearest": {"mode": "nearest", "nearest_mode": "round_prefer_ceil"},
    "linear": {"mode": "linear"},
    "cubic": {"mode": "cubic", "cubic_coeff_a": -0.5, "exclude_outside": 1},
}


@rule("jit", "pjit", lazy=True)
def _resize(step: Step) -> Any:
    """Recognise `jax.image.resize`: what it would trace to is what is there."""
    if step.params.get("name") != "_resize" or len(step.inputs) != 1:
        return NotImplemented
    x, shape, graph = step.inputs[0], tuple(step.outputs[0].shape), step.graph
    changed = [a for a, (n, m) in enumerate(zip(x.shape, shape, strict=True)) if n != m]
    shrinks = any(not _at_least(shape[a], x.shape[a]) for a in changed)
    still = [a for a in range(len(shape)) if a not in changed]
    if x.value is not None or len(still) < 2 or not changed:
        return NotImplemented
    text = str(step.params["jaxpr"])
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)  # type: ignore[arg-type]
    for method, antialias in itertools.product(_RESIZES, (True, False)):
        if shrinks and (method != "nearest" and antialias):
            continue  # ONNX weighs borders otherwise
        resize = functools.partial(
            jax.image.resize, shape=shape, method=method, antialias=antialias
        )
        try:
            made = jax.make_jaxpr(resize)(like)
        except Exception:  # of JAX, where this method asks more of the sizes that are open
            continue
        (eqn,) = made.jaxpr.eqns if len(made.jaxpr.eqns) == 1 else (None,)
        if eqn is None or str(eqn.params.get("jaxpr")) != text:
            continue
        order = (
            still[0],
            still[-1],
            *(a for a in range(len(shape)) if a not in (still[0], still[-1])),
        )
        name = graph.named(x, order)
        scales = [_ratio(shape[a], x.shape[a]) for a in order]
        sizes = ["", graph.constant(np.array(scales, np.float32))]
        if None in scales:
            sizes = ["", "", graph.shape([shape[a] for a in order])]
        (name,) = graph.node(
            "Resize",
            [name, *sizes],
            coordinate_transformation_mode="half_pixel",
            **_RESIZES[method],
        )
        return [step.made(name, order)]
    return NotImplemented


def _at_least(size: Size, other: Size) -> bool:
    try:
        return bool(size >= other)
    except Exception:  # of JAX, where it depends on the sizes that are open
        return False


def _ratio(size: Size, other: Size) -> float | None:
    """Return a whole ratio of two sizes; None if there is none, or nobody knows."""
    if size == other:
        return 1.0
    if not is_open(size) and not is_open(other):
        return size / other if size % other == 0 else None
    return next((float(k) for k in range(2, 17) if size == k * other), None)
