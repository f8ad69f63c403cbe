"""Layers fitted to what the original ones answer to data, one after the other."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from falcon_jax.compression.answers import answers_at_points, observed
from falcon_jax.compression.observation import (
    Unit,
    mean_after,
    part,
    place_in_stack,
    put,
    runs_of,
    units_of,
)
from falcon_jax.compression.plan import Plan, PlanRow
from falcon_jax.compression.progress import shown
from falcon_jax.frameworks.interface import M
from falcon_jax.frameworks.program import Network
from falcon_jax.methods.base import Params
from falcon_jax.solvers.intervals import Points, answers_of, fit_to_intervals, moments_of
from falcon_jax.solvers.moments import best_bias, by_group


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResponseError:
    """How far a layer's answers are from the original's, ``||y - y'|| / ||y - E y||``.

    Attributes:
        path: of the layer.
        row: of a stack of layers; None for a layer of its own.
        points: answers that were looked at.
        before: with the parameters that the layer had, in the network calibrated up to there.
        after: with the new ones.
        mattering: with the new ones, ``||dist(y', good answers)|| / ||y - E y||``: the error but
            for what the model makes no difference of.
    """

    path: str
    row: int | None
    points: int
    before: float
    after: float
    mattering: float


def calibrate(
    model: M,
    compressed: M,
    plan: Plan,
    batches: Iterable[Any],
    *,
    points: int | None = None,
    relu_aware: bool = True,
    by_sensitivity: bool = True,
    key: PRNGKeyArray | None = None,
    progress: bool = False,
    report: Callable[[ResponseError], None] | None = None,
) -> M:
    """Return a compressed model whose layers answer to data as those of the original do.

    Layer by layer in the order of use, ``min E ||y - W' x' ||^2``: y is the original layer's
    answer in the original model, x' what the layer gets in the compressed one, with the errors of
    all layers before; a layer that is called several times is fitted twice, to all of them. Every
    method is fitted (`Method.fit_moments`), without labels. Biases change
    with the kernels; that of a layer without one goes into the mean of the BatchNorm that follows
    it at once, if one does. Nothing else changes.

    Where a ReLU follows a layer, or a BatchNorm and a ReLU, any answer that it makes 0 is as good
    where it made 0 of the original's; and where a pooling then takes the largest of windows that do
    not overlap, any answer below the largest is as good for the others (``relu_aware``).

    One layer's points, the original's answers for the layers that come next and the compressed
    model's activations between two layers are in memory, up to 512, 640 and 384 MB; what is beyond
    is computed again.

    Args:
        model: the model that was compressed; a Linen module bound to its variables.
        compressed: what ``compress(model, plan)`` returned; it is not changed. Calibrate before
            BatchNorm statistics are estimated anew.
        plan: what was done.
        batches: inputs of both models, arrays, tuples or `Inputs`, of a few hundred examples in
            all; they can be of unequal size.
        points: of every example's answer, at most so many are looked at, at random; 120 if not
            given, more where the examples are few: five for each weight of an output channel.
            Fewer where the patches of all would be larger than 512 MB.
        relu_aware: whether answers that make no difference are left free.
        by_sensitivity: whether points are looked at in proportion to how much the outputs change
            with them, which one gradient of the original model for each batch tells.
        key: for the points; ``jax.random.key(0)`` if not given.
        progress: whether to show a progress bar on standard error.
        report: is called with the errors of every layer once it is fitted.

    Returns:
        A new model; a Linen module bound to new variables.

    Raises:
        ValueError: if there are no batches or too few, they do not fit the model, the compressed
            model is not that of the plan, activations are not finite, or no layer of the plan can
            be looked at.

    Warns:
        UserWarning: naming the layers that are called where they cannot be looked at, or not at
            all; they stay as they were.

    >>> from flax import nnx
    >>> from falcon_jax.compression.compress import compress
    >>> from falcon_jax.compression.plan import Rule, make_plan
    >>> from falcon_jax.methods.depthwise_separable import DepthwiseSeparable
    >>> conv = nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(0))
    >>> x = jax.random.normal(jax.random.key(0), (4, 8, 8, 8))
    >>> plan, errors = make_plan(conv, [Rule(method=DepthwiseSeparable())]), []
    >>> small = calibrate(conv, compress(conv, plan), plan, [x], report=errors.append)
    >>> errors[0].after < errors[0].before
    True
    """
    if points is not None and points < 1:
        raise ValueError(f"points is at least 1; got {points}.")
    original, small = Network.of(model), Network.of(compressed)
    paths = [row.path for row in plan.replaced]
    if not paths:
        raise ValueError("the plan replaces no layer, so that there is nothing to calibrate.")
    for row in plan.replaced:
        _check_layer(row, original, small)
    runs = runs_of(original, small, paths, batches)
    units = units_of(runs, plan.replaced, original)
    key = jax.random.key(0) if key is None else key
    steps = shown(
        units, "calibrate", progress=progress, name=lambda unit: unit.row.path or "(model)"
    )
    answers = answers_at_points(
        units, runs, points, key, relu_aware=relu_aware, by_sensitivity=by_sensitivity
    )
    for index, (unit, seen) in enumerate(zip(steps, answers, strict=True)):
        for run in runs:
            run.advance(units[index:])
        # What a layer gets in later calls changes with it.
        rounds = range(2 if len(unit.calls) > 1 else 1)
        errors = []
        for _ in rounds:
            data = observed(unit, runs, seen, relu_aware=relu_aware)
            errors.append(_fitted(unit, data, original, small, mean_after(unit, runs)))
        if report is not None:
            report(dataclasses.replace(errors[-1], before=errors[0].before))
    return small.rebuilt()


def _check_layer(row: PlanRow, original: Network, small: Network) -> None:
    method = row.method
    assert method is not None
    kernel = original.params(row.path).get("kernel")
    axes = len(row.spec.kernel_shape)
    if kernel is None or kernel.shape[kernel.ndim - axes :] != row.spec.kernel_shape:
        raise ValueError(
            f"the plan replaces {row.path!r}, but the model has no such convolution. Give the "
            "model that the plan was made for."
        )
    stack = kernel.shape[: kernel.ndim - axes]
    like = jax.eval_shape(lambda key: method.init(key, row.spec), jax.random.key(0))
    found = {name: value.shape for name, value in small.params(row.path).items()}
    wanted = {name: (*stack, *value.shape) for name, value in like.items()}
    if {name: found.get(name) for name in wanted} != wanted:
        raise ValueError(
            f"the plan replaces {row.path!r} by {method}, but the compressed model has not got it "
            "there. Give the model that compress(model, plan) returned, and this plan."
        )


def _fitted(
    unit: Unit,
    data: tuple[Array, Array, Array, Array],
    original: Network,
    small: Network,
    mean: str | None,
) -> ResponseError:
    """Put the parameters that fit best into the compressed model, and return the errors."""
    row = unit.row
    method, spec = row.method, row.spec
    assert method is not None
    patches, wanted, lower, upper = data
    free = not np.array_equal(lower, upper)
    names = [name for name in small.params(row.path) if name != "bias"]
    stack = None if unit.index is None else place_in_stack(original, row, unit.index)
    kernel = part(original.params(row.path)["kernel"], stack)
    old = {name: part(small.params(row.path)[name], stack) for name in names}
    old_bias = part(small.params(row.path)["bias"], stack) if spec.use_bias else None
    use_bias = spec.use_bias or mean is not None
    moments = moments_of(patches, wanted)
    if not use_bias:
        moments = moments.about_zero()
    build = functools.partial(method.kernel, spec=spec)

    def errors(params: Params, bias: Any) -> tuple[float, float]:
        weights = by_group(build(params), spec.feature_group_count)
        offset = np.zeros(spec.out_features) if bias is None else np.asarray(bias)
        return _distances(patches, weights, offset, wanted, lower, upper)

    before, _ = errors(old, old_bias)
    params = method.fit_moments(kernel, spec, moments)
    bias = best_bias(moments, build(params)) if use_bias else None
    if free:
        params, bias, _ = fit_to_intervals(
            Points(patches=patches, lower=lower, upper=upper),
            moments,
            params,
            fit=lambda new, start: method.fit_moments(kernel, spec, new, start),
            kernel=build,
            use_bias=use_bias,
        )
    after, mattering = errors(params, bias)
    for name in names:
        put(small.values, small.name(row.path, name), params[name], stack)
    if spec.use_bias:
        put(small.values, small.name(row.path, "bias"), jnp.asarray(bias), stack)
    elif mean is not None:
        moved = np.asarray(small.values[mean], np.float32) - np.asarray(bias, np.float32)
        put(small.values, mean, jnp.asarray(moved), None)
    return ResponseError(
        path=row.path,
        row=unit.index,
        points=len(wanted),
        before=before,
        after=after,
        mattering=mattering,
    )


def _distances(
    patches: Array, weights: np.ndarray, bias: np.ndarray, wanted: Array, lower: Array, upper: Array
) -> tuple[float, float]:
    total, spread, free = _squares(patches, weights, bias.astype(np.float32), wanted, lower, upper)
    scale = float(spread) or 1.0
    return math.sqrt(float(total) / scale), math.sqrt(float(free) / scale)


@jax.jit
def _squares(
    patches: Array, weights: Array, bias: Array, wanted: Array, lower: Array, upper: Array
) -> tuple[Array, Array, Array]:
    answers = answers_of(patches, weights) + bias[None]
    return (
        jnp.sum((answers - wanted) ** 2),
        jnp.sum((wanted - wanted.mean(0)[None]) ** 2),
        jnp.sum((jnp.clip(answers, lower, upper) - answers) ** 2),
    )
