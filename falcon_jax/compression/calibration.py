"""Layers fitted to what the original ones answer to data, one after the other."""

import dataclasses
import functools
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from falcon_jax.compression.following import Following, following, intervals
from falcon_jax.compression.plan import Plan, PlanRow
from falcon_jax.frameworks.interface import M
from falcon_jax.frameworks.layers import Inputs
from falcon_jax.frameworks.program import Network, Program, Site
from falcon_jax.methods.base import Params
from falcon_jax.ops.geometry import ConvSpec
from falcon_jax.solvers.intervals import Points, fit_to_intervals, moments_of
from falcon_jax.solvers.moments import best_bias
from falcon_jax.solvers.patches import patches_at, points_at

POINTS = 120  # of every example's answer
_UNIFORM = 0.05  # share of points that are chosen whatever hangs on them
_NUMBERS = 1 << 27  # floats of one layer's patches: 512 MB
_HELD = 1 << 29  # bytes of activations that are kept between two layers, for each network


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
    points: int = POINTS,
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

    One layer's points and the activations between two layers are in memory, up to 512 MB and twice
    as much; what is beyond is computed again, layer by layer.

    Args:
        model: the model that was compressed; a Linen module bound to its variables.
        compressed: what ``compress(model, plan)`` returned; it is not changed. Calibrate before
            BatchNorm statistics are estimated anew.
        plan: what was done.
        batches: inputs of both models, arrays, tuples or `Inputs`, of a few hundred examples in
            all; they can be of unequal size.
        points: of every example's answer, at most so many are looked at, at random; fewer where
            the patches of all would be larger than 512 MB.
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
    """
    if points < 1:
        raise ValueError(f"points is at least 1; got {points}.")
    original, small = Network.of(model), Network.of(compressed)
    runs = _runs(original, small, plan, batches)
    units = _units(runs, plan, original)
    key = jax.random.key(0) if key is None else key
    for index, unit in enumerate(_shown(units, progress)):
        for run in runs:
            run.advance(units[index:])
        pick = jax.random.fold_in(key, index)
        # What a layer gets in later calls changes with it.
        rounds = range(2 if len(unit.calls) > 1 else 1)
        errors = []
        for _ in rounds:
            data = _observed(unit, runs, points, pick, relu_aware, by_sensitivity)
            errors.append(_fitted(unit, data, original, small, _mean_after(unit, runs)))
        if report is not None:
            report(dataclasses.replace(errors[-1], before=errors[0].before))
    return small.rebuilt()


Call = tuple[int, int | None]  # a site, and which of its mapped calls


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Unit:
    """A layer, or one of a stack.

    Attributes:
        row: of the plan.
        index: in the stack; None of a layer of its own.
        calls: of the layer; those of every shape of inputs are alike.
    """

    row: PlanRow
    index: int | None
    calls: tuple[Call, ...]


@dataclasses.dataclass
class _Batch:
    """A batch, how far both models were carried out, and how much hangs on each point."""

    inputs: list[Any]
    original: dict[Any, Array]
    small: dict[Any, Array]
    felt: Mapping[Any, Array] | None = None


class _Run:
    """Both models' programs for inputs of one shape, and how far they were carried out."""

    def __init__(self, original: Program, small: Program):
        self._differentiable = True
        self.original, self.small = original, small
        self.batches: list[_Batch] = []
        self.after: dict[int, tuple[Following, Following]] = {}

    def add(self, inputs: Inputs) -> None:
        arrays = inputs.arrays
        self.batches.append(_Batch(arrays, self.original.start(arrays), self.small.start(arrays)))

    def advance(self, units: Sequence[_Unit]) -> None:
        """Compute what both programs need from the first unit on."""
        sites = [site for unit in units for site, _ in unit.calls]
        outputs = [self.original.sites[site].output for site in sites]
        outputs += [
            after.pooled for site in sites if (after := self.following(site)[0]).pooled is not None
        ]
        inputs = [self.small.sites[site].input for site in sites]
        first = units[0].calls[0][0]
        for name, program, wanted in (
            ("original", self.original, outputs),
            ("small", self.small, inputs),
        ):
            needed = program.frontier(program.sites[first].start, wanted)
            held = 0
            for batch in self.batches:
                state = getattr(batch, name)
                size = sum(v.aval.size * v.aval.dtype.itemsize for v in needed)
                if held + size > _HELD:
                    continue
                held += size
                values = jax.block_until_ready(program.compute(needed, state))
                setattr(batch, name, dict(zip(needed, values, strict=True)))

    def felt(self, batch: _Batch, site: Site) -> Array | None:
        """Return how much hangs on each point of a layer's answer; None if it cannot be told."""
        if self._differentiable and batch.felt is None:
            try:
                batch.felt = self.original.sensitivity(batch.inputs, jax.random.key(0))
            except (TypeError, ValueError, NotImplementedError) as error:
                self._differentiable = False
                reason = str(error).partition("\n")[0]
                warnings.warn(
                    "the model cannot be differentiated, so that points are chosen alike "
                    f"(by_sensitivity=False): {reason}",
                    stacklevel=6,
                )
        mapped = site.answer.aval.shape != site.output_shape
        return None if batch.felt is None or mapped else batch.felt[site.answer]

    def following(self, site: int) -> tuple[Following, Following]:
        """Return what follows a call in the original, and in the compressed model."""
        if site not in self.after:
            pair = self.original.sites[site], self.small.sites[site]
            self.after[site] = following(self.original, pair[0]), following(self.small, pair[1])
        return self.after[site]


def _runs(original: Network, small: Network, plan: Plan, batches: Iterable[Any]) -> list[_Run]:
    """Return both models' programs for every shape of inputs, with the batches of that shape."""
    paths = [row.path for row in plan.replaced]
    if not paths:
        raise ValueError("the plan replaces no layer, so that there is nothing to calibrate.")
    for row in plan.replaced:
        _check_layer(row, original, small)
    runs: list[tuple[Inputs, _Run]] = []
    for batch in batches:
        inputs = Inputs.of(batch)
        shapes = inputs.shapes
        run = next((run for known, run in runs if known == shapes), None)
        if run is None:
            run = _Run(original.program(shapes, paths), small.program(shapes, paths))
            runs.append((shapes, run))
        run.add(inputs)
    if not runs:
        raise ValueError("calibration needs at least one batch of inputs; got none.")
    return [run for _, run in runs]


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


def _units(runs: Sequence[_Run], plan: Plan, original: Network) -> list[_Unit]:
    """Return the layers, in the order of their first use; tell of those that cannot be seen."""
    rows = {row.path: row for row in plan.replaced}
    program = runs[0].original
    reasons = dict.fromkeys(program.hidden, "is called inside a loop or a branch")
    for run in runs:
        pairs = [
            [(s.path, s.input_shape[1:], s.output_shape[1:]) for s in p.sites]
            for p in (run.original, run.small)
        ]
        same = [s.path for s in run.original.sites] == [s.path for s in program.sites]
        if pairs[0] != pairs[1] or not same:
            raise ValueError(
                "the two models do not call their layers alike for all batches; give the model "
                "that was compressed, and what compress(model, plan) returned."
            )
    calls: dict[tuple[str, int | None], list[Call]] = {}
    for index, site in enumerate(program.sites):
        mapped = site.kernel.aval.shape[:-1]
        if mapped and (
            site.output.aval.shape[:-1] != mapped or site.input.aval.shape[:-1] not in ((), mapped)
        ):
            reasons[site.path] = "is mapped over in two ways"
        elif site.path not in reasons:
            for place, layer in _layers_of(site, program, rows[site.path], original):
                calls.setdefault((site.path, layer), []).append((index, place))
    for path in rows:
        if not any(path == known for known, _ in calls):
            reasons.setdefault(path, "is not called")
    told = "; ".join(f"{path or '(model)'} {reason}" for path, reason in reasons.items())
    units = [
        _Unit(row=rows[path], index=index, calls=tuple(found))
        for (path, index), found in calls.items()
        if path not in reasons
    ]
    if not units:
        raise ValueError(f"no layer of the plan can be calibrated: {told}.")
    if reasons:
        warnings.warn(f"layers stay as they were: {told}.", stacklevel=3)
    return units


def _layers_of(
    site: Site, program: Program, row: PlanRow, original: Network
) -> Iterator[tuple[int | None, int | None]]:
    """Yield, for each mapped call at a site, its place and which layer of the stack it uses."""
    name = original.name(row.path, "kernel")
    kernel = original.values[name]
    stack = kernel.shape[: kernel.ndim - len(row.spec.kernel_shape)]
    if not stack:
        yield None, None
        return
    # What is left of a kernel that holds the number of its layer tells which one is used.
    numbers = jnp.arange(math.prod(stack)).reshape(*stack, *(1,) * len(row.spec.kernel_shape))
    values = original.values | {name: jnp.broadcast_to(numbers, kernel.shape).astype(kernel.dtype)}
    (used,) = program.compute([site.kernel], {}, values)
    if used.ndim == 1:
        yield None, int(used[0])
        return
    for place, number in enumerate(used.reshape(-1, used.shape[-1])[:, 0]):
        yield place, int(number)


def _shown(units: Sequence[_Unit], progress: bool) -> Iterator[_Unit]:
    """Yield the layers, and show on standard error how far they have come."""
    begin, width = time.monotonic(), 20
    for done, unit in enumerate(units):
        if progress:
            bar = ("#" * (width * done // len(units))).ljust(width)
            taken = f"{time.monotonic() - begin:.0f} s"
            line = f"calibrate [{bar}] {done}/{len(units)}, {taken}: {unit.row.path or '(model)'}"
            sys.stderr.write(f"\r{line:<79}")
            sys.stderr.flush()
        yield unit
    if progress:
        taken = f"{time.monotonic() - begin:.0f} s"
        line = f"calibrate [{'#' * width}] {len(units)}/{len(units)}, {taken}"
        sys.stderr.write(f"\r{line:<79}\n")


def _mean_after(unit: _Unit, runs: Sequence[_Run]) -> str | None:
    """Return the variable that is subtracted from a layer's answers and nothing else, or None."""
    means = {run.following(site)[1].mean for run in runs for site, _ in unit.calls}
    (mean,) = means if len(means) == 1 else (None,)
    if mean is None or len(unit.calls) > 1 or unit.index is not None:
        return None
    return mean if all(run.small.used_once(mean) for run in runs) else None


def _observed(
    unit: _Unit,
    runs: Sequence[_Run],
    points: int,
    key: PRNGKeyArray,
    relu_aware: bool,
    by_sensitivity: bool,
) -> tuple[Array, Array, Array, Array]:
    """Return patches, answers, and the least and the largest good answers, at random points."""
    spec = unit.row.spec
    examples = sum(
        len(run.batches) * math.prod(_batch_of(run.original.sites[site], spec))
        for run in runs
        for site, _ in unit.calls
    )
    points = max(1, min(points, _NUMBERS // max(1, examples * spec.taps * spec.in_features)))
    found: list[tuple[Array, ...]] = []
    for run in runs:
        for batch in run.batches:
            for site, place in unit.calls:
                pick = jax.random.fold_in(key, len(found))
                options = spec, points, pick, relu_aware, by_sensitivity
                looked_at = _looked_at(run, batch, site, place, *options)
                # Batches computed at the same time would be in memory together.
                found.append(jax.block_until_ready(looked_at))
    patches = jnp.concatenate([part[0] for part in found], axis=1)
    rest = [jnp.concatenate([part[i] for part in found]) for i in (1, 2, 3)]
    for name, array in (("gets", patches), ("should answer", rest[0])):
        if not bool(jnp.isfinite(array).all()):
            raise ValueError(
                f"what {unit.row.path!r} {name} is not finite; the weights are damaged, or the "
                "inputs are not those of the model."
            )
    count, channels = len(rest[0]), max(spec.group_in_features, spec.out_features)
    if count < channels:
        raise ValueError(
            f"the batches give {count} points of {unit.row.path!r}, fewer than its {channels} "
            f"channels; its kernel wants {spec.taps * spec.group_in_features} or more. Give more "
            "examples, or a larger points."
        )
    return patches, rest[0], rest[1], rest[2]


def _batch_of(site: Site, spec: ConvSpec) -> tuple[int, ...]:
    """Return the batch axes of a call, mapped ones that all use one kernel first."""
    mapped = () if site.kernel.aval.ndim > 1 else site.output.aval.shape[:-1]
    return (*mapped, *site.output_shape[: -1 - len(spec.kernel_size)])


def _looked_at(
    run: _Run,
    batch: _Batch,
    index: int,
    place: int | None,
    spec: ConvSpec,
    points: int,
    key: PRNGKeyArray,
    relu_aware: bool,
    by_sensitivity: bool,
) -> tuple[Array, Array, Array, Array]:
    site, other = run.original.sites[index], run.small.sites[index]
    after, now = run.following(index)
    wanted = [site.output] if after.pooled is None else [site.output, after.pooled]
    answers, *pooled = run.original.compute(wanted, batch.original)
    (inputs,) = run.small.compute([other.input], batch.small)
    if place is not None:
        answers = answers.reshape(-1, answers.shape[-1])[place]
        if inputs.ndim > 1:
            inputs = inputs.reshape(-1, inputs.shape[-1])[place]
    axes = len(spec.kernel_size) + 1
    y = answers.reshape(-1, *site.output_shape[-axes:])
    x = inputs.reshape(-1, *other.input_shape[-axes:])
    spatial = y.shape[1:-1]
    total = math.prod(spatial)
    # The largest of log-weights with Gumbel noise are a draw without replacement.
    scores = jax.random.gumbel(key, (y.shape[0], total))
    felt = run.felt(batch, site) if by_sensitivity else None
    if felt is not None:
        scores = scores + _log_weights(felt.reshape(y.shape[0], total))
    chosen = lax.top_k(scores, min(points, total))[1]
    patches, y = _sampled(x, y, chosen, spec=spec)
    lower = upper = y
    if relu_aware and after.rectified and now.rectified:
        lower, upper = _good(y, after, now, chosen, spatial, pooled[0] if pooled else None)
    n = spec.out_features
    return patches, y.reshape(-1, n), lower.reshape(-1, n), upper.reshape(-1, n)


@functools.partial(jax.jit, static_argnames="spec")
def _sampled(x: Array, y: Array, chosen: Array, *, spec: ConvSpec) -> tuple[Array, Array]:
    patches = patches_at(x, spec, chosen).astype(jnp.float32)
    return patches, points_at(y, chosen).astype(jnp.float32)


def _log_weights(felt: Float[Array, "b points"]) -> Float[Array, "b points"]:
    mean = felt.mean(1, keepdims=True)
    share = jnp.where(mean > 0, felt / jnp.where(mean > 0, mean, 1), 1)
    return jnp.log((1 - _UNIFORM) * share + _UNIFORM)


def _good(
    y: Array,
    after: Following,
    now: Following,
    chosen: Int[Array, "b points"],
    spatial: tuple[int, ...],
    pooled: Array | None,
) -> tuple[Array, Array]:
    if pooled is not None:
        pooled = pooled.astype(jnp.float32)
    return intervals(y, after, now, chosen, spatial, pooled)


def _fitted(
    unit: _Unit,
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
    free = bool(jnp.any(lower != upper))
    names = [name for name in small.params(row.path) if name != "bias"]
    stack = None if unit.index is None else _place(original, row, unit.index)
    kernel = _part(original.params(row.path)["kernel"], stack)
    old = {name: _part(small.params(row.path)[name], stack) for name in names}
    old_bias = _part(small.params(row.path)["bias"], stack) if spec.use_bias else None
    use_bias = spec.use_bias or mean is not None
    moments = moments_of(patches, wanted)
    if not use_bias:
        moments = moments.about_zero()
    build = functools.partial(method.kernel, spec=spec)

    def errors(params: Params, bias: Any) -> tuple[float, float]:
        weights = _flat(build(params), spec)
        offset = jnp.zeros(spec.out_features) if bias is None else jnp.asarray(bias, jnp.float32)
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
        _put(small, small.name(row.path, name), params[name], stack)
    if spec.use_bias:
        _put(small, small.name(row.path, "bias"), jnp.asarray(bias), stack)
    elif mean is not None:
        _put(small, mean, small.values[mean] - jnp.asarray(bias, jnp.float32), None)
    return ResponseError(
        path=row.path,
        row=unit.index,
        points=len(wanted),
        before=before,
        after=after,
        mattering=mattering,
    )


def _flat(kernel: Array, spec: ConvSpec) -> Float[Array, "groups inputs outputs"]:
    groups = spec.feature_group_count
    flat = kernel.astype(jnp.float32).reshape(-1, groups, spec.out_features // groups)
    return flat.swapaxes(0, 1)


def _distances(
    patches: Array, weights: Array, bias: Array, wanted: Array, lower: Array, upper: Array
) -> tuple[float, float]:
    total, spread, free = _squares(patches, weights, bias, wanted, lower, upper)
    scale = float(spread) or 1.0
    return math.sqrt(float(total) / scale), math.sqrt(float(free) / scale)


@jax.jit
def _squares(
    patches: Array, weights: Array, bias: Array, wanted: Array, lower: Array, upper: Array
) -> tuple[Array, Array, Array]:
    answers = jnp.einsum("gsi,gin->sgn", patches, weights, precision=lax.Precision.HIGHEST)
    answers = answers.reshape(wanted.shape) + bias[None]
    return (
        jnp.sum((answers - wanted) ** 2),
        jnp.sum((wanted - wanted.mean(0)[None]) ** 2),
        jnp.sum((jnp.clip(answers, lower, upper) - answers) ** 2),
    )


def _place(network: Network, row: PlanRow, index: int) -> tuple[int, ...]:
    kernel = network.params(row.path)["kernel"]
    stack = kernel.shape[: kernel.ndim - len(row.spec.kernel_shape)]
    return tuple(int(i) for i in np.unravel_index(index, stack))


def _part(value: Array, place: tuple[int, ...] | None) -> Array:
    return jnp.asarray(value if place is None else value[place])


def _put(network: Network, name: str, new: Array, place: tuple[int, ...] | None) -> None:
    old = jnp.asarray(network.values[name])
    new = new.astype(old.dtype)
    network.values[name] = new if place is None else old.at[place].set(new)
