"""Fits to intervals of answers: where several answers are as good, the nearest counts.

    min_w  E dist(x w + b, [lower, upper])^2

by fits to the nearest good answers, in turn.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from falcon_jax.solvers.moments import Moments, best_bias, by_group

P = TypeVar("P")
MOST_STEPS, FEW_STEPS = 24, 12
MUCH = 1 << 34  # mult-adds of the points with the weights from which few steps are made
TOLERANCE = 2e-3  # of the error that a step takes away
_FARTHEST = 20.0  # in units of the last change
_AT_ONCE = 4096  # points
_LOOKED_AT = 4096  # points that tell well enough how far to go on

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
    groups, count, inputs = patches.shape
    y = answers.reshape(count, groups, -1).swapaxes(0, 1)
    x_mean, y_mean = patches.mean(1), y.mean(1)
    y_rest = y - y_mean[:, None]

    def added(sums: tuple[Array, Array], start: Array | int, size: int) -> tuple[Array, Array]:
        x, part = (lax.dynamic_slice_in_dim(a, start, size, axis=1) for a in (patches, y_rest))
        x = x - x_mean[:, None]
        products = _product("gsi,gsj->gij", x, x), _product("gsi,gsn->gin", x, part)
        return sums[0] + products[0], sums[1] + products[1]

    # A centred copy of all patches would be as large as these.
    whole, rest = divmod(count, _AT_ONCE)
    sums = jnp.zeros((groups, inputs, inputs)), jnp.zeros((groups, inputs, y.shape[-1]))
    if whole:
        sums = lax.fori_loop(
            0, whole, lambda index, sums: added(sums, index * _AT_ONCE, _AT_ONCE), sums
        )
    second, cross = added(sums, whole * _AT_ONCE, rest) if rest else sums
    return Moments(
        count=jnp.asarray(float(count)),
        input_mean=x_mean,
        target_mean=y_mean,
        second=second / count,
        cross=cross / count,
        variance=(y_rest * y_rest).mean(1),
    )


def answers_of(
    patches: Float[Array, "groups points inputs"], weights: Float[Array, "groups inputs outputs"]
) -> Float[Array, "points n"]:
    """Return what weights answer to patches, without a bias."""
    # XLA's CPU compiler takes twice as long where the axes of points and groups change places.
    by_group = _product("gsi,gin->gsn", patches, weights)
    return by_group.swapaxes(0, 1).reshape(patches.shape[1], -1)


@jax.jit
def _answers(
    points: Points, weights: Float[Array, "groups inputs outputs"], bias: Float[Array, " n"]
) -> tuple[Float[Array, "points n"], Float[Array, ""]]:
    """Return what weights answer, and the error."""
    answers = answers_of(points.patches, weights) + bias[None]
    away = jnp.clip(answers, points.lower, points.upper) - answers
    return answers, jnp.mean(away * away) * answers.shape[1]


@functools.partial(jax.jit, static_argnames="centred")
def _nearest(
    points: Points,
    moments: Moments,
    weights: tuple[Array, Array],
    answers: tuple[Array, Array],
    *,
    centred: bool,
) -> Moments:
    """Return moments of the good answers nearest to those of weights, or of better ones near them.

    Args:
        points: what answers are good.
        moments: of the points, with any answers.
        weights: the weights, and those before; each output channel goes on in that direction as
            far as its error falls.
        answers: of both.
        centred: whether there is a bias.
    """
    groups, count, _ = points.patches.shape
    ahead = _ahead(points, *answers)
    answer = answers[0] + ahead[None] * (answers[0] - answers[1])
    weight = weights[0] + ahead.reshape(groups, 1, -1) * (weights[0] - weights[1])
    step = jnp.clip(answer, points.lower, points.upper) - answer
    y = (answer + step).reshape(count, groups, -1).swapaxes(0, 1)
    mean = y.mean(1) if centred else jnp.zeros_like(moments.target_mean)
    moved = step - step.mean(0)[None] if centred else step
    moved = moved.reshape(count, groups, -1).swapaxes(0, 1)
    # What the answers themselves contribute is known from the weights.
    cross = _product("gij,gjn->gin", moments.second, weight)
    return dataclasses.replace(
        moments,
        target_mean=mean,
        cross=cross + _product("gsi,gsn->gin", points.patches, moved) / count,
        variance=((y - mean[:, None]) ** 2).mean(1),
    )


def _ahead(
    points: Points, answers: Float[Array, "points n"], before: Float[Array, "points n"]
) -> Float[Array, " n"]:
    """Return how far each channel goes on, in units of its last change, by Newton's method."""
    some = slice(None, None, max(1, len(answers) // _LOOKED_AT))
    answers, lower, upper = answers[some], points.lower[some], points.upper[some]
    change = answers - before[some]
    squares = jnp.sum(change * change, axis=0)

    def away(ahead: Array) -> Array:
        y = answers + ahead[None] * change
        return jnp.clip(y, lower, upper) - y

    def newton(_: Array, ahead: Array) -> Array:
        rest = away(ahead)
        curvature = jnp.sum(jnp.where(rest != 0, change * change, 0), axis=0) + 1e-3 * squares
        slope = jnp.sum(change * rest, axis=0)
        step = jnp.where(curvature > 0, slope / jnp.where(curvature > 0, curvature, 1), 0)
        return jnp.clip(ahead + step, 0, _FARTHEST)

    found = lax.fori_loop(0, 3, newton, jnp.zeros_like(squares))
    better = jnp.sum(away(found) ** 2, axis=0) < jnp.sum(away(jnp.zeros_like(found)) ** 2, axis=0)
    return jnp.where(better, found, 0)


def fit_to_intervals(
    points: Points,
    moments: Moments,
    params: P,
    *,
    fit: Callable[[Moments, P], P],
    kernel: Callable[[P], Float[Array, "*kernel_size m n"]],
    use_bias: bool,
    steps: int | None = None,
    tolerance: float = TOLERANCE,
) -> tuple[P, Float[np.ndarray, " n"], list[float]]:
    """Return parameters and bias whose answers are nearer to good ones, and errors step by step.

    A fit to the nearest good answers lowers the error; steps start ahead of the last weights, each
    output channel as far as is best for it, and from them again where the error rose.

    Args:
        points: to fit to.
        moments: of the points, with the wanted answers; about 0 without a bias.
        params: fitted to these.
        fit: returns parameters for moments, starting from others.
        kernel: of parameters.
        use_bias: whether the answers have a bias, the best for every kernel.
        steps: at most; 24 if not given, or 12 where the points times the weights are much.
        tolerance: a step that takes away less of the error is the last.

    Reference:
        Narkiss, Zibulevsky: Sequential Subspace Optimization Method for Large-Scale Unconstrained
        Problems, 2005, with the last change alone.
    """
    groups, count, inputs = points.patches.shape
    if steps is None:
        much = count * inputs * points.lower.shape[1] >= MUCH * groups
        steps = FEW_STEPS if much else MOST_STEPS

    def looked_at(params: P, moments: Moments) -> "_Fit[P]":
        weights = kernel(params)
        bias = best_bias(moments, weights) if use_bias else np.zeros(weights.shape[-1])
        flat = by_group(weights, groups)
        answers, error = _answers(points, flat, np.asarray(bias, np.float32))
        return _Fit(params, bias, flat, answers, float(error))

    best = before = looked_at(params, moments)
    errors = [best.error]
    for _ in range(steps):
        new = _nearest(
            points,
            moments,
            (best.weights, before.weights),
            (best.answers, before.answers),
            centred=use_bias,
        )
        found = looked_at(fit(new, best.params), new)
        if found.error < best.error:
            before, best = best, found
            errors.append(best.error)
            if errors[-2] - errors[-1] <= tolerance * errors[-2]:
                break
        elif before is best:
            break
        else:
            before = best
    return best.params, best.bias, errors


@dataclasses.dataclass(frozen=True)
class _Fit(Generic[P]):
    params: P
    bias: np.ndarray
    weights: np.ndarray
    answers: Array
    error: float
