"""`search` and `shrink`: which layer gets which method and rank for a target of the model."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray

from falcon_jax.compression.autotune import Times, form_times
from falcon_jax.compression.batchnorm import reestimate_batchnorm
from falcon_jax.compression.calibration import ResponseError, calibrate
from falcon_jax.compression.compress import compress
from falcon_jax.compression.deployment import deploy
from falcon_jax.compression.outputs import OutputLoss, outputs_of
from falcon_jax.compression.plan import Plan, PlanRow, Rule
from falcon_jax.compression.profile import median_ms
from falcon_jax.compression.progress import shown
from falcon_jax.compression.sensitivity import EXAMPLES, Effect, Sensitivity, sensitivity
from falcon_jax.compression.target import Quantity, Target
from falcon_jax.frameworks.interface import M, Model, framework_of
from falcon_jax.frameworks.layers import Inputs
from falcon_jax.frameworks.norms import NotReachedError
from falcon_jax.frameworks.program import Network
from falcon_jax.methods.base import Method
from falcon_jax.terminal import Printable, Table

_LINES = 20  # of a front that is printed
MOST = 4096  # points that are kept of a front


@dataclasses.dataclass(frozen=True, kw_only=True)
class Front(Printable):
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

    def parts(self) -> list[Table | str]:
        """Return some of the points as a table."""
        lines = [(self.quantity, "share", "predicted loss")]
        count = len(self.costs)
        for point in np.unique(np.linspace(0, count - 1, min(count, _LINES)).round().astype(int)):
            cost, loss = float(self.costs[point]), float(self.losses[point])
            lines.append((_told(cost), f"{cost / self.original:.3f}", f"{loss:.2e}"))
        return [Table(lines, right=(0, 1, 2))]


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
    points: int | None = None,
    examples: int = EXAMPLES,
    key: PRNGKeyArray | None = None,
    progress: bool = False,
) -> SearchedPlan:
    """Return the plan with which a model meets a target at the least loss of its outputs.

    ``min sum_l loss_l(c_l)  subject to  sum_l cost_l(c_l) <= target``, over a choice c_l for every
    layer, among the candidates and to stay. The loss of each is measured (`sensitivity`); the
    choices are found by dynamic programming (`pareto_front`), for all targets at once.

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
        points: of every example's answer, at most so many are looked at, as in `calibrate`.
        examples: that outputs are compared on.
        key: for the points; ``jax.random.key(0)`` if not given.
        progress: whether to show a progress bar on standard error.

    Returns:
        A plan for `compress`, with the front of all alternatives. With a target of latency, methods
        are in the form that is fastest, and none is slower than what it replaces.

    Raises:
        ValueError: if the target cannot be reached, saying what is nearest; a target of latency
            comes without a sample; or as `sensitivity` says.

    >>> import jax
    >>> from flax import nnx
    >>> from falcon_jax import Falcon
    >>> conv = nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(0))
    >>> x = jax.random.normal(jax.random.key(0), (4, 8, 8, 8))
    >>> plan = search(conv, [x], target=Target(mult_adds=0.3), candidates=[Falcon()])
    >>> plan.rows[0].method, plan.front.costs.tolist()
    (Falcon(rank=1, impl='auto'), [9216.0, 37376.0])
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


def pareto_front(
    costs: Sequence[Float[np.ndarray, "_"]],
    losses: Sequence[Float[np.ndarray, "_"]],
    *,
    most: int = MOST,
) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"], Int[np.ndarray, "points i"]]:
    """Return the choices that no other one beats in cost and loss, by dynamic programming.

    ``min sum_i loss_i(c_i)  subject to  sum_i cost_i(c_i) <= budget``, for all budgets at once. It
    is exact while a front has at most ``most`` points; of a longer one, the point of least loss is
    kept in each of so many equal intervals of cost, so that a budget is used up to
    ``range / most`` for every item.

    Args:
        costs: of each item's options.
        losses: of the same.
        most: points that are kept after each item.

    Returns:
        Costs, increasing; losses, decreasing; and the option of each item.

    Raises:
        ValueError: if an item has no option, or as many costs as losses are not given.

    Reference:
        Multiple-choice knapsack problem: Kellerer, Pferschy, Pisinger: Knapsack Problems, 2004,
        Section 11.5 (dynamic programming with dominance).

    >>> pareto_front([np.array([4.0, 1.0]), np.array([2.0, 1.0])],
    ...              [np.array([0.0, 3.0]), np.array([0.0, 1.0])])[2].tolist()
    [[1, 1], [1, 0], [0, 1], [0, 0]]
    """
    for cost, loss in zip(costs, losses, strict=True):
        if len(cost) != len(loss) or not len(cost):
            raise ValueError("every item has at least one option, each with a cost and a loss.")
    total, suffered = np.zeros(1), np.zeros(1)
    chosen = np.zeros((1, 0), np.int64)
    for cost, loss in zip(costs, losses, strict=True):
        sums = (total[:, None] + cost).ravel()
        risks = (suffered[:, None] + loss).ravel()
        kept = _undominated(sums, risks, most)
        parent, option = np.divmod(kept, len(cost))
        total, suffered = sums[kept], risks[kept]
        chosen = np.concatenate([chosen[parent], option[:, None]], axis=1)
    return total, suffered, chosen


def _undominated(
    costs: Float[np.ndarray, " n"], losses: Float[np.ndarray, " n"], most: int
) -> Int[np.ndarray, " kept"]:
    """Return the indices of a front, by increasing cost."""
    order = np.lexsort((losses, costs))
    before = np.minimum.accumulate(np.concatenate([[np.inf], losses[order][:-1]]))
    front = order[losses[order] < before]
    if len(front) <= most:
        return front
    low, high = costs[front[0]], costs[front[-1]]
    interval = np.minimum(((costs[front] - low) * (most / (high - low))).astype(np.int64), most - 1)
    # Losses decrease along a front: the last of an interval has the least.
    last = np.append(interval[1:] != interval[:-1], True)
    last[0] = True
    return front[last]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shrunk(Printable):
    """What `shrink` did.

    Attributes:
        effects: of every candidate in every layer.
        plan: that was carried out; ``plan.front`` has the alternatives.
        responses: errors of the layers' answers, as `calibrate` reports them.
        loss: of the outputs f on the batches, ``E ||f - f'||^2 / E ||f - E f||^2``, after each
            stage: ``compressed``, ``calibrated`` and, if it was tried, ``statistics``.
        kept: the stage that was returned.
    """

    effects: Sensitivity
    plan: SearchedPlan
    responses: tuple[ResponseError, ...]
    loss: dict[str, float]
    kept: str

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "effects": self.effects.to_json(),
            "plan": self.plan.to_json(),
            "front": self.plan.front.to_json(),
            "predicted_loss": self.plan.predicted_loss,
            "predicted_ms": self.plan.predicted_ms,
            "responses": [dataclasses.asdict(response) for response in self.responses],
            "loss": self.loss,
            "kept": self.kept,
        }

    def parts(self) -> list[Table | str]:
        """Return the plan, the errors of the answers and the losses as tables."""
        answers = [("layer", "error of answers before", "after")]
        answers += [
            (response.path or "(model)", f"{response.before:.4f}", f"{response.after:.4f}")
            for response in self.responses
        ]
        stages = [("stage", "loss of the output")]
        stages += [
            (name + (", kept" if name == self.kept else ""), f"{loss:.2e}")
            for name, loss in self.loss.items()
        ]
        tables = Table(answers, right=(1, 2)), "", Table(stages, right=(1,))
        return [*self.plan.parts(), "", *tables]


def shrink(
    model: M,
    batches: Iterable[Any],
    *,
    target: Target,
    candidates: Sequence[Method] | None = None,
    rules: Sequence[Rule] = (),
    sample: Any | None = None,
    progress: bool = False,
    report: Callable[[Shrunk], None] | None = None,
) -> M:
    """Return a model made smaller for a target: search, compress, calibrate, BatchNorm statistics.

    Statistics of BatchNorms are estimated anew, and kept if the outputs are then nearer to the
    original's. `distill` can follow.

    Args:
        model: a trained NNX model, or a Linen module bound to its variables; it is not changed.
        batches: unlabelled inputs, a few hundred examples in all.
        target: what to meet, such as ``Target(mult_adds=0.15)``.
        candidates: methods; those of `search` if not given.
        rules: of what is decided already, as in `search`.
        sample: example input that costs are counted for, and latency is measured on.
        progress: whether to show progress bars on standard error.
        report: is called with what was done; its ``plan`` is what `save_compressed` wants.

    Returns:
        The smaller model; a Linen module bound.

    Raises:
        ValueError: as `search` and `calibrate` do.

    >>> import jax
    >>> from flax import nnx
    >>> from falcon_jax import Falcon
    >>> conv = nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(0))
    >>> x = jax.random.normal(jax.random.key(0), (4, 8, 8, 8))
    >>> small = shrink(conv, [x], target=Target(mult_adds=0.3), candidates=[Falcon()])
    >>> small(x).shape
    (4, 8, 8, 8)
    """
    given = [Inputs.of(batch) for batch in batches]
    effects = sensitivity(
        model, given, candidates=candidates, rules=rules, sample=sample, progress=progress
    )
    plan = search(model, given, target=target, effects=effects, sample=sample, progress=progress)
    if not plan.replaced:
        raise ValueError(
            f"{target} is met by the model as it is: nothing to shrink. Give a smaller one."
        )
    loss_of = OutputLoss(outputs_of(Network.of(model), given))
    responses: list[ResponseError] = []
    compressed = compress(model, plan)
    calibrated = calibrate(
        model, compressed, plan, given, progress=progress, report=responses.append
    )
    stages = {"compressed": compressed, "calibrated": calibrated}
    with contextlib.suppress(NotReachedError):
        estimated = reestimate_batchnorm(calibrated, given)
        values = [Network.of(m).values for m in (calibrated, estimated)]
        if any(not jnp.array_equal(old, values[1][name]) for name, old in values[0].items()):
            stages["statistics"] = estimated
    loss = {name: loss_of(outputs_of(Network.of(m), given)) for name, m in stages.items()}
    kept = min(loss, key=lambda name: loss[name])
    if report is not None:
        report(Shrunk(effects=effects, plan=plan, responses=tuple(responses), loss=loss, kept=kept))
    return stages[kept]
