"""`sensitivity`: how much a model's outputs suffer from each way to replace each layer."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from falcon_jax.compression.answers import answers_at_points, observed
from falcon_jax.compression.observation import (
    Run,
    Unit,
    mean_after,
    part,
    place_in_stack,
    put,
    runs_of,
    units_of,
)
from falcon_jax.compression.outputs import OutputLoss, floating_outputs
from falcon_jax.compression.plan import (
    Plan,
    PlanRow,
    Rule,
    check_all_used,
    first_match,
    make_plan,
    row_of,
)
from falcon_jax.compression.progress import shown
from falcon_jax.frameworks.interface import Model, framework_of
from falcon_jax.frameworks.layers import Inputs
from falcon_jax.frameworks.program import Network
from falcon_jax.methods.base import Method
from falcon_jax.methods.channel_decomposition import ChannelDecomposition
from falcon_jax.methods.falcon import Falcon
from falcon_jax.methods.ranks import Budget
from falcon_jax.methods.spatial_decomposition import SpatialDecomposition
from falcon_jax.nn.method_conv import for_trained
from falcon_jax.solvers.intervals import moments_of
from falcon_jax.solvers.moments import best_bias, dense_kernel, explained
from falcon_jax.terminal import Printable, Table

RATIOS = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
CANDIDATES: tuple[Method, ...] = (
    *(Falcon(rank=rank) for rank in (1, 2, 3, 4)),
    *(ChannelDecomposition(rank=Budget(ratio)) for ratio in RATIOS),
    *(SpatialDecomposition(rank=Budget(ratio)) for ratio in RATIOS),
)
EXAMPLES = 32
_STAYS = "left alone by path='.*'"  # of the plan in which every layer stays
STEPS = 2  # of a fit; more change the errors of all by a few percent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effect:
    """What comes of replacing one layer alone.

    Attributes:
        candidate: the method as it was given.
        row: of a plan that replaces it.
        error: of the layer's answers, ``E ||y - y'||^2 / E ||y - E y||^2``.
        loss: of the outputs f of the model, ``E ||f - f'||^2 / E ||f - E f||^2``; the mean of
            these, where there are several outputs.
    """

    candidate: Method
    row: PlanRow
    error: float
    loss: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sensitivity(Printable):
    """How much a model's outputs suffer from each way to replace each layer.

    Attributes:
        plan: in which every layer stays.
        effects: of the candidates, by path of the layer; those that neither save parameters nor
            mult-adds are left out.
    """

    plan: Plan
    effects: Mapping[str, tuple[Effect, ...]]

    def to_json(self) -> dict[str, Any]:
        """Return the effects as plain data."""
        return {
            path: [
                {
                    "candidate": str(effect.candidate),
                    "method": str(effect.row.method),
                    **dataclasses.asdict(effect.row.after),
                    "error": effect.error,
                    "loss": effect.loss,
                }
                for effect in effects
            ]
            for path, effects in self.effects.items()
        }

    def parts(self) -> list[Table | str]:
        """Return the table of candidates, layer by layer."""
        lines = [("layer", "becomes", "params", "mult-adds", "error", "loss of the output")]
        for path, effects in self.effects.items():
            for effect in effects:
                assert effect.row.method is not None
                after = effect.row.after
                numbers = f"{after.params:,}", f"{after.mult_adds:,}"
                lines.append(
                    (
                        path or "(model)",
                        effect.row.method.label(),
                        *numbers,
                        f"{effect.error:.2e}",
                        f"{effect.loss:.2e}",
                    )
                )
        return [Table(lines, right=(2, 3, 4, 5))]


def sensitivity(
    model: Model,
    batches: Iterable[Any],
    *,
    candidates: Sequence[Method] | None = None,
    rules: Sequence[Rule] = (),
    sample: Any | None = None,
    points: int | None = None,
    examples: int = EXAMPLES,
    key: PRNGKeyArray | None = None,
    progress: bool = False,
) -> Sensitivity:
    """Measure how much the outputs of a model suffer from each way to replace each layer.

    One layer at a time is fitted to what the original answers to data, by every candidate
    (`Method.fit_moments`), and the rest of the model is run on its new answers.

    Args:
        model: a trained NNX model, or a Linen module bound to its variables; it is not changed.
        batches: unlabelled inputs, a few hundred examples in all.
        candidates: methods; FALCON of ranks 1 to 4, channel and spatial decomposition of several
            ratios if not given.
        rules: of what is decided already: a layer that a rule matches stays, or has the rule's
            method as its only candidate.
        sample: example input that mult-adds are counted for; the first batch if not given.
        points: of every example's answer, at most so many are looked at, as in `calibrate`.
        examples: that outputs are compared on: the first batches that have so many.
        key: for the points; ``jax.random.key(0)`` if not given.
        progress: whether to show a progress bar on standard error.

    Returns:
        The effects of every candidate that saves something, layer by layer.

    Raises:
        ValueError: if there are no batches or too few, they do not fit the model, activations are
            not finite, or no candidate saves anything in any layer.

    Warns:
        UserWarning: naming the layers that are called where they cannot be looked at.

    >>> from flax import nnx
    >>> conv = nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(0))
    >>> x = jax.random.normal(jax.random.key(0), (4, 8, 8, 8))
    >>> found = sensitivity(conv, [x], candidates=[Falcon()])
    >>> (effect,) = found.effects[""]  # the path of the model itself
    >>> effect.row.after.mult_adds, 0 < effect.loss < 1
    (9216, True)
    """
    batches = [Inputs.of(batch) for batch in batches]
    for name, number in (("points", points), ("examples", examples)):
        if number is not None and number < 1:
            raise ValueError(f"{name} is at least 1; got {number}.")
    if not batches:
        raise ValueError("at least one batch of inputs is needed; got none.")
    inputs = (batches[0] if sample is None else Inputs.of(sample)).shapes
    plan = make_plan(model, [Rule(method=None)], inputs)
    network = Network.of(model)
    rows = _candidates(model, plan, CANDIDATES if candidates is None else candidates, rules)
    if not rows:
        raise ValueError(
            "no candidate saves parameters or mult-adds in any convolution that can be replaced; "
            "give other candidates, or other rules."
        )
    runs = runs_of(network, network, list(rows), batches)
    units = units_of(runs, [found[0][1] for found in rows.values()], network)
    compared = _first_batches(runs, examples)
    loss_of = OutputLoss(_outputs(compared))
    key = jax.random.key(0) if key is None else key
    found: dict[str, list[list[tuple[float, float]]]] = {}
    steps = shown(units, "sensitivity", progress=progress, name=lambda unit: unit.name)
    answers = answers_at_points(units, runs, points, key, relu_aware=False, by_sensitivity=True)
    for index, (unit, seen) in enumerate(zip(steps, answers, strict=True)):
        for run in runs:
            run.advance(units[index:], to_outputs=True)
        methods = [row.method for _, row in rows[unit.row.path] if row.method is not None]
        data = observed(unit, runs, seen, relu_aware=False)[:2]
        changes = _changes(unit, methods, data, network, mean_after(unit, runs))
        effects = [(error, loss_of(_outputs(compared, values))) for error, values in changes]
        found.setdefault(unit.row.path, []).append(effects)
    return Sensitivity(
        plan=dataclasses.replace(plan, rows=tuple(_told(row, rows, rules) for row in plan.rows)),
        effects={
            path: tuple(
                # Of the layers of a stack, errors are averaged, and losses add up.
                Effect(
                    candidate=candidate,
                    row=row,
                    error=sum(error for error, _ in each) / len(each),
                    loss=sum(loss for _, loss in each),
                )
                for (candidate, row), each in zip(
                    rows[path], zip(*effects, strict=True), strict=True
                )
            )
            for path, effects in found.items()
        },
    )


Candidates = tuple[tuple[Method, PlanRow], ...]


def _candidates(
    model: Model,
    plan: Plan,
    candidates: Sequence[Method],
    rules: Sequence[Rule],
) -> dict[str, Candidates]:
    """Return, for every layer, the candidates that save something there, with their rows."""
    assert plan.inputs is not None
    layers = framework_of(model).find_layers(model, plan.inputs)
    check_all_used(rules, [(row.path, row.spec) for row in plan.rows])
    kernels = framework_of(model).kernels(model, [row.path for row in plan.rows])
    found: dict[str, Candidates] = {}
    for layer in layers:
        spec = layer.spec
        if spec is None or layer.obstacle or layer.path in found or layer.path not in kernels:
            continue
        if layer.kind != "conv" or not layer.calls:
            continue
        decided = first_match(rules, layer.path, spec)
        given = candidates if decided is None else [rules[decided].method]
        rows: dict[Method, tuple[Method, PlanRow]] = {}
        for candidate in given:
            if candidate is None or candidate.supports(spec) is not None:
                continue
            method = for_trained(candidate, jnp.asarray(kernels[layer.path]), spec)
            row = row_of(layer, spec, method, plan.inputs.batch)
            saves = row.after.params < row.before.params
            saves |= row.after.mult_adds < row.before.mult_adds
            if saves:
                rows.setdefault(method, (candidate, row))
        if rows:
            found[layer.path] = tuple(rows.values())
    return found


def _told(row: PlanRow, candidates: Mapping[str, Candidates], rules: Sequence[Rule]) -> PlanRow:
    """Return the row of a layer with the reason why it has no candidates, if it can have some."""
    if row.path in candidates or row.reason != _STAYS:
        return row
    decided = first_match(rules, row.path, row.spec)
    if decided is not None and rules[decided].method is None:
        return dataclasses.replace(row, reason=f"left alone by path={rules[decided].path!r}")
    return dataclasses.replace(row, reason="no candidate saves parameters or mult-adds here")


def _first_batches(runs: Sequence[Run], examples: int) -> list[tuple[Run, int]]:
    """Return runs and indices of batches with so many examples, or all."""
    found = []
    for run in runs:
        for index, batch in enumerate(run.batches):
            if examples > 0:
                found.append((run, index))
            examples -= next((a.shape[0] for a in batch.inputs if a.ndim), 1)
    return found


def _outputs(
    compared: Sequence[tuple[Run, int]], values: Mapping[str, Array] | None = None
) -> Iterator[list[Array]]:
    """Yield the model's outputs with other values of its variables, from where it was carried."""
    for run, index in compared:
        program = run.small
        yield program.compute(floating_outputs(program), run.batches[index].state, values)


def _changes(
    unit: Unit,
    methods: Sequence[Method],
    answers: Sequence[Array],
    network: Network,
    mean: str | None,
) -> Iterator[tuple[float, dict[str, Array]]]:
    """Yield, for each method, the error of a layer's answers and the model's values with it."""
    spec, path = unit.row.spec, unit.row.path
    stack = None if unit.index is None else place_in_stack(network, unit.row, unit.index)
    trained = part(network.params(path)["kernel"], stack)
    moments = moments_of(*answers)
    use_bias = spec.use_bias or mean is not None
    if not use_bias:
        moments = moments.about_zero()
    dense = dense_kernel(moments, trained)
    for method in methods:
        params = method.fit(dense, spec)
        for _ in range(STEPS):
            params = method.fit_moments(trained, spec, moments, params)
        kernel = method.kernel(params, spec)
        values = dict(network.values)
        put(values, network.name(path, "kernel"), kernel, stack)
        if use_bias:
            bias = jnp.asarray(best_bias(moments, kernel), jnp.float32)
            if mean is None:
                put(values, network.name(path, "bias"), bias, stack)
            else:
                put(values, mean, values[mean] - bias, None)
        yield max(1 - explained(moments, kernel), 0.0), values
