"""Interpolations, and arrays side by side, of a program."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from falcon_jax.native.pending import Resampled, Runner
from falcon_jax.native.program import Operation

_FEW = 8  # entries of an axis that an interpolation takes together


def interpolation(runner: Runner, operation: Operation) -> bool:
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


def transpose(runner: Runner, operation: Operation) -> bool:
    """Take a permutation of axes to an interpolation."""
    (x,) = operation.inputs
    known = runner.resampled.get(x) if x.uses == 1 else None
    if known is None:
        return False
    order = tuple(known.order[i] for i in operation.params["permutation"])
    runner.resampled[operation.outputs[0]] = dataclasses.replace(known, order=order)
    return True


def concatenate(runner: Runner, operation: Operation) -> bool:
    """Let arrays that are put side by side by channels wait for a convolution."""
    (y,) = operation.outputs
    float32 = all(a.dtype == jnp.float32 and a.constant is None for a in operation.inputs)
    if operation.params["dimension"] != len(y.shape) - 1 or len(y.shape) != 4 or not float32:
        return False
    if len(operation.inputs) < 2:
        return False
    runner.parts[y] = operation.inputs
    return True
