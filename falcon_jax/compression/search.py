"""`search`: which layer gets which method and rank, for a target of the whole model."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray

from falcon_jax.compression.autotune import Times, form_times
from falcon_jax.compression.deployment import deploy
from falcon_jax.compression.observation import POINTS
from falcon_jax.compression.plan import Plan, PlanRow, Rule
from falcon_jax.compression.profile import median_ms
from falcon_jax.compression.progress import shown
from falcon_jax.compression.sensitivity import EXAMPLES, Effect, Sensitivity, sensitivity
from falcon_jax.frameworks.interface import Model, framework_of
from falcon_jax.frameworks.layers import Inputs
from falcon_jax.methods.base import Method
from falcon_jax.settings import is_number
from falcon_jax.solvers.pareto import pareto_front
from falcon_jax.wording import aligned

Quantity = Literal["params", "mult_adds", "latency_ms"]
_LINES = 20  # of a front that is printed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What a compressed model should come to; one of these.

    Attributes:
        params: share of the original's parameters if at most 1, else their number.
        mult_adds: likewise, of the mult-adds for one example.
        latency: share of the original's latency, measured on this device.
        latency_ms: milliseconds for the sample, measured on this device.
        loss: of the outputs f, ``E ||f - f'||^2 / E ||f - E f||^2``, as it is predicted; with as
            few mult-adds as possible.

    Raises:
        ValueError: if not exactly one is given, or it is out of range.

    >>> Target(mult_adds=0.15)
    Target(mult_adds=0.15)
    """

    params: float | int | None = None
    mult_adds: float | int | None = None
    latency: float | int | None = None
    latency_ms: float | int | None = None
    loss: float | int | None = None

    def __post_init__(self):
        given = self._given()
        if len(given) != 1:
            told = ", ".join(given) or "nothing"
            raise ValueError(
                "a target is one of params=, mult_adds=, latency=, latency_ms= and loss=, such as "
                f"Target(mult_adds=0.15); got {told}."
            )
        ((name, value),) = given.items()
        bound = " and at most 1" if name == "latency" else ""
        wrong = not is_number(value) or value <= 0 or (name == "latency" and value > 1)
        if wrong:
            raise ValueError(f"{name} of a target is a number above 0{bound}; got {value!r}.")

    def _given(self) -> dict[str, float | int]:
        return {k: v for k, v in vars(self).items() if v is not None}

    @property
    def quantity(self) -> Quantity:
        """What is to be small."""
        if self.latency is not None or self.latency_ms is not None:
            return "latency_ms"
        return "mult_adds" if self.params is None else "params"

    def __repr__(self) -> str:
        return f"Target({', '.join(f'{k}={v!r}' for k, v in self._given().items())})"

    def budget(self, original: float) -> float:
        """Return what a model may cost at most, given what the original costs."""
        if self.latency_ms is not None:
            return float(self.latency_ms)
        share = next((v for v in (self.latency, self.params, self.mult_adds) if v), math.inf)
        return float(share * original if share <= 1 else share)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Front:
    """The models that no other one beats in cost and predicted loss.

    Attributes:
        quantity: the cost.
        original: what the original costs.
        stays: plan in which every layer stays.
        options: what each layer may become, by path; the first is that it stays.
        costs: of whole models, increasing.
        losses: of these, decreasing, as `Target` has them.
        choices: of these, the option of each layer.
    """

    quantity: Quantity
    original: float
    stays: Plan
    options: Mapping[str, tuple["Option", ...]]
    costs: Float[np.ndarray, " points"]
    losses: Float[np.ndarray, " points"]
    choices: Int[np.ndarray, "points layers"]

    def plan(self, target: Target) -> "SearchedPlan":
        """Return the plan of least loss that meets a target.

        Args:
            target: of the same quantity, or a loss.

        Raises:
            ValueError: if it cannot be met, saying what is nearest, or is of another quantity.
        """
        if target.loss is not None:
            met = np.nonzero(self.losses <= target.loss)[0]
            return self._plan(int(met[0]))  # staying costs nothing of the output
        if target.quantity != self.quantity:
            raise ValueError(
                f"the front is one of {self.quantity}, and {target} asks for {target.quantity}; "
                f"search with this target, or give one of {self.quantity} or loss."
            )
        budget = target.budget(self.original)
        met = np.nonzero(self.costs <= budget * (1 + 1e-9))[0]
        if not len(met):
            raise ValueError(
                f"{target} is {_told(budget)} {self.quantity} of {_told(self.original)}, which "
                f"cannot be reached: the nearest is {_told(self.costs[0])}, a share of "
                f"{self.costs[0] / self.original:.3f}. Give more candidates, rules that leave less "
                "alone, or another target."
            )
        return self._plan(int(met[-1]))

    def _plan(self, point: int) -> "SearchedPlan":
        chosen = {
            path: options[choice]
            for (path, options), choice in zip(
                self.options.items(), self.choices[point], strict=True
            )
        }
        rows = [chosen[row.path].row if row.path in chosen else row for row in self.stays.rows]
        return SearchedPlan(
            rows=tuple(rows),
            rest=self.stays.rest,
            solver=self.stays.solver,
            inputs=self.stays.inputs,
            front=self,
            predicted_loss=float(self.losses[point]),
            predicted_ms=float(self.costs[point]) if self.quantity == "latency_ms" else None,
        )

    def to_json(self) -> dict[str, Any]:
        """Return costs and losses as plain data."""
        return {
            "quantity": self.quantity,
            "original": self.original,
            "costs": self.costs.tolist(),
            "losses": self.losses.tolist(),
        }

    def __str__(self) -> str:
        lines = [(self.quantity, "share", "predicted loss")]
        count = len(self.costs)
        for point in np.unique(np.linspace(0, count - 1, min(count, _LINES)).round().astype(int)):
            cost, loss = float(self.costs[point]), float(self.losses[point])
            lines.append((_told(cost), f"{cost / self.original:.3f}", f"{loss:.2e}"))
        return aligned(lines, right=(0, 1, 2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchedPlan(Plan):
    """A plan that `search` found.

    Attributes:
        front: all that it could have been; ``front.plan(target)`` returns another one.
        predicted_loss: of the outputs f before any fit in sequence,
            ``E ||f - f'||^2 / E ||f - E f||^2``, the sum over layers that are replaced alone.
        predicted_ms: latency; None if the search was not for latency.
    """

    front: Front
    predicted_loss: float
    predicted_ms: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """What a layer may become.

    Attributes:
        row: of a plan.
        cost: in the front's quantity.
        loss: of the outputs.
    """

    row: PlanRow
    cost: float
    loss: float


def search(
    model: Model,
    batches: Iterable[Any],
    *,
    target: Target,
    candidates: Sequence[Method] | None = None,
    rules: Sequence[Rule] = (),
    sample: Any | None = None,
    effects: Sensitivity | None = None,
    points: int = POINTS,
    examples: int = EXAMPLES,
    key: PRNGKeyArray | None = None,
    progress: bool = False,
) -> SearchedPlan:
    """Return the plan with which a model meets a target at the least loss of its outputs.

    ``min sum_l loss_l(c_l)  subject to  sum_l cost_l(c_l) <= target``, over a choice c_l for every
    layer, among the candidates and to stay. The loss of each is measured (`sensitivity`); the
    choices are found by dynamic programming (`falcon_jax.solvers.pareto`), for all targets at once.

    Args:
        model: a trained NNX model, or a Linen module bound to its variables; it is not changed.
        batches: unlabelled inputs, a few hundred examples in all.
        target: what to meet.
        candidates: methods; FALCON of ranks 1 to 4, channel and spatial decomposition of several
            ratios if not given.
        rules: of what is decided already: a layer that a rule matches stays, or has the rule's
            method as its only candidate.
        sample: example input that costs are counted for, and latency is measured on; the first
            batch if not given, but a target of latency needs it.
        effects: as `sensitivity` returned them; measured if not given.
        points: of every example's answer, at most so many are looked at.
        examples: that outputs are compared on.
        key: for the points; ``jax.random.key(0)`` if not given.
        progress: whether to show a progress bar on standard error.

    Returns:
        A plan for `compress`, with the front of all alternatives. With a target of latency, methods
        are in the form that is fastest, and none is slower than what it replaces.

    Raises:
        ValueError: if the target cannot be reached, saying what is nearest; a target of latency
            comes without a sample; or as `sensitivity` says.
    """
    if target.quantity == "latency_ms" and sample is None:
        raise ValueError(
            f"{target} is measured on a sample: give sample=, an example input of the batch size "
            "that the model is to serve."
        )
    if effects is None:
        effects = sensitivity(
            model,
            batches,
            candidates=candidates,
            rules=rules,
            sample=sample,
            points=points,
            examples=examples,
            key=key,
            progress=progress,
        )
    if target.quantity == "latency_ms":
        options, original = _timed(model, effects, Inputs.of(sample), progress)
    else:
        options = _counted(effects, target.quantity)
        original = float(getattr(effects.plan.before, target.quantity))
    return _front(target.quantity, original, effects.plan, options).plan(target)


Options = dict[str, tuple[Option, ...]]


def _counted(effects: Sensitivity, quantity: Quantity) -> Options:
    """Return what each layer may become, first that it stays, with what is counted."""
    return {
        path: tuple(
            Option(row=row, cost=float(getattr(row.after, quantity)), loss=loss)
            for row, loss in ((_stays(found[0]), 0.0), *((_remarked(e), e.loss) for e in found))
        )
        for path, found in effects.effects.items()
    }


def _stays(effect: Effect) -> PlanRow:
    row = effect.row
    reason = "the search leaves it alone"
    return dataclasses.replace(row, method=None, after=row.before, reason=reason)


def _remarked(effect: Effect) -> PlanRow:
    reason = f"alone, it costs {effect.loss:.1e} of the output"
    return dataclasses.replace(effect.row, reason=reason)


def _front(quantity: Quantity, original: float, stays: Plan, options: Options) -> Front:
    costs, losses, choices = pareto_front(
        [np.array([o.cost for o in each], float) for each in options.values()],
        [np.array([o.loss for o in each]) for each in options.values()],
    )
    standing = sum(each[0].cost for each in options.values())
    # Layers alone may take longer than the whole of them.
    scale = min(1.0, original / standing)
    return Front(
        quantity=quantity,
        original=original,
        stays=stays,
        options=options,
        costs=original + scale * (costs - standing),
        losses=losses,
        choices=choices,
    )


def _timed(
    model: Model, effects: Sensitivity, sample: Inputs, progress: bool
) -> tuple[Options, float]:
    """Return what each layer may become that is faster than to stay, and the model's latency."""
    layers = {layer.path: layer for layer in framework_of(model).find_layers(model, sample.shapes)}
    known: Times = {}
    options: Options = {}
    for path in shown(list(effects.effects), "latency", progress=progress):
        found = effects.effects[path]
        standard, timed = math.inf, []
        for effect in found:
            assert effect.row.method is not None
            ms = form_times(layers[path], effect.row.method, known)
            standard = min(standard, ms.pop(None))
            form, least = min(ms.items(), key=lambda item: item[1])
            row = dataclasses.replace(_remarked(effect), method=form)
            timed.append(Option(row=row, cost=least, loss=effect.loss))
        stays = Option(row=_stays(found[0]), cost=standard, loss=0.0)
        options[path] = (stays, *(option for option in timed if option.cost < standard))
    serve = deploy(model, sample)
    return options, median_ms(lambda: serve(*sample.arrays))


def _told(cost: float) -> str:
    return f"{cost:,.0f}" if cost >= 1000 else f"{cost:.3g}"
