"""Learning-rate schedules and optimizers."""

import functools

import jax.numpy as jnp
import optax

from falcon_jax.training.run import TrainSettings


def make_schedule(settings: TrainSettings, steps_per_epoch: int) -> optax.Schedule:
    """Return the learning rate as a function of the step.

    Linear warm-up from 0, then: ``step``, the rate times ``factor`` for every boundary passed;
    ``cosine``, ``rate * (1 + cos(pi t)) / 2`` with t from 0 after the warm-up to 1 at the end;
    ``constant``.

    Args:
        settings: of the training run.
        steps_per_epoch: steps in one epoch.

    Returns:
        The schedule.
    """
    rate = settings.learning_rate
    warmup = round(settings.warmup_epochs * steps_per_epoch)
    total = settings.epochs * steps_per_epoch

    def schedule(step: optax.ScalarOrSchedule) -> optax.ScalarOrSchedule:
        step = jnp.asarray(step)
        if settings.schedule == "step":
            passed = sum(step >= round(b * steps_per_epoch) for b in settings.boundaries)
            value = rate * settings.factor ** jnp.asarray(passed, jnp.float32)
        elif settings.schedule == "cosine":
            progress = jnp.clip((step - warmup) / max(total - warmup, 1), 0, 1)
            value = rate * (1 + jnp.cos(jnp.pi * progress)) / 2
        else:
            value = jnp.full((), rate)
        return jnp.where(step < warmup, rate * step / max(warmup, 1), value)

    return schedule  # type: ignore[return-value]


@functools.lru_cache(maxsize=32)  # one object for equal settings, so that steps are found again
def make_optimizer(settings: TrainSettings, steps_per_epoch: int) -> optax.GradientTransformation:
    """Return the optimizer of a training run.

    ``sgd``: the gradient plus ``weight_decay`` times the parameter goes into the momentum, as in
    PyTorch and in the paper. ``adamw``: decoupled weight decay.

    Args:
        settings: of the training run.
        steps_per_epoch: steps in one epoch.

    Returns:
        The optimizer, its schedule included.
    """
    schedule = make_schedule(settings, steps_per_epoch)
    if settings.optimizer == "adamw":
        return optax.adamw(schedule, weight_decay=settings.weight_decay)
    return optax.chain(
        optax.add_decayed_weights(settings.weight_decay),
        optax.sgd(schedule, momentum=settings.momentum, nesterov=settings.nesterov),
    )
