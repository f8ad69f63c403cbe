"""Convolutions of a traced model joined with what stands around them, for the compiled kernels.

What is looked for are operations of ``lax``, in `canonical_forms`: a pointwise convolution and the
depthwise ones of its channels, products with constant matrices, biases, sums with other branches,
rectifications, poolings, interpolations. Everything else is carried out as it was traced.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from falcon_jax.frameworks.tracing import inner_jaxprs, scan_parts
from falcon_jax.native.kernels import AlongAxis, MaxPool, Step, pack_rows, run
from falcon_jax.native.program import (
    CONVOLUTION,
    Operation,
    Program,
    Value,
    convolves_inside,
    folded,
    read_program,
)
from falcon_jax.ops.choice import canonical_forms
from falcon_jax.ops.convolution import conv_on_small_maps
from falcon_jax.ops.depthwise import depthwise_conv
from falcon_jax.ops.separable import pointwise_conv

# Input channels that take the time of a depthwise step of nine taps: by vectors, and by tiles.
_DEPTHWISE, _DEPTHWISE_TILED = 16, 96
_MUCH = 2**18  # mult-adds of a product that takes longer than calling a kernel
_FEW = 8  # entries of an axis that an interpolation takes together


def with_native_steps(forward: Callable[..., Any], *, bfloat16: bool = False) -> Callable[..., Any]:
    """Return the function whose convolutions are carried out by the compiled kernels.

    Args:
        forward: a pure function of arrays; weights are its constants.
        bfloat16: whether what is multiplied is rounded, as `Step` says.
    """

    def optimized(*arrays: Any) -> Any:
        shapes = [jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)) for a in arrays]
        if not all(isinstance(n, int) for a in shapes for n in a.shape):
            return forward(*arrays)
        with canonical_forms():
            jaxpr, structure = jax.make_jaxpr(forward, return_shape=True)(*shapes)
        if any(isinstance(constant, Tracer) for constant in jaxpr.consts):
            return forward(*arrays)  # weights that an outer trace computes
        if jaxpr.effects or convolves_inside(jaxpr.jaxpr):
            return forward(*arrays)
        program = folded(read_program(jaxpr))
        outputs = _Runner(program, bfloat16).run(arrays)
        return jax.tree.unflatten(jax.tree.structure(structure), outputs)

    return optimized


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joined:
    """A convolution, and what was found to follow it; not carried out yet.

    Attributes:
        x: its input.
        step: the kernel's.
        weights: of the pointwise or standard step, shape ``(depth, k, N)``; None if depthwise.
        depthwise: shape ``(*kernel_size, k, N)``; None if standard.
        bias: N entries.
        residual: what is added.
        shape: of the output, as the program has it.
        small: the input's shape as the kernel takes it.
    """

    x: Value
    step: Step
    weights: np.ndarray | None = None
    depthwise: np.ndarray | None = None
    bias: np.ndarray | None = None
    residual: Value | None = None
    shape: tuple[int, ...]
    small: tuple[int, ...]

    @property
    def is_linear(self) -> bool:
        """Return whether nothing follows the convolution yet."""
        return self.bias is None and self.residual is None and not self.is_finished

    @property
    def is_finished(self) -> bool:
        """Return whether nothing can be added any more."""
        return self.step.relu or self.step.pool

    @property
    def is_better_dense(self) -> bool:
        """Return whether there are so many terms that one standard convolution takes less time."""
        step, taps = self.step, math.prod(self.step.kernel_size)
        depthwise = _DEPTHWISE_TILED if step.bfloat16 else _DEPTHWISE
        separate = step.terms * (step.in_features + depthwise)
        return step.kind == "pointwise_depthwise" and separate > taps * step.in_features

    @property
    def can_pool(self) -> bool:
        """Return whether a kernel that carries it out can pool its answers, too."""
        return self.step.kind != "standard" and not self.step.pool and not self.is_better_dense

    def dense(self) -> "Joined":
        """Return it as a standard convolution."""
        assert self.weights is not None and self.depthwise is not None
        kernel = np.einsum("ijkn,mkn->ijmn", self.depthwise, self.weights)
        return dataclasses.replace(
            self,
            step=dataclasses.replace(self.step, kind="standard", terms=1),
            weights=kernel.reshape(-1, 1, kernel.shape[-1]),
            depthwise=None,
        )

    def scaled(self, gain: np.ndarray) -> "Joined":
        """Return it with outputs multiplied by a gain per channel."""
        last = "weights" if self.depthwise is None else "depthwise"
        bias = None if self.bias is None else self.bias * gain
        changed: dict[str, Any] = {last: getattr(self, last) * gain}
        return dataclasses.replace(self, bias=bias, **changed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resampled:
    """An array whose axes are multiplied by constant matrices of few entries a row, and permuted.

    Attributes:
        x: the array.
        matrices: axis of x and matrix (out, in).
        order: axes of x in the order of the result's.
    """

    x: Value
    matrices: tuple[tuple[int, np.ndarray], ...]
    order: tuple[int, ...]


def _few_entries(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return weights and places of a matrix's entries that are not zero, row by row."""
    most = max(int(np.count_nonzero(matrix, axis=1).max()), 1)
    places = np.argsort(matrix == 0, axis=1, kind="stable")[:, :most]
    return np.take_along_axis(matrix, places, axis=1), places.astype(np.int32)


class _Runner:
    """Carries out a program; convolutions wait for what follows them."""

    def __init__(self, program: Program, bfloat16: bool):
        self.program = program
        self.bfloat16 = bfloat16
        self.made: dict[Value, Any] = {}
        self.waiting: dict[Value, Joined] = {}
        self.repeated: dict[Value, np.ndarray] = {}  # per channel, or one number
        self.resampled: dict[Value, Resampled] = {}
        self.parts: dict[Value, tuple[Value, ...]] = {}  # side by side, not put together yet

    def pointwise(self, m: int, n: int) -> Step:
        """Return the step of a product with a matrix (m, n)."""
        return Step(
            kind="standard",
            kernel_size=(1, 1),
            in_features=m,
            out_features=n,
            bfloat16=self.bfloat16,
        )

    def consumer_of(self, value: Value) -> str:
        """Return the name of the operation that uses a value, if there is only one."""
        used = [o.primitive.name for o in self.program.operations if value in o.inputs]
        return used[0] if len(used) == 1 else ""

    def run(self, arrays: Sequence[Any]) -> list[Any]:
        self.made.update(zip(self.program.inputs, arrays, strict=True))
        for operation in self.program.operations:
            rule = _RULES.get(operation.primitive.name)
            if rule is not None and rule(self, operation):
                continue
            outputs = self.carried_out(operation)
            self.made.update(zip(operation.outputs, outputs, strict=True))
        return [self.array(y) for y in self.program.outputs]

    def carried_out(self, operation: Operation) -> list[Any]:
        inputs = [self.array(x) for x in operation.inputs]
        special = _INSTEAD.get(operation.primitive.name)
        y = special(operation, *inputs) if special is not None else None
        return operation.carry_out(inputs) if y is None else [y]

    def array(self, value: Value) -> Any:
        """Return the array that a value is, made now if it was waiting."""
        if value.constant is not None:
            return value.constant
        if value in self.made:
            return self.made[value]
        if value in self.waiting:
            made = self._make(self.waiting[value])
        elif value in self.resampled:
            made = self._interpolate(self.resampled[value])
        else:
            made = jnp.concatenate([self.array(part) for part in self.parts[value]], axis=-1)
        self.made[value] = made
        return made

    def _interpolate(self, resampled: "Resampled") -> Any:
        y = self.array(resampled.x)
        for axis, matrix in resampled.matrices:
            shape = y.shape
            y = y.reshape(math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]))
            y = run(AlongAxis(size=matrix.shape[0]), y, *_few_entries(matrix))
            y = y.reshape(*shape[:axis], matrix.shape[0], *shape[axis + 1 :])
        order = resampled.order
        return y if order == tuple(range(len(order))) else jnp.transpose(y, order)

    def _make(self, joined: Joined) -> Any:
        joined = joined.dense() if joined.is_better_dense else joined
        step = joined.step
        none = np.zeros((0,), np.float32)
        inner = none
        if step.kind == "pointwise_depthwise" and joined.x.uses == 1 and joined.x in self.parts:
            joined, inner = self._of_parts(joined)
            step = joined.step
        bias = np.zeros(step.out_features, np.float32) if joined.bias is None else joined.bias
        residual = None if joined.residual is None else self.array(joined.residual)
        small = step.convolved(joined.small)
        y = run(
            step,
            self.array(joined.x).reshape(joined.small),
            none if joined.weights is None else step.packed(joined.weights),
            none if joined.depthwise is None else pack_rows(joined.depthwise),
            pack_rows(bias),
            none if residual is None else residual.reshape(small),
            inner,
        )
        return y.reshape(joined.shape)

    def _of_parts(self, joined: Joined) -> tuple[Joined, Any]:
        """Return the step of the last of arrays side by side, and the products of the others."""
        assert joined.weights is not None
        step, (m, k, n) = joined.step, joined.weights.shape
        product = self.pointwise(m, k * n)
        last = _last_of_parts(
            self,
            Joined(
                x=joined.x,
                step=product,
                weights=joined.weights.reshape(m, 1, k * n),
                shape=(*joined.small[:-1], k * n),
                small=joined.small,
            ),
        )
        assert last.residual is not None and last.weights is not None
        inner = self.array(last.residual)
        part = dataclasses.replace(
            joined,
            x=last.x,
            step=dataclasses.replace(step, in_features=last.step.in_features),
            weights=last.weights.reshape(-1, k, n),
            small=last.small,
        )
        return part, inner.reshape(*last.small[:-1], k * n)

    def taken(self, value: Value) -> Joined | None:
        """Return a convolution that waits, if this is its only use."""
        return self.waiting.get(value) if value.uses == 1 else None

    def per_channel(self, value: Value, channels: int) -> np.ndarray | None:
        """Return a constant that differs between channels only; one entry for each of them."""
        if value in self.repeated:
            row = self.repeated[value]
        elif value.constant is None:
            return None
        else:
            row = np.asarray(value.constant)
            if row.size != 1 and (row.size, row.shape[-1]) != (channels, channels):
                return None
            row = row.reshape(-1)
        return np.broadcast_to(row, (channels,)).astype(np.float32)


def _convolution(runner: _Runner, operation: Operation) -> bool:
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


def _as_step(runner: _Runner, operation: Operation) -> Joined | None:
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
        or tuple(layout.rhs_spec) != (axes + 1, axes, *range(axes))
        or params["batch_group_count"] != 1
        or max(params["lhs_dilation"]) > 1
        or min(min(pair) for pair in params["padding"]) < 0
        or 0 in (*x.shape, *kernel.shape, *y.shape)
        or groups not in (1, x.shape[-1])
        or (groups > 1 and kernel.shape[-1] != groups)
    ):
        return None
    array = np.asarray(kernel.constant)
    m, n = x.shape[-1], kernel.shape[-1]
    front = (1,) * (2 - axes)
    size: Any = (*front, *kernel.shape[:axes])
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


def _product(runner: _Runner, operation: Operation) -> bool:
    """Take a product with a constant matrix as a pointwise convolution."""
    x, matrix = operation.inputs
    (y,) = operation.outputs
    (of_x, of_matrix), batch = operation.params["dimension_numbers"]
    if _interpolation(runner, operation):
        return True
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


def _interpolation(runner: _Runner, operation: Operation) -> bool:
    """Take a product of one axis that is not the last with a matrix of few entries a row."""
    (of_left, of_right), batch = operation.params["dimension_numbers"]
    left, right = operation.inputs
    (y,) = operation.outputs
    first = left.constant is not None  # then the matrix's axis comes first in the result
    x, matrix = (right, left) if first else (left, right)
    of_x, of_matrix = (of_right, of_left) if first else (of_left, of_right)
    if (
        matrix.constant is None
        or x.constant is not None
        or len(matrix.shape) != 2
        or len(x.shape) != 4
        or len(of_x) != 1
        or any(map(len, batch))
        or not all(a.dtype == jnp.float32 for a in (x, matrix, y))
    ):
        return False
    known = runner.resampled.get(x) if x.uses == 1 else None
    known = known or Resampled(x=x, matrices=(), order=(0, 1, 2, 3))
    axis = known.order[of_x[0]]
    array = np.asarray(matrix.constant)
    array = array.T if of_matrix[0] == 0 else array
    few = np.count_nonzero(array, axis=1).max(initial=0) <= _FEW
    if axis in (0, 3) or not few or array.size == 0:
        return False
    rest = tuple(a for i, a in enumerate(known.order) if i != of_x[0])
    runner.resampled[y] = Resampled(
        x=known.x,
        matrices=(*known.matrices, (axis, array)),
        order=(axis, *rest) if first else (*rest, axis),
    )
    return True


def _transpose(runner: _Runner, operation: Operation) -> bool:
    (x,) = operation.inputs
    known = runner.resampled.get(x) if x.uses == 1 else None
    if known is None:
        return False
    order = tuple(known.order[i] for i in operation.params["permutation"])
    runner.resampled[operation.outputs[0]] = dataclasses.replace(known, order=order)
    return True


def _concatenate(runner: _Runner, operation: Operation) -> bool:
    """Let arrays that are put side by side by channels wait for a convolution."""
    (y,) = operation.outputs
    float32 = all(a.dtype == jnp.float32 and a.constant is None for a in operation.inputs)
    if operation.params["dimension"] != len(y.shape) - 1 or len(y.shape) != 4 or not float32:
        return False
    if len(operation.inputs) < 2:
        return False
    runner.parts[y] = operation.inputs
    return True


def _sum_of_parts(runner: _Runner, joined: Joined, y: Value) -> bool:
    """Take a convolution of arrays side by side as a sum of convolutions."""
    if joined.step.kind != "standard" or joined.x.uses > 1 or joined.x not in runner.parts:
        return False
    pointwise = joined.step.kernel_size == (1, 1)
    if pointwise and runner.consumer_of(y) in ("split", CONVOLUTION):  # depthwise ones, perhaps
        return False
    runner.waiting[y] = _last_of_parts(runner, joined)
    return True


def _last_of_parts(runner: _Runner, joined: Joined) -> Joined:
    """Return the convolution of the last array, the others' sum what is added to it.

    A pointwise one of an interpolated array stands before the interpolation, where there are fewer
    points.
    """
    assert joined.weights is not None
    step = joined.step
    pointwise = step.kernel_size == step.strides == (1, 1) and not any(map(any, step.padding))
    kernel = joined.weights.reshape(-1, joined.x.shape[-1], step.out_features)  # by tap
    start, pieces = 0, []
    for part in runner.parts[joined.x]:
        stop = start + part.shape[-1]
        pieces.append((part, kernel[:, start:stop].reshape(-1, 1, step.out_features)))
        start = stop
    pieces.sort(key=lambda piece: piece[0] not in runner.resampled)
    residual: Value | None = None
    for place, (part, weights) in enumerate(pieces, start=1):
        known = runner.resampled.get(part) if part.uses == 1 and pointwise else None
        commutes = known is not None and residual is None and place < len(pieces)
        commutes = commutes and known is not None and known.order == (0, 1, 2, 3)
        source = known.x if known is not None and commutes else part
        small = (*joined.small[:1], *source.shape[1:-1], part.shape[-1])
        shape = joined.shape if not commutes else (*source.shape[:-1], step.out_features)
        output = Value(shape, joined.x.dtype, uses=1)
        piece = dataclasses.replace(
            joined,
            x=source,
            step=dataclasses.replace(step, in_features=part.shape[-1]),
            weights=weights,
            residual=residual,
            shape=shape,
            small=small,
        )
        if place == len(pieces):
            return piece
        runner.waiting[output] = piece
        residual = output
        if known is not None and commutes:
            residual = Value(joined.shape, output.dtype, uses=1)
            runner.resampled[residual] = dataclasses.replace(known, x=output)
    raise AssertionError("there are no parts")


def _loop(runner: _Runner, operation: Operation) -> bool:
    """Carry out a loop's body as a program, what the loop does not change being its constants."""
    params = operation.params
    fixed, carried = scan_parts(operation.inputs, operation.outputs, *inner_jaxprs(params["jaxpr"]))
    program = read_program(params["jaxpr"])
    for inside, outside in zip(program.inputs[:fixed], operation.inputs[:fixed], strict=True):
        inside.constant = outside.constant
    program = folded(program)
    if not any(_is_worth_a_kernel(inner) for inner in program.operations):
        return False
    arrays = [runner.array(x) for x in operation.inputs]
    around, states, rows = arrays[:fixed], arrays[fixed:][:carried], arrays[fixed:][carried:]

    def body(states: list[Any], row: list[Any]) -> tuple[list[Any], list[Any]]:
        outputs = _Runner(program, runner.bfloat16).run([*around, *states, *row])
        return outputs[:carried], outputs[carried:]

    how = {name: params[name] for name in ("length", "reverse", "unroll")}
    states, rows = jax.lax.scan(body, states, rows, **how)
    runner.made.update(zip(operation.outputs, [*states, *rows], strict=True))
    return True


def _is_worth_a_kernel(operation: Operation) -> bool:
    """Return whether it is a convolution, or a product with weights that is not small."""
    if operation.primitive.name == CONVOLUTION:
        return True
    if operation.primitive.name != "dot_general":
        return False
    x, matrix = operation.inputs
    (y,) = operation.outputs
    return matrix.constant is not None and math.prod(y.shape) * x.shape[-1] >= _MUCH


def _max_pool(runner: _Runner, operation: Operation) -> bool:
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
    halves = pool == MaxPool(window=(2, 2), strides=(2, 2))
    if halves and joined is not None and joined.shape == x.shape and joined.can_pool:
        step = dataclasses.replace(joined.step, pool=True)
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


def _split(runner: _Runner, operation: Operation) -> bool:
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


def _add(runner: _Runner, operation: Operation) -> bool:
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


def _scale(
    runner: _Runner, operation: Operation, change: Callable[[np.ndarray], np.ndarray], first: bool
) -> bool:
    """Take a factor per channel into the weights.

    Args:
        runner: of the program.
        operation: of two values.
        change: the factor, of the constant.
        first: whether the convolution has to be the first value.
    """
    (y,) = operation.outputs
    pairs = (operation.inputs, operation.inputs[::-1])
    for x, other in pairs[:1] if first else pairs:
        joined = runner.taken(x)
        if (
            joined is None
            or joined.is_finished
            or joined.residual is not None
            or x.shape != y.shape
        ):
            continue
        row = runner.per_channel(other, joined.step.out_features)
        if row is not None:
            runner.waiting[y] = joined.scaled(change(row))
            return True
    return False


def _subtract(runner: _Runner, operation: Operation) -> bool:
    x, other = operation.inputs
    (y,) = operation.outputs
    joined = runner.taken(x)
    if joined is None or joined.is_finished or joined.residual is not None or x.shape != y.shape:
        return False
    row = runner.per_channel(other, joined.step.out_features)
    if row is None:
        return False
    bias = -row if joined.bias is None else joined.bias - row
    runner.waiting[y] = dataclasses.replace(joined, bias=bias)
    return True


def _maximum(runner: _Runner, operation: Operation) -> bool:
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


def _repeat(runner: _Runner, operation: Operation) -> bool:
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


_RULES: dict[str, Callable[[_Runner, Operation], bool]] = {
    CONVOLUTION: _convolution,
    "dot_general": _product,
    "split": _split,
    "add": _add,
    "sub": _subtract,
    "mul": lambda runner, operation: _scale(runner, operation, lambda row: row, False),
    "div": lambda runner, operation: _scale(runner, operation, lambda row: 1 / row, True),
    "max": _maximum,
    "broadcast_in_dim": _repeat,
    "transpose": _transpose,
    "concatenate": _concatenate,
    "reduce_window_max": _max_pool,
    "scan": _loop,
}


def _other_convolution(operation: Operation, x: Array, kernel: Array) -> Array | None:
    """Return a convolution that the kernels do not know, in the form that is fast in JAX."""
    params = operation.params
    groups, axes = params["feature_group_count"], x.ndim - 2
    last = (0, axes + 1, *range(1, axes + 1))
    layout = params["dimension_numbers"]
    plain = tuple(layout.lhs_spec) == tuple(layout.out_spec) == last
    plain = plain and tuple(layout.rhs_spec) == (axes + 1, axes, *range(axes))
    if not plain or params["batch_group_count"] != 1 or params["preferred_element_type"]:
        return None
    geometry = {
        "strides": params["window_strides"],
        "padding": params["padding"],
        "input_dilation": params["lhs_dilation"],
        "kernel_dilation": params["rhs_dilation"],
    }
    if groups == x.shape[-1] == kernel.shape[-1] and groups > 1:
        return depthwise_conv(x, kernel[..., 0, :], **geometry)
    moved = max(params["window_strides"]) > 1 or any(map(any, params["padding"]))
    if math.prod(kernel.shape[:-2]) == 1 and not moved and max(params["lhs_dilation"]) == 1:
        matrix = kernel.reshape(kernel.shape[-2:])
        return pointwise_conv(x, matrix, feature_group_count=groups, precision=params["precision"])
    return conv_on_small_maps(
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


_INSTEAD: dict[str, Callable[..., Any]] = {CONVOLUTION: _other_convolution}
