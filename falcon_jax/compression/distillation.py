"""`distill`: a compressed model trained to answer as the original does, without labels."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from falcon_jax.compression.batchnorm import reestimate_batchnorm
from falcon_jax.compression.outputs import floating_outputs
from falcon_jax.compression.progress import shown
from falcon_jax.frameworks.interface import M, framework_of
from falcon_jax.frameworks.layers import Inputs
from falcon_jax.frameworks.program import Network, Program
from falcon_jax.settings import is_number, is_whole

HELD_OUT = 0.2  # share of the batches
PATIENCE = 6  # looks at the held-out batches without a gain
WARMUP = 0.05  # share of the steps
CLIP = 1.0  # norm of gradients


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
    """How far a model in distillation is from the original, on batches held out.

    Attributes:
        step: steps taken.
        loss: of the parameters at that step.
        averaged: of their moving average.
    """

    step: int
    loss: float
    averaged: float


def distill(
    model: M,
    compressed: M,
    batches: Iterable[Any],
    *,
    steps: int = 1000,
    learning_rate: float = 3e-4,
    weight_decay: float = 0.0,
    temperature: float | None = None,
    response_weight: float = 1.0,
    ema: float = 0.99,
    looks: int = 20,
    batchnorm: Literal["frozen", "reestimate"] = "frozen",
    key: PRNGKeyArray | None = None,
    progress: bool = False,
    report: Callable[[Look], None] | None = None,
) -> M:
    """Return a compressed model that was trained to answer as the original does.

    ``min  d(f, f') + w mean_l E ||y_l - y'_l||^2 / E ||y_l - E y_l||^2`` over all parameters of the
    compressed model, f the outputs and y_l the answers of the layers that were replaced. ``d`` is
    ``E ||f - f'||^2 / E ||f - E f||^2``, or, with a temperature T,
    ``T^2 KL(softmax(f / T), softmax(f' / T))`` of the last axis. AdamW, one batch a step, cosine
    schedule; both models are in evaluation mode, so that BatchNorm statistics and dropout play no
    part. A fifth of the batches is held out; of the parameters that were looked at there, and of
    their moving average, the best are returned: never worse than those it began with.

    Args:
        model: the original; a Linen module bound to its variables.
        compressed: to begin with, best after `calibrate`; it is not changed.
        batches: unlabelled inputs, at least two.
        steps: of training at most; every batch is used as often as another.
        learning_rate: the highest, after a warm-up of a twentieth of the steps.
        weight_decay: of AdamW.
        temperature: of classifiers' outputs; None compares outputs as they are.
        response_weight: w; 0 leaves the layers' answers out.
        ema: decay of the moving average for each step.
        looks: at the held-out batches, in equal distances; after six without a gain it ends.
        batchnorm: ``reestimate`` estimates the statistics anew at the end, and keeps them if that
            makes the held-out loss smaller.
        key: for the order of the batches; ``jax.random.key(0)`` if not given.
        progress: whether to show a progress bar on standard error.
        report: is called with every look.

    Returns:
        A new model; a Linen module bound to new variables.

    Raises:
        ValueError: if there are fewer than two batches, they do not fit, the two models do not
            answer alike, or a setting is out of range.

    Reference:
        Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015, Section 2;
        Romero et al.: FitNets, ICLR 2015, for the layers' answers.

    >>> from flax import nnx
    >>> from falcon_jax.compression.compress import compress
    >>> from falcon_jax.compression.plan import Rule, make_plan
    >>> from falcon_jax.methods.falcon import Falcon
    >>> conv = nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(0))
    >>> x = jax.random.normal(jax.random.key(0), (4, 8, 8, 8))
    >>> small, looks = compress(conv, make_plan(conv, [Rule(method=Falcon())])), []
    >>> small = distill(conv, small, [x, x], steps=3, looks=1, report=looks.append)
    >>> [look.step for look in looks], looks[-1].loss < looks[0].loss
    ([0, 3], True)
    """
    _check(steps, learning_rate, temperature, response_weight, ema, looks)
    given = [Inputs.of(batch) for batch in batches]
    if len(given) < 2:
        raise ValueError(
            f"distillation needs two batches or more, one of them held out; got {len(given)}."
        )
    teacher, student = Network.of(model), Network.of(compressed)
    replaced = list(framework_of(compressed).methods_of(compressed))
    losses = _Losses(teacher, student, replaced, temperature, response_weight)
    held = given[len(given) - max(1, round(HELD_OUT * len(given))) :]
    seen = given[: len(given) - len(held)]
    names = [student.prefix + name for name in framework_of(compressed).params(compressed)]
    start = {name: student.values[name] for name in names}
    rest = {name: value for name, value in student.values.items() if name not in start}
    best, least = start, losses.mean(start | rest, held)
    first = Look(step=0, loss=least, averaged=least)
    if not np.isfinite(least):
        raise ValueError("the loss that distillation begins with is not finite.")
    if report is not None:
        report(first)

    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, max(1, round(WARMUP * steps)), max(2, steps)
    )
    # A step whose numbers are not finite changes nothing.
    optimizer = optax.apply_if_finite(
        optax.chain(
            optax.clip_by_global_norm(CLIP), optax.adamw(schedule, weight_decay=weight_decay)
        ),
        max_consecutive_errors=steps,
    )
    params, averaged, state = start, start, optimizer.init(start)
    order = _order(len(seen), steps, jax.random.key(0) if key is None else key)
    every, waited = max(1, steps // looks), 0
    for step in shown(range(1, steps + 1), "distill", progress=progress):
        loss_of, named, arrays = losses.of(seen[order[step - 1]])
        params, averaged, state = _step(
            params,
            averaged,
            state,
            rest,
            named,
            arrays,
            ema=ema,
            loss_of=loss_of,
            optimizer=optimizer,
        )
        if step % every and step != steps:
            continue
        now, mean = losses.mean(params | rest, held), losses.mean(averaged | rest, held)
        if report is not None:
            report(Look(step=step, loss=now, averaged=mean))
        waited += 1
        for loss, candidate in ((now, params), (mean, averaged)):
            if loss < least:
                best, least, waited = candidate, loss, 0
        if waited >= PATIENCE:
            break
    student.values.update(best)
    found = student.rebuilt()
    if batchnorm == "reestimate":
        again = reestimate_batchnorm(found, seen)
        if losses.mean(Network.of(again).values, held) < least:
            return again
    return found


LossOf = Callable[[Mapping[str, Array], Mapping[str, Array], Sequence[Array]], Array]


class _Losses:
    """The loss of a student, as a function of its variables, for every shape of inputs."""

    def __init__(
        self,
        teacher: Network,
        student: Network,
        paths: Sequence[str],
        temperature: float | None,
        response_weight: float,
    ):
        self._teacher, self._student = teacher, student
        self._paths = list(paths)
        self._temperature, self._response_weight = temperature, response_weight
        self._known: list[tuple[Inputs, LossOf]] = []

    def of(self, batch: Inputs) -> tuple[LossOf, dict[str, Array], list[Array]]:
        """Return the function, the teacher's variables and the arrays of a batch."""
        shapes = batch.shapes
        found = next((known for like, known in self._known if like == shapes), None)
        if found is None:
            found = self._built(shapes)
            self._known.append((shapes, found))
        return found, self._teacher.values, [jnp.asarray(a) for a in batch.arrays]

    def mean(self, values: Mapping[str, Array], batches: Sequence[Inputs]) -> float:
        """Return the mean over batches."""
        total = 0.0
        for batch in batches:
            loss_of, named, arrays = self.of(batch)
            total += float(_evaluated(values, named, arrays, loss_of=loss_of))
        return total / len(batches)

    def _built(self, shapes: Inputs) -> LossOf:
        teacher, student = (n.program(shapes, self._paths) for n in (self._teacher, self._student))
        answers = _shared_answers(teacher, student) if self._response_weight else []
        outputs = floating_outputs(teacher), floating_outputs(student)
        if [v.aval.shape for v in outputs[0]] != [v.aval.shape for v in outputs[1]] or not all(
            outputs
        ):
            raise ValueError(
                "the two models' floating-point outputs are not alike; give the original, and the "
                "model that it was compressed to."
            )
        told = teacher.pure([*outputs[0], *(a for a, _ in answers)], teacher.inputs)
        says = student.pure([*outputs[1], *(b for _, b in answers)], student.inputs)
        count = len(outputs[0])

        def loss_of(
            values: Mapping[str, Array], named: Mapping[str, Array], arrays: Sequence[Array]
        ) -> Array:
            wanted, found = jax.lax.stop_gradient(told(named, arrays)), says(values, arrays)
            pairs = list(zip(wanted, found, strict=True))
            total = sum(_divergence(a, b, self._temperature) for a, b in pairs[:count]) / count
            if pairs[count:]:
                far = sum(_relative(a, b) for a, b in pairs[count:]) / len(pairs[count:])
                total += self._response_weight * far
            return jnp.asarray(total)

        return loss_of


def _shared_answers(teacher: Program, student: Program) -> list[tuple[Any, Any]]:
    """Return pairs of the answers that both models give at the layers that were replaced."""
    pairs = zip(teacher.sites, student.sites, strict=False)
    alike = [(a.path, a.answer, b.answer) for a, b in pairs if a.path == b.path]
    return [(a, b) for _, a, b in alike if a.aval.shape == b.aval.shape]


def _divergence(
    wanted: Float[Array, "*batch n"], found: Float[Array, "*batch n"], temperature: float | None
) -> Array:
    if temperature is None:
        return _relative(wanted, found)
    p, q = (jax.nn.log_softmax(y.astype(jnp.float32) / temperature) for y in (wanted, found))
    return temperature**2 * jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))


def _relative(wanted: Array, found: Array) -> Array:
    y, z = wanted.astype(jnp.float32), found.astype(jnp.float32)
    spread = jnp.sum(jnp.square(y - y.mean(tuple(range(y.ndim - 1)), keepdims=True)))
    return jnp.sum(jnp.square(y - z)) / jnp.where(spread > 0, spread, 1)


_evaluated = jax.jit(
    lambda values, named, arrays, *, loss_of: loss_of(values, named, arrays),
    static_argnames="loss_of",
)


def _take_step(
    params: dict[str, Array],
    averaged: dict[str, Array],
    state: Any,
    rest: Mapping[str, Array],
    named: Mapping[str, Array],
    arrays: Sequence[Array],
    *,
    ema: float,
    loss_of: LossOf,
    optimizer: optax.GradientTransformation,
) -> tuple[dict[str, Array], dict[str, Array], Any]:
    gradients = jax.grad(lambda params: loss_of(params | rest, named, arrays))(params)
    updates, state = optimizer.update(gradients, state, params)
    new: Any = optax.apply_updates(params, updates)
    mean: Any = optax.incremental_update(new, averaged, 1 - ema)
    return new, mean, state


_step = jax.jit(_take_step, static_argnames=("ema", "loss_of", "optimizer"))


def _order(batches: int, steps: int, key: PRNGKeyArray) -> list[int]:
    """Return which batch each step takes, all of them once in every round."""
    rounds = -(-steps // batches)
    drawn = [jax.random.permutation(jax.random.fold_in(key, r), batches) for r in range(rounds)]
    return [int(index) for order in jax.device_get(drawn) for index in order][:steps]


def _check(
    steps: int,
    learning_rate: float,
    temperature: float | None,
    response_weight: float,
    ema: float,
    looks: int,
) -> None:
    for name, number in (("steps", steps), ("looks", looks)):
        if not is_whole(number) or number < 1:
            raise ValueError(f"{name} is a whole number of at least 1; got {number!r}.")
    if not is_number(learning_rate) or learning_rate <= 0:
        raise ValueError(f"learning_rate is a number above 0; got {learning_rate!r}.")
    if temperature is not None and (not is_number(temperature) or temperature <= 0):
        raise ValueError(f"temperature is a number above 0, or None; got {temperature!r}.")
    if not is_number(response_weight) or response_weight < 0:
        raise ValueError(f"response_weight is a number of at least 0; got {response_weight!r}.")
    if not is_number(ema) or not 0 <= ema < 1:
        raise ValueError(f"ema is at least 0 and below 1; got {ema!r}.")
