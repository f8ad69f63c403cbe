"""What the layers of a model answer to batches, at points drawn at random."""

import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from falcon_jax.compression.following import Following, intervals, largest_around
from falcon_jax.compression.observation import (
    Computation,
    Run,
    Unit,
    examples_of,
    return_freed_memory,
)
from falcon_jax.frameworks.program import Site
from falcon_jax.ops.geometry import ConvSpec
from falcon_jax.solvers.patches import patches_at, points_at

_POINTS = 120  # of every example's answer, where these are enough
_EQUATIONS = 5  # points for each weight of an output channel that are enough
_UNIFORM = 0.05  # share of points that are chosen whatever hangs on them
_NUMBERS = 1 << 27  # floats of one layer's patches: 512 MB
_AT_ONCE = 5 << 27  # bytes of the answers of the layers that are looked at in one pass: 640 MB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """What a layer answers in a call to all batches, at some points of every example.

    Attributes:
        chosen: the points, in row-major order.
        exact: what it answers there.
        largest: of the windows around the points, if a pooling follows; None otherwise.
        inside: whether the points are in a window of it.
    """

    chosen: Int[np.ndarray, "b points"]
    exact: Float[np.ndarray, "b points n"]
    largest: Float[np.ndarray, "b points n"] | None
    inside: Bool[np.ndarray, "b points"] | None


def answers_at_points(
    units: Sequence[Unit],
    runs: Sequence[Run],
    points: int | None,
    key: PRNGKeyArray,
    *,
    relu_aware: bool,
    by_sensitivity: bool,
) -> Iterator[list[Answers]]:
    """Yield, for each layer in turn, what the original answers: for every run and call in it.

    Of as many layers at a time as are within the limit, so that the original is carried out as
    seldom as that allows.

    Args:
        units: the layers.
        runs: of both models.
        points: of every example's answer, at most; enough for the layer's weights if None.
        key: to draw them with.
        relu_aware: whether the largest of windows are wanted, too.
        by_sensitivity: whether points that matter more are drawn more often.

    Raises:
        ValueError: if the batches have fewer points than a layer has channels.
    """
    counts = [_points_of(unit, runs, points) for unit in units]
    picks = [jax.random.fold_in(key, index) for index in range(len(units))]
    drawn: list[Choices] = []
    for run in runs:  # no comprehension, which would be a caller of what warns
        drawn += [_drawn(run, units, counts, picks, by_sensitivity)]
    sizes = [
        _bytes_of(unit, runs, count, relu_aware=relu_aware)
        for unit, count in zip(units, counts, strict=True)
    ]
    start = 0
    while start < len(units):
        stop = start + 1
        while stop < len(units) and sum(sizes[start : stop + 1]) <= _AT_ONCE:
            stop += 1
        found: list[list[Answers]] = [[] for _ in units[start:stop]]
        for run, choices in zip(runs, drawn, strict=True):
            some = [each[start:stop] for each in choices]
            seen = _seen(run, units[start:stop], some, relu_aware)
            for kept, new in zip(found, seen, strict=True):
                kept += new
        return_freed_memory()
        while found:
            yield found.pop(0)
        start = stop


def _points_of(unit: Unit, runs: Sequence[Run], points: int | None) -> int:
    """Return how many points of every example's answer are looked at."""
    spec = unit.row.spec
    axes = len(spec.kernel_size)
    calls = [
        (len(run.batches) * examples_of(site, spec), site.output_shape[-1 - axes : -1])
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
    return points


def _bytes_of(unit: Unit, runs: Sequence[Run], points: int, *, relu_aware: bool) -> int:
    """Return how large the answers of a layer are, with the windows' largest."""
    calls = [(run, index) for run in runs for index, _ in unit.calls]
    arrays = sum(
        len(run.batches)
        * examples_of(run.original.sites[index], unit.row.spec)
        * (2 if relu_aware and run.following(index)[0].pooled is not None else 1)
        for run, index in calls
    )
    return 4 * arrays * points * unit.row.spec.out_features


Choices = list[list[list[Int[Array, "b points"]]]]  # of every batch, layer and call


def _drawn(
    run: Run,
    units: Sequence[Unit],
    counts: Sequence[int],
    picks: Sequence[PRNGKeyArray],
    by_sensitivity: bool,
) -> Choices:
    """Return the points that are looked at."""
    felt = _felt(run) if by_sensitivity else [None] * len(run.batches)
    found: Choices = []
    for felt_here in felt:
        chosen = [
            [
                _chosen(
                    _felt_at(felt_here, run, index),
                    jax.random.fold_in(pick, len(found) * len(unit.calls) + call),
                    shape=_shape(run.original.sites[index], unit.row.spec)[:-1],
                    points=points,
                )
                for call, (index, _) in enumerate(unit.calls)
            ]
            for unit, points, pick in zip(units, counts, picks, strict=True)
        ]
        # Only points are kept; how much hangs on all of them would be as large as activations.
        found.append(jax.block_until_ready(chosen))
    return found


def _felt(run: Run) -> Iterator[list[Array] | None]:
    """Yield how much hangs on each point of the layers' answers; None if it cannot be told."""
    program = run.original
    squares = program.sensitivity(jax.random.key(0))
    variables = program.variables(program.outputs, program.inputs)
    computation: Computation | None
    computation = Computation(squares, variables, times=len(run.batches), roughly=True)
    for batch in run.batches:
        found = None
        if computation is not None:
            try:
                found = computation(batch.inputs)
            except (TypeError, ValueError, NotImplementedError) as error:
                computation = None
                reason = str(error).partition("\n")[0]
                warnings.warn(
                    "the model cannot be differentiated, so that points are chosen alike "
                    f"(by_sensitivity=False): {reason}",
                    stacklevel=5,
                )
        yield found


def _felt_at(felt: Sequence[Array] | None, run: Run, index: int) -> Array | None:
    site = run.original.sites[index]
    mapped = site.answer.aval.shape != site.output_shape
    return None if felt is None or mapped else felt[index]


def _shape(site: Site, spec: ConvSpec) -> tuple[int, ...]:
    """Return the shape of a layer's answer, all examples in one axis."""
    axes = len(spec.kernel_size) + 1
    return (examples_of(site, spec), *site.output_shape[-axes:])


@functools.partial(jax.jit, static_argnames=("shape", "points"))
def _chosen(
    felt: Array | None, key: PRNGKeyArray, *, shape: tuple[int, ...], points: int
) -> Int[Array, "b points"]:
    """Return points of every example that are drawn."""
    total = math.prod(shape[1:])
    # The largest of log-weights with Gumbel noise are a draw without replacement.
    scores = jax.random.gumbel(key, (shape[0], total))
    if felt is not None:
        scores = scores + _log_weights(felt.reshape(shape[0], total))
    return lax.top_k(scores, min(points, total))[1]


def _log_weights(felt: Float[Array, "b points"]) -> Float[Array, "b points"]:
    mean = felt.mean(1, keepdims=True)
    share = jnp.where(mean > 0, felt / jnp.where(mean > 0, mean, 1), 1)
    return jnp.log((1 - _UNIFORM) * share + _UNIFORM)


def _seen(
    run: Run, units: Sequence[Unit], choices: Choices, relu_aware: bool
) -> Iterator[list[Answers]]:
    """Yield what the original answers in a run, for every layer and its calls."""
    look = _look(run, units, relu_aware)
    wholes: list[np.ndarray] = []
    for index, (batch, chosen) in enumerate(zip(run.batches, choices, strict=True)):
        seen = look([*batch.inputs, *(some for calls in chosen for some in calls)])
        parts, structure = jax.tree.flatten(seen)
        if not wholes:
            wholes = [np.empty((len(run.batches), *a.shape), a.dtype) for a in parts]
        for whole, part in zip(wholes, parts, strict=True):
            whole[index] = part
    flat = [whole.reshape(-1, *whole.shape[2:]) for whole in wholes]
    rows = iter(jax.tree.unflatten(structure, flat))
    for place, unit in enumerate(units):
        found = []
        for call in range(len(unit.calls)):
            exact, largest, inside = next(rows)
            some = np.concatenate([chosen[place][call] for chosen in choices])
            found.append(Answers(chosen=some, exact=exact, largest=largest, inside=inside))
        yield found


Seen = tuple[Array, Array | None, Array | None]  # exact, largest, inside


def _look(run: Run, units: Sequence[Unit], relu_aware: bool) -> Computation:
    """Return a function of the inputs, and of the points of all calls, to what is answered."""
    program = run.original
    calls = [(unit.row.spec, *call) for unit in units for call in unit.calls]
    afters = [run.following(index)[0] if relu_aware else None for _, index, _ in calls]
    outputs = [program.sites[index].output for _, index, _ in calls]
    pooled = [after.pooled for after in afters if after is not None and after.pooled is not None]
    wanted = [*outputs, *pooled], program.inputs
    function = program.pure(*wanted)

    def looked_at(named: Mapping[str, Array], arrays: Sequence[Array]) -> list[Seen]:
        values = iter(function(named, arrays[: len(program.inputs)]))
        chosen = arrays[len(program.inputs) :]
        answers = list(itertools.islice(values, len(calls)))
        found: list[Seen] = []
        for (spec, index, place), some, y, after in zip(
            calls, chosen, answers, afters, strict=True
        ):
            if place is not None:
                y = y.reshape(-1, y.shape[-1])[place]
            y = y.reshape(_shape(program.sites[index], spec))
            largest = inside = None
            if after is not None and after.pooled is not None:
                windows = next(values).astype(jnp.float32)
                largest, inside = largest_around(some, y.shape[1:-1], after, windows)
            found.append((points_at(y, some).astype(jnp.float32), largest, inside))
        return found

    return Computation(looked_at, program.variables(*wanted), times=len(run.batches))


def observed(
    unit: Unit, runs: Sequence[Run], answers: Sequence[Answers], *, relu_aware: bool
) -> tuple[Array, Array, Array, Array]:
    """Return patches that a layer gets, its answers, and the least and the largest good ones.

    Args:
        unit: the layer.
        runs: of both models; the compressed one's were carried to the layer.
        answers: of the original, for every run and call in it.
        relu_aware: whether answers that make no difference are left free.

    Raises:
        ValueError: if anything is not finite.
    """
    spec = unit.row.spec
    axes = len(spec.kernel_size) + 1
    count = sum(each.chosen.size for each in answers)
    patches = jnp.zeros((spec.feature_group_count, count, spec.taps * spec.group_in_features))
    good: list[tuple[Array, ...]] = []
    start, rest = 0, iter(answers)
    for run in runs:
        calls = [(*call, next(rest)) for call in unit.calls]
        starts = start + np.cumsum([0, *(each.chosen.size for _, _, each in calls)])
        start = int(starts[-1])
        for index, _, each in calls:
            after, now = (following.alone for following in run.following(index))
            following = (after, now, each.largest, each.inside) if relu_aware else None
            good.append(_good(each.exact, following))
        sites = [run.small.sites[index] for index, _, _ in calls]
        wanted = [site.input for site in sites]
        values = run.computed([(batch, wanted) for batch in run.batches])
        for number, arrays in enumerate(values):
            for (_, place, each), site, at, x in zip(calls, sites, starts, arrays, strict=False):
                if place is not None and x.ndim > 1:
                    x = x.reshape(-1, x.shape[-1])[place]
                x = x.reshape(-1, *site.input_shape[-axes:])
                some = each.chosen.reshape(len(run.batches), -1, each.chosen.shape[1])[number]
                # Batches computed at the same time would be in memory together.
                patches = jax.block_until_ready(
                    _with_part(patches, x, some, int(at) + number * some.size, spec=spec)
                )
    exact = jnp.concatenate([each.exact.reshape(-1, spec.out_features) for each in answers])
    lower, upper = (jnp.concatenate(parts) for parts in zip(*good, strict=True))
    for name, array in (("gets", patches), ("should answer", exact)):
        if not _is_finite(array):
            raise ValueError(
                f"what {unit.row.path!r} {name} is not finite; the weights are damaged, or the "
                "inputs are not those of the model."
            )
    return patches, exact, lower, upper


@functools.partial(jax.jit, static_argnames="spec", donate_argnums=0)
def _with_part(
    whole: Array, x: Array, chosen: Array, start: Array | int, *, spec: ConvSpec
) -> Array:
    """Return all patches with some of them put in; in place, as they are most of the memory."""
    part = patches_at(x, spec, chosen).astype(jnp.float32)
    return lax.dynamic_update_slice_in_dim(whole, part, start, axis=1)


@jax.jit
def _good(
    exact: Array, following: tuple[Following, Following, Array | None, Array | None] | None
) -> tuple[Array, Array]:
    lower, upper = (exact, exact) if following is None else intervals(exact, *following)
    n = exact.shape[-1]
    return lower.reshape(-1, n), upper.reshape(-1, n)


@jax.jit
def _is_finite(array: Array) -> Array:
    return jnp.isfinite(array).all()
