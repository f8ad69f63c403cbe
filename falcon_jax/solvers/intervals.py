"""Fits to intervals of answers: where several answers are as good, the nearest counts.

    min_w  E dist(x w + b, [lower, upper])^2

by fits to the nearest good answers, in turn.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from falcon_jax.solvers.moments import Moments, best_bias

P = TypeVar("P")
MOST_STEPS = 16
TOLERANCE = 1e-3  # of the error that a step takes away

_product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("patches", "lower", "upper"), meta_fields=()
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Points:
    """Points that a layer is fitted to.

    Attributes:
        patches: what its kernel is multiplied by, per group of channels.
        lower: least good answer.
        upper: largest good answer.
    """

    patches: Float[Array, "groups points inputs"]
    lower: Float[Array, "points n"]
    upper: Float[Array, "points n"]


@jax.jit
def moments_of(
    patches: Float[Array, "groups points inputs"], answers: Float[Array, "points n"]
) -> Moments:
    """Return the moments of patches and answers."""
    groups, count, _ = patches.shape
    y = answers.reshape(count, groups, -1).swapaxes(0, 1)
    x_mean, y_mean = patches.mean(1), y.mean(1)
    x_rest, y_rest = patches - x_mean[:, None], y - y_mean[:, None]
    return Moments(
        count=jnp.asarray(float(count)),
        input_mean=x_mean,
        target_mean=y_mean,
        second=_product("gsi,gsj->gij", x_rest, x_rest) / count,
        cross=_product("gsi,gsn->gin", x_rest, y_rest) / count,
        variance=(y_rest * y_rest).mean(1),
    )


@jax.jit
def _answers(
    points: Points, weights: Float[Array, "groups inputs outputs"], bias: Float[Array, " n"]
) -> tuple[Float[Array, "points n"], Float[Array, ""]]:
    """Return what weights answer, and the error."""
    answers = _product("gsi,gin->sgn", points.patches, weights).reshape(points.lower.shape)
    answers = answers + bias[None]
    away = jnp.clip(answers, points.lower, points.upper) - answers
    return answers, jnp.mean(away * away) * answers.shape[1]


@functools.partial(jax.jit, static_argnames="centred")
def _nearest(
    points: Points,
    moments: Moments,
    ahead: Float[Array, ""],
    weights: tuple[Array, Array],
    answers: tuple[Array, Array],
    *,
    centred: bool,
) -> Moments:
    """Return moments of the good answers nearest to those of weights, or of ones ahead of them.

    Args:
        points: what answers are good.
        moments: of the points, with any answers.
        ahead: how far ahead, in the direction from the weights before.
        weights: the weights, and those before.
        answers: of both.
        centred: whether there is a bias.
    """
    groups, count, _ = points.patches.shape
    weight, answer = (now + ahead * (now - before) for now, before in (weights, answers))
    step = jnp.clip(answer, points.lower, points.upper) - answer
    y = (answer + step).reshape(count, groups, -1).swapaxes(0, 1)
    mean = y.mean(1) if centred else jnp.zeros_like(moments.target_mean)
    moved = (step - step.mean(0)[None] if centred else step).reshape(count, groups, -1)
    # What the answers themselves contribute is known from the weights.
    cross = _product("gij,gjn->gin", moments.second, weight)
    return dataclasses.replace(
        moments,
        target_mean=mean,
        cross=cross + _product("gsi,sgn->gin", points.patches, moved) / count,
        variance=((y - mean[:, None]) ** 2).mean(1),
    )


def fit_to_intervals(
    points: Points,
    moments: Moments,
    params: P,
    *,
    fit: Callable[[Moments, P], P],
    kernel: Callable[[P], Float[Array, "*kernel_size m n"]],
    use_bias: bool,
    steps: int = MOST_STEPS,
    tolerance: float = TOLERANCE,
) -> tuple[P, Float[np.ndarray, " n"], list[float]]:
    """Return parameters and bias whose answers are nearer to good ones, and errors step by step.

    A fit to the nearest good answers lowers the error; steps start ahead of the last weights, as in
    Nesterov's method, and from them again where the error rose.

    Args:
        points: to fit to.
        moments: of the points, with the wanted answers; about 0 without a bias.
        params: fitted to these.
        fit: returns parameters for moments, starting from others.
        kernel: of parameters.
        use_bias: whether the answers have a bias, the best for every kernel.
        steps: at most.
        tolerance: a step that takes away less of the error is the last.

    Reference:
        Beck, Teboulle: A Fast Iterative Shrinkage-Thresholding Algorithm, 2009; O'Donoghue, Candes:
        Adaptive Restart for Accelerated Gradient Schemes, 2015.
    """
    groups, inputs = moments.input_mean.shape

    def looked_at(params: P, moments: Moments) -> "_Fit[P]":
        weights = kernel(params)
        bias = best_bias(moments, weights) if use_bias else np.zeros(weights.shape[-1])
        flat = jnp.asarray(weights, jnp.float32).reshape(inputs, groups, -1).swapaxes(0, 1)
        answers, error = _answers(points, flat, jnp.asarray(bias, jnp.float32))
        return _Fit(params, bias, flat, answers, float(error))

    best = before = looked_at(params, moments)
    errors, pace = [best.error], 1.0
    for _ in range(steps):
        faster = (1 + math.sqrt(1 + 4 * pace * pace)) / 2
        new = _nearest(
            points,
            moments,
            jnp.asarray((pace - 1) / faster, jnp.float32),
            (best.weights, before.weights),
            (best.answers, before.answers),
            centred=use_bias,
        )
        found = looked_at(fit(new, best.params), new)
        if found.error < best.error:
            before, best, pace = best, found, faster
            errors.append(best.error)
            if errors[-2] - errors[-1] <= tolerance * errors[-2]:
                break
        elif before is best:
            break
        else:
            before, pace = best, 1.0
    return best.params, best.bias, errors


@dataclasses.dataclass(frozen=True)
class _Fit(Generic[P]):
    params: P
    bias: np.ndarray
    weights: Array
    answers: Array
    error: float
