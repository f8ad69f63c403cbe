"""What a program leaves for later: convolutions, interpolations, arrays side by side.

They wait for what follows them, until an array is wanted. Rules say what may be left.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from falcon_jax.native.kernels import HALVES, AlongAxis, MaxPool, Step, pack_rows, run
from falcon_jax.native.program import Operation, Program, Value

# Input channels that take the time of a depthwise step of nine taps: by vectors, and by tiles.
_DEPTHWISE, _DEPTHWISE_TILED = 16, 96


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
        return self.step.relu or self.step.pool is not None

    @property
    def is_better_dense(self) -> bool:
        """Return whether there are so many terms that one standard convolution takes less time."""
        step, taps = self.step, math.prod(self.step.kernel_size)
        depthwise = _DEPTHWISE_TILED if step.bfloat16 else _DEPTHWISE
        separate = step.terms * (step.in_features + depthwise)
        return step.kind == "pointwise_depthwise" and separate > taps * step.in_features

    def can_pool(self, pool: MaxPool) -> bool:
        """Return whether the kernel that carries it out can pool its answers, too."""
        standard = self.step.kind == "standard" or self.is_better_dense
        return self.step.pool is None and (standard or pool == HALVES)

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


class Runner:
    """Carries out a program; what rules leave waits for what follows.

    Args:
        program: of the model.
        rules: by the name of an operation, what is tried in turn: each returns whether it made or
            left the outputs. What none takes is carried out as it was traced.
        bfloat16: of the steps, as `Step` has it.
    """

    def __init__(self, program: Program, rules: Mapping[str, Sequence["Rule"]], *, bfloat16: bool):
        self.program = program
        self.rules = rules
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
        """Return the program's outputs."""
        self.made.update(zip(self.program.inputs, arrays, strict=True))
        for operation in self.program.operations:
            rules = self.rules.get(operation.primitive.name, ())
            if any(rule(self, operation) for rule in rules):
                continue
            outputs = operation.carry_out([self.array(x) for x in operation.inputs])
            self.made.update(zip(operation.outputs, outputs, strict=True))
        return [self.array(y) for y in self.program.outputs]

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

    def _interpolate(self, resampled: Resampled) -> Any:
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
        last = self.last_of_parts(
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

    def last_of_parts(self, joined: Joined) -> Joined:
        """Return the convolution of the last array, the others' sum what is added to it.

        A pointwise one of an interpolated array stands before the interpolation, where there are
        fewer points.
        """
        assert joined.weights is not None
        step = joined.step
        pointwise = step.kernel_size == step.strides == (1, 1) and not any(map(any, step.padding))
        kernel = joined.weights.reshape(-1, joined.x.shape[-1], step.out_features)  # by tap
        start, pieces = 0, []
        for part in self.parts[joined.x]:
            stop = start + part.shape[-1]
            pieces.append((part, kernel[:, start:stop].reshape(-1, 1, step.out_features)))
            start = stop
        pieces.sort(key=lambda piece: piece[0] not in self.resampled)
        residual: Value | None = None
        for place, (part, weights) in enumerate(pieces, start=1):
            known = self.resampled.get(part) if part.uses == 1 and pointwise else None
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
            self.waiting[output] = piece
            residual = output
            if known is not None and commutes:
                residual = Value(joined.shape, output.dtype, uses=1)
                self.resampled[residual] = dataclasses.replace(known, x=output)
        raise AssertionError("there are no parts")

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
            if row.size != 1 and row.shape[-1] != channels:
                return None
            rows = row.reshape(-1, row.shape[-1] if row.ndim else 1)
            if (rows != rows[:1]).any():
                return None
            row = rows[0]
        return np.broadcast_to(row, (channels,)).astype(np.float32)


Rule = Callable[[Runner, Operation], bool]
