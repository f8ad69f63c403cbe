"""`shrink`: a model made smaller for a target, in one call."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp

from falcon_jax.compression.batchnorm import reestimate_batchnorm
from falcon_jax.compression.calibration import ResponseError, calibrate
from falcon_jax.compression.compress import compress
from falcon_jax.compression.outputs import OutputLoss, outputs_of
from falcon_jax.compression.plan import Rule
from falcon_jax.compression.search import SearchedPlan, Target, search
from falcon_jax.compression.sensitivity import Sensitivity, sensitivity
from falcon_jax.frameworks.interface import M
from falcon_jax.frameworks.layers import Inputs
from falcon_jax.frameworks.norms import NotReachedError
from falcon_jax.frameworks.program import Network
from falcon_jax.methods.base import Method
from falcon_jax.wording import aligned


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shrunk:
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

    def __str__(self) -> str:
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
        parts = str(self.plan), aligned(answers, right=(1, 2)), aligned(stages, right=(1,))
        return "\n\n".join(parts)


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
