"""What a model's layers get and answer, looked at layer by layer in two models at once."""

import ctypes
import dataclasses
import functools
import math
import sys
import warnings
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from falcon_jax.compression.following import Following, following, intervals
from falcon_jax.compression.plan import PlanRow
from falcon_jax.frameworks.layers import Inputs
from falcon_jax.frameworks.program import Network, Program, Site
from falcon_jax.native.joining import with_native_steps
from falcon_jax.native.library import serve as kernels_serve
from falcon_jax.ops.geometry import ConvSpec
from falcon_jax.solvers.patches import patches_at, points_at

_POINTS = 120  # of every example's answer, where these are enough
_EQUATIONS = 5  # points for each weight of an output channel that are enough
_UNIFORM = 0.05  # share of points that are chosen whatever hangs on them
_NUMBERS = 1 << 27  # floats of one layer's patches: 512 MB
_HELD = 3 << 27  # bytes of activations that are kept between two layers, for each network


Call = tuple[int, int | None]  # a site, and which of its mapped calls


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """A layer, or one of a stack.

    Attributes:
        row: of the plan.
        index: in the stack; None of a layer of its own.
        calls: of the layer; those of every shape of inputs are alike.
    """

    row: PlanRow
    index: int | None
    calls: tuple[Call, ...]

    @property
    def name(self) -> str:
        """What it is called before people."""
        return self.row.path or "(model)"


@dataclasses.dataclass
class _Batch:
    """A batch, how far both models were carried out, and how much hangs on each point."""

    inputs: list[Any]
    original: dict[Any, Array]
    small: dict[Any, Array]
    felt: Mapping[Any, Array] | None = None


class _Computation:
    """Variables of a program, batch after batch, by native kernels where they are built.

    Weights are constants of what is compiled: it goes when they change.
    """

    def __init__(self, program: Program):
        self._program = program
        self._native = kernels_serve()
        self._compiled: dict[Any, Callable[..., list[Array]]] = {}

    def __call__(self, wanted: Sequence[Any], state: Mapping[Any, Array]) -> list[Array]:
        if not self._native:
            return self._program.compute(wanted, state)
        key = tuple(wanted), tuple(state)
        if key not in self._compiled:
            function = self._program.function(*key)
            steps = with_native_steps(lambda *arrays: function(arrays))
            self._compiled[key] = jax.jit(steps)
        return self._compiled[key](*state.values())


class Run:
    """Both models' programs for inputs of one shape, and how far they were carried out."""

    def __init__(self, original: Program, small: Program):
        self._differentiable = True
        self.original, self.small = original, small
        self.batches: list[_Batch] = []
        self.after: dict[int, tuple[Following, Following]] = {}

    def add(self, inputs: Inputs) -> None:
        """Add a batch, before anything is computed of it."""
        arrays = [jnp.asarray(array) for array in inputs.arrays]
        self.batches.append(_Batch(arrays, self.original.start(arrays), self.small.start(arrays)))

    def advance(self, units: Sequence[Unit], *, to_outputs: bool = False) -> None:
        """Compute what both programs need from the first unit on.

        Args:
            units: that are still to be looked at.
            to_outputs: whether the original's outputs are, too.
        """
        first = units[0].calls[0][0]
        far, near = (self._wanted(some, to_outputs) for some in (units, units[:1]))
        for name, program in (("original", self.original), ("small", self.small)):
            start = program.sites[first].start
            most, least = (program.frontier(start, wanted[name]) for wanted in (far, near))
            carried = _Computation(program)
            for batch, needed in zip(
                self.batches, _held(len(self.batches), most, least), strict=True
            ):
                state = getattr(batch, name)
                values = jax.block_until_ready(carried(needed, state)) if needed else ()
                inputs = {v: state[v] for v in program.inputs}
                setattr(batch, name, inputs | dict(zip(needed, values, strict=True)))
            if self.small is self.original:
                break
        if self.small is self.original:
            for batch in self.batches:
                batch.small = batch.original
        _return_freed_memory()

    def _wanted(self, units: Sequence[Unit], to_outputs: bool) -> dict[str, list[Any]]:
        """Return what of both programs units look at."""
        sites = [site for unit in units for site, _ in unit.calls]
        answers = [self.original.sites[site].output for site in sites]
        pooled = [self.following(site)[0].pooled for site in sites]
        answers += [variable for variable in pooled if variable is not None]
        answers += self.original.outputs if to_outputs else ()
        inputs = [self.small.sites[site].input for site in sites]
        if self.small is self.original:
            answers += inputs
        return {"original": answers, "small": inputs}

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


def _held(count: int, most: Sequence[Any], least: Sequence[Any]) -> list[Sequence[Any]]:
    """Return which variables are held of each batch, within the limit.

    Args:
        count: of batches.
        most: what all layers to come need.
        least: what the next one needs; for another one, the rest is computed again.
    """
    far, near = (sum(v.aval.size * v.aval.dtype.itemsize for v in each) for each in (most, least))
    if count * far <= _HELD:
        return [most] * count
    whole = max(0, _HELD - count * near) // max(1, far - near)
    rest = min(count - whole, (_HELD - whole * far) // max(1, near))
    return [most] * whole + [least] * rest + [()] * (count - whole - rest)


def _return_freed_memory() -> None:
    """Return to the system what was freed; glibc would keep gigabytes between its chunks."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def runs_of(
    original: Network, small: Network, paths: Collection[str], batches: Iterable[Any]
) -> list[Run]:
    """Return both models' programs for every shape of inputs, with the batches of that shape.

    Args:
        original: a model taken apart.
        small: another one that calls layers of the same paths, or the same.
        paths: of the layers that are looked at.
        batches: inputs of both.

    Raises:
        ValueError: if there are no batches, or they do not fit.
    """
    runs: list[tuple[Inputs, Run]] = []
    for batch in batches:
        inputs = Inputs.of(batch)
        shapes = inputs.shapes
        run = next((run for known, run in runs if known == shapes), None)
        if run is None:
            program = original.program(shapes, paths)
            same = program if small is original else small.program(shapes, paths)
            run = Run(program, same)
            runs.append((shapes, run))
        run.add(inputs)
    if not runs:
        raise ValueError("at least one batch of inputs is needed; got none.")
    return [run for _, run in runs]


def units_of(runs: Sequence[Run], layers: Sequence[PlanRow], original: Network) -> list[Unit]:
    """Return the layers, in the order of their first use; tell of those that cannot be seen.

    Args:
        runs: of the models.
        layers: the rows of a plan that are looked at.
        original: the model whose runs they are.

    Raises:
        ValueError: if the models do not call them alike, or none can be seen.

    Warns:
        UserWarning: naming those that cannot.
    """
    rows = {row.path: row for row in layers}
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
        Unit(row=rows[path], index=index, calls=tuple(found))
        for (path, index), found in calls.items()
        if path not in reasons
    ]
    if not units:
        raise ValueError(f"no layer of the plan can be looked at: {told}.")
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


def mean_after(unit: Unit, runs: Sequence[Run]) -> str | None:
    """Return the variable that is subtracted from a layer's answers and nothing else, or None."""
    means = {run.following(site)[1].mean for run in runs for site, _ in unit.calls}
    (mean,) = means if len(means) == 1 else (None,)
    if mean is None or len(unit.calls) > 1 or unit.index is not None:
        return None
    return mean if all(run.small.used_once(mean) for run in runs) else None


def observed(
    unit: Unit,
    runs: Sequence[Run],
    points: int | None,
    key: PRNGKeyArray,
    relu_aware: bool,
    by_sensitivity: bool,
) -> tuple[Array, Array, Array, Array]:
    """Return patches, answers, and the least and the largest good answers, at random points.

    Args:
        unit: the layer.
        runs: of both models.
        points: of every example's answer, at most; enough for the layer's weights if None.
        key: to draw them with.
        relu_aware: whether answers that make no difference are left free.
        by_sensitivity: whether points that matter more are drawn more often.
    """
    spec = unit.row.spec
    axes = len(spec.kernel_size)
    calls = [
        (len(run.batches) * math.prod(_batch_of(site, spec)), site.output_shape[-1 - axes : -1])
        for run in runs
        for site in (run.original.sites[index] for index, _ in unit.calls)
    ]
    examples = sum(times for times, _ in calls)
    weights = spec.taps * spec.group_in_features
    if points is None:
        points = max(_POINTS, math.ceil(_EQUATIONS * weights / max(1, examples)))
    points = max(1, min(points, _NUMBERS // max(1, examples * spec.taps * spec.in_features)))
    count = sum(times * min(points, math.prod(spatial)) for times, spatial in calls)
    channels = max(spec.group_in_features, spec.out_features)
    if count < channels:
        raise ValueError(
            f"the batches give {count} points of {unit.row.path!r}, fewer than its {channels} "
            f"channels; its kernel wants {weights} or more. Give more "
            "examples, or a larger points."
        )
    groups = spec.feature_group_count
    patches = jnp.zeros((groups, count, spec.taps * spec.group_in_features))
    found: list[tuple[Array, ...]] = []
    at = 0
    for run in runs:
        carried = _Computation(run.original), _Computation(run.small)
        for batch in run.batches:
            for site, place in unit.calls:
                pick = jax.random.fold_in(key, len(found))
                options = spec, points, pick, relu_aware, by_sensitivity
                seen, *answers = _looked_at(run, carried, batch, site, place, *options)
                # Batches computed at the same time would be in memory together.
                patches = jax.block_until_ready(_with_part(patches, seen, at))
                found.append(tuple(answers))
                at += seen.shape[1]
    wanted, lower, upper, finite = _together(patches, found)
    for name, is_finite in zip(("gets", "should answer"), finite, strict=True):
        if not is_finite:
            raise ValueError(
                f"what {unit.row.path!r} {name} is not finite; the weights are damaged, or the "
                "inputs are not those of the model."
            )
    return patches, wanted, lower, upper


@functools.partial(jax.jit, donate_argnums=0)
def _with_part(whole: Array, part: Array, at: Array | int) -> Array:
    """Return all patches with some of them put in; in place, as they are most of the memory."""
    return lax.dynamic_update_slice_in_dim(whole, part, at, axis=1)


@jax.jit
def _together(
    patches: Array, found: Sequence[tuple[Array, ...]]
) -> tuple[Array, Array, Array, list[Array]]:
    """Return the answers of all calls, and whether patches and answers are finite."""
    wanted, lower, upper = (jnp.concatenate(parts) for parts in zip(*found, strict=True))
    return wanted, lower, upper, [jnp.isfinite(a).all() for a in (patches, wanted)]


def _batch_of(site: Site, spec: ConvSpec) -> tuple[int, ...]:
    """Return the batch axes of a call, mapped ones that all use one kernel first."""
    mapped = () if site.kernel.aval.ndim > 1 else site.output.aval.shape[:-1]
    return (*mapped, *site.output_shape[: -1 - len(spec.kernel_size)])


def _looked_at(
    run: Run,
    carried: tuple[_Computation, _Computation],
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
    answers, *pooled = carried[0](wanted, batch.original)
    (inputs,) = carried[1]([other.input], batch.small)
    if place is not None:
        answers = answers.reshape(-1, answers.shape[-1])[place]
        if inputs.ndim > 1:
            inputs = inputs.reshape(-1, inputs.shape[-1])[place]
    axes = len(spec.kernel_size) + 1
    return _sampled(
        inputs,
        answers,
        run.felt(batch, site) if by_sensitivity else None,
        (after.alone, now.alone, pooled[0] if pooled else None) if relu_aware else None,
        key,
        shapes=(other.input_shape[-axes:], site.output_shape[-axes:]),
        spec=spec,
        points=points,
    )


@functools.partial(jax.jit, static_argnames=("shapes", "spec", "points"))
def _sampled(
    inputs: Array,
    answers: Array,
    felt: Array | None,
    following: tuple[Following, Following, Array | None] | None,
    key: PRNGKeyArray,
    *,
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    spec: ConvSpec,
    points: int,
) -> tuple[Array, Array, Array, Array]:
    """Return patches, answers and good answers at points of every example that are drawn."""
    x, y = (a.reshape(-1, *shape) for a, shape in zip((inputs, answers), shapes, strict=True))
    spatial = y.shape[1:-1]
    total = math.prod(spatial)
    # The largest of log-weights with Gumbel noise are a draw without replacement.
    scores = jax.random.gumbel(key, (y.shape[0], total))
    if felt is not None:
        scores = scores + _log_weights(felt.reshape(y.shape[0], total))
    chosen = lax.top_k(scores, min(points, total))[1]
    patches = patches_at(x, spec, chosen).astype(jnp.float32)
    y = points_at(y, chosen).astype(jnp.float32)
    lower = upper = y
    if following is not None:
        after, now, pooled = following
        pooled = None if pooled is None else pooled.astype(jnp.float32)
        lower, upper = intervals(y, after, now, chosen, spatial, pooled)
    n = spec.out_features
    return patches, y.reshape(-1, n), lower.reshape(-1, n), upper.reshape(-1, n)


def _log_weights(felt: Float[Array, "b points"]) -> Float[Array, "b points"]:
    mean = felt.mean(1, keepdims=True)
    share = jnp.where(mean > 0, felt / jnp.where(mean > 0, mean, 1), 1)
    return jnp.log((1 - _UNIFORM) * share + _UNIFORM)


def place_in_stack(network: Network, row: PlanRow, index: int) -> tuple[int, ...]:
    """Return where in a stack of kernels the one of a number stands."""
    kernel = network.params(row.path)["kernel"]
    stack = kernel.shape[: kernel.ndim - len(row.spec.kernel_shape)]
    return tuple(int(i) for i in np.unravel_index(index, stack))


def part(value: Array, place: tuple[int, ...] | None) -> Array:
    """Return what stands at a place of a stack; all, of what is not stacked."""
    return jnp.asarray(value if place is None else value[place])


def put(
    values: MutableMapping[str, Array], name: str, new: Array, place: tuple[int, ...] | None
) -> None:
    """Change a variable, at a place of a stack or as a whole; it keeps its type."""
    old = jnp.asarray(values[name])
    new = new.astype(old.dtype)
    values[name] = new if place is None else old.at[place].set(new)
