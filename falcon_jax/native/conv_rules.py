"""Convolutions and products of a program, and what stands around them, as steps of the kernels."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from falcon_jax.native.kernels import MaxPool, Step, run
from falcon_jax.native.pending import Joined, Runner
from falcon_jax.native.program import CONVOLUTION, Operation, Value
from falcon_jax.ops.convolution import conv_on_small_maps
from falcon_jax.ops.depthwise import depthwise_conv
from falcon_jax.ops.separable import pointwise_conv


def convolution(runner: Runner, operation: Operation) -> bool:
    """Leave a convolution that the kernels know, with a pointwise one before it if there is one."""
    x = operation.inputs[0]
    (y,) = operation.outputs
    joined = _as_step(runner, operation)
    if joined is None:
        return False
    pointwise = runner.taken(x)
    if pointwise is not None and joined.step.kind == "depthwise":
        both = _followed_by(pointwise, joined)
        if both is not None:
            runner.waiting[y] = both
            return True
    if not _sum_of_parts(runner, joined, y):
        runner.waiting[y] = joined
    return True


def _followed_by(pointwise: Joined, depthwise: Joined) -> Joined | None:
    """Return the two steps as one, if nothing stands between them and padding is of zeros."""
    one = pointwise.step
    if not (pointwise.is_linear and one.kind == "standard" and one.kernel_size == (1, 1)):
        return None
    if one.strides != (1, 1) or any(one.padding[0] + one.padding[1]):
        return None
    step = dataclasses.replace(
        depthwise.step, kind="pointwise_depthwise", in_features=one.in_features
    )
    return dataclasses.replace(
        depthwise, x=pointwise.x, step=step, weights=pointwise.weights, small=pointwise.small
    )


def _as_step(runner: Runner, operation: Operation) -> Joined | None:
    """Return a convolution as the kernels know it, or None."""
    x, kernel = operation.inputs
    (y,) = operation.outputs
    params = operation.params
    axes = len(x.shape) - 2
    last = (0, axes + 1, *range(1, axes + 1))
    layout = params["dimension_numbers"]
    groups = params["feature_group_count"]
    if (
        axes not in (1, 2)
        or not all(a.dtype == jnp.float32 for a in (x, kernel, y))
        or kernel.constant is None
        or tuple(layout.lhs_spec) != last
        or tuple(layout.out_spec) != last
        or params["batch_group_count"] != 1
        or max(params["lhs_dilation"]) > 1
        or min(min(pair) for pair in params["padding"]) < 0
        or 0 in (*x.shape, *kernel.shape, *y.shape)
        or groups not in (1, x.shape[-1])
        or (groups > 1 and y.shape[-1] != groups)
    ):
        return None
    # Of a gradient's convolution, inputs and outputs have changed places.
    outputs, inputs, *places = layout.rhs_spec
    array = np.asarray(kernel.constant).transpose(*places, inputs, outputs)
    m, n = x.shape[-1], array.shape[-1]
    front = (1,) * (2 - axes)
    size: Any = (*front, *array.shape[:axes])
    depthwise = groups > 1
    step = Step(
        kind="depthwise" if depthwise else "standard",
        kernel_size=size,
        in_features=m,
        out_features=n,
        strides=(*front, *params["window_strides"]),  # type: ignore[arg-type]
        padding=(*(((0, 0),) * len(front)), *map(tuple, params["padding"])),  # type: ignore[arg-type]
        dilation=(*front, *params["rhs_dilation"]),  # type: ignore[arg-type]
        bfloat16=runner.bfloat16,
    )
    return Joined(
        x=x,
        step=step,
        weights=None if depthwise else array.reshape(-1, 1, n),
        depthwise=array.reshape(*size, 1, n) if depthwise else None,
        shape=y.shape,
        small=(x.shape[0], *front, *x.shape[1:]),
    )


def product(runner: Runner, operation: Operation) -> bool:
    """Take a product with a constant matrix as a pointwise convolution."""
    x, matrix = operation.inputs
    (y,) = operation.outputs
    (of_x, of_matrix), batch = operation.params["dimension_numbers"]
    if (
        not all(a.dtype == jnp.float32 for a in (x, matrix, y))
        or matrix.constant is None
        or len(matrix.shape) != 2
        or len(x.shape) < 2
        or tuple(of_x) != (len(x.shape) - 1,)
        or any(map(len, batch))
        or 0 in (*x.shape, *matrix.shape)
    ):
        return False
    array = np.asarray(matrix.constant)
    array = array if tuple(of_matrix) == (0,) else array.T
    step = runner.pointwise(*array.shape)
    rows = math.prod(x.shape[:-1])
    runner.waiting[y] = Joined(
        x=x, step=step, weights=array[:, None], shape=y.shape, small=(1, 1, rows, x.shape[-1])
    )
    return True


def _sum_of_parts(runner: Runner, joined: Joined, y: Value) -> bool:
    """Take a convolution of arrays side by side as a sum of convolutions."""
    if joined.step.kind != "standard" or joined.x.uses > 1 or joined.x not in runner.parts:
        return False
    pointwise = joined.step.kernel_size == (1, 1)
    if pointwise and runner.consumer_of(y) in ("split", CONVOLUTION):  # depthwise ones, perhaps
        return False
    runner.waiting[y] = runner.last_of_parts(joined)
    return True


def max_pool(runner: Runner, operation: Operation) -> bool:
    """Take a pooling to the convolution before it, or carry it out."""
    x = operation.inputs[0]
    (y,) = operation.outputs
    params = operation.params
    dilated = max((*params["base_dilation"], *params["window_dilation"])) > 1
    ends = [params[name][i] for name in ("window_dimensions", "window_strides") for i in (0, -1)]
    edges = [params["padding"][i] for i in (0, -1)]
    if len(x.shape) != 4 or x.dtype != jnp.float32 or dilated or max(ends) > 1:
        return False
    if any(map(any, edges)) or 0 in (*x.shape, *y.shape):
        return False
    (_, *window, _), (_, *strides, _) = params["window_dimensions"], params["window_strides"]
    pool = MaxPool(
        window=tuple(window),
        strides=tuple(strides),
        padding=(tuple(params["padding"][1]), tuple(params["padding"][2])),
    )
    joined = runner.taken(x)
    convolved = joined is not None and joined.shape == joined.step.convolved(joined.small)
    if joined is not None and convolved and joined.can_pool(pool):
        step = dataclasses.replace(joined.step, pool=pool)
        runner.waiting[y] = dataclasses.replace(joined, step=step, shape=y.shape)
        return True
    runner.made[y] = run(pool, runner.array(x))
    return True


def _part(joined: Joined, start: int, stop: int, shape: tuple[int, ...]) -> Joined:
    assert joined.weights is not None
    step = dataclasses.replace(joined.step, out_features=stop - start)
    return dataclasses.replace(
        joined, step=step, weights=joined.weights[..., start:stop], shape=shape
    )


def split(runner: Runner, operation: Operation) -> bool:
    """Take the parts of a product's channels as products."""
    (x,) = operation.inputs
    joined = runner.taken(x)
    if joined is None or not joined.is_linear or joined.step.kind != "standard":
        return False
    if operation.params["axis"] != len(x.shape) - 1:
        return False
    start = 0
    for y in operation.outputs:
        stop = start + y.shape[-1]
        runner.waiting[y] = _part(joined, start, stop, y.shape)
        start = stop
    return True


def add(runner: Runner, operation: Operation) -> bool:
    """Take a bias, another term or another branch to a convolution."""
    (y,) = operation.outputs
    for x, other in (operation.inputs, operation.inputs[::-1]):
        joined = runner.taken(x)
        if joined is None or joined.is_finished or x.shape != y.shape:
            continue
        row = runner.per_channel(other, joined.step.out_features)
        if row is not None:
            bias = row if joined.bias is None else joined.bias + row
            runner.waiting[y] = dataclasses.replace(joined, bias=bias)
            return True
        terms = runner.taken(other)
        if terms is not None and other is not x:
            both = _sum_of_terms(joined, terms)
            if both is not None:
                runner.waiting[y] = both
                return True
        if joined.residual is None and other.shape == y.shape and other.dtype == jnp.float32:
            if other in runner.repeated:
                continue
            runner.array(other)
            runner.waiting[y] = dataclasses.replace(joined, residual=other)
            return True
    return False


def _sum_of_terms(one: Joined, other: Joined) -> Joined | None:
    """Return the sum of two pointwise-then-depthwise convolutions of one input as one of rank k."""
    if "pointwise_depthwise" not in (one.step.kind, other.step.kind):
        return None
    same = dataclasses.replace(one.step, terms=1) == dataclasses.replace(other.step, terms=1)
    if not (same and one.x is other.x and one.is_linear and other.is_linear):
        return None
    assert one.weights is not None and other.weights is not None
    assert one.depthwise is not None and other.depthwise is not None
    return dataclasses.replace(
        one,
        step=dataclasses.replace(one.step, terms=one.step.terms + other.step.terms),
        weights=np.concatenate([one.weights, other.weights], axis=1),
        depthwise=np.concatenate([one.depthwise, other.depthwise], axis=-2),
    )


def multiply(runner: Runner, operation: Operation) -> bool:
    """Take a factor per channel into the weights."""
    x, other = operation.inputs
    return _scaled(runner, operation, x, other) or _scaled(runner, operation, other, x)


def divide(runner: Runner, operation: Operation) -> bool:
    """Take a divisor per channel into the weights."""
    x, other = operation.inputs
    return _scaled(runner, operation, x, other, divided=True)


def _scaled(
    runner: Runner, operation: Operation, x: Value, other: Value, *, divided: bool = False
) -> bool:
    known = _with_row(runner, operation, x, other)
    if known is None:
        return False
    joined, row = known
    runner.waiting[operation.outputs[0]] = joined.scaled(1 / row if divided else row)
    return True


def subtract(runner: Runner, operation: Operation) -> bool:
    """Take a bias to a convolution."""
    known = _with_row(runner, operation, *operation.inputs)
    if known is None:
        return False
    joined, row = known
    bias = -row if joined.bias is None else joined.bias - row
    runner.waiting[operation.outputs[0]] = dataclasses.replace(joined, bias=bias)
    return True


def _with_row(
    runner: Runner, operation: Operation, x: Value, other: Value
) -> tuple[Joined, np.ndarray] | None:
    """Return a convolution without a residual, and a constant per channel, if the two are these."""
    joined = runner.taken(x)
    if joined is None or joined.is_finished or joined.residual is not None:
        return None
    row = runner.per_channel(other, joined.step.out_features)
    return None if row is None or x.shape != operation.outputs[0].shape else (joined, row)


def maximum(runner: Runner, operation: Operation) -> bool:
    """Take a rectification to a convolution."""
    (y,) = operation.outputs
    for x, other in (operation.inputs, operation.inputs[::-1]):
        joined = runner.taken(x)
        if joined is None or x.shape != y.shape:
            continue
        row = runner.per_channel(other, joined.step.out_features)
        if row is not None and not row.any():
            step = dataclasses.replace(joined.step, relu=True)
            runner.waiting[y] = dataclasses.replace(joined, step=step)
            return True
    return False


def repeat(runner: Runner, operation: Operation) -> bool:
    """Remember a constant that is repeated over all but channels; it is made when it is used."""
    x = operation.inputs[0]
    (y,) = operation.outputs
    if x.constant is None or x.dtype != jnp.float32:
        return False
    row = np.asarray(x.constant)
    axes = operation.params["broadcast_dimensions"]
    varies = [axis for axis, n in zip(axes, row.shape, strict=True) if n > 1]
    if varies not in ([], [len(y.shape) - 1]):
        return False
    runner.repeated[y] = row.reshape(-1)
    (runner.made[y],) = operation.carry_out([row])
    return True


def other_convolution(runner: Runner, operation: Operation) -> bool:
    """Carry out a convolution that the kernels do not know in the form that is fast in JAX."""
    params = operation.params
    x, kernel = (runner.array(value) for value in operation.inputs)
    groups, axes = params["feature_group_count"], x.ndim - 2
    last = (0, axes + 1, *range(1, axes + 1))
    layout = params["dimension_numbers"]
    plain = tuple(layout.lhs_spec) == tuple(layout.out_spec) == last
    plain = plain and tuple(layout.rhs_spec) == (axes + 1, axes, *range(axes))
    if not plain or params["batch_group_count"] != 1 or params["preferred_element_type"]:
        return False
    geometry = {
        "strides": params["window_strides"],
        "padding": params["padding"],
        "input_dilation": params["lhs_dilation"],
        "kernel_dilation": params["rhs_dilation"],
    }
    moved = max(params["window_strides"]) > 1 or any(map(any, params["padding"]))
    if groups == x.shape[-1] == kernel.shape[-1] and groups > 1:
        y = depthwise_conv(x, kernel[..., 0, :], **geometry)
    elif math.prod(kernel.shape[:-2]) == 1 and not moved and max(params["lhs_dilation"]) == 1:
        matrix = kernel.reshape(kernel.shape[-2:])
        y = pointwise_conv(x, matrix, feature_group_count=groups, precision=params["precision"])
    else:
        y = conv_on_small_maps(
            x,
            kernel,
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            feature_group_count=groups,
            dimension_numbers=layout,
            precision=params["precision"],
        )
    runner.made[operation.outputs[0]] = y
    return True
