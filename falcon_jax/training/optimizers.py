"""Learning-rate schedules and optimizers."""

import functools

import jax.numpy as jnp
import optax

from falcon_jax.training.config import TrainConfig


def make_schedule(config: TrainConfig, steps_per_epoch: int) -> optax.Schedule:
    """Return the learning rate as a function of the step.

    Linear warm-up from 0, then: ``step``, the rate times ``factor`` for every boundary passed;
    ``cosine``, ``rate * (1 + cos(pi t)) / 2`` with t from 0 after the warm-up to 1 at the end;
    ``constant``.

    Args:
        config: of the training run.
        steps_per_epoch: steps in one epoch.

    Returns:
        The schedule.
    """
    rate = config.learning_rate
    warmup = round(config.warmup_epochs * steps_per_epoch)
    total = config.epochs * steps_per_epoch

    def schedule(step: optax.ScalarOrSchedule) -> optax.ScalarOrSchedule:
        step = jnp.asarray(step)
        if config.schedule == "step":
            passed = sum(step >= round(b * steps_per_epoch) for b in config.boundaries)
            value = rate * config.factor ** jnp.asarray(passed, jnp.float32)
        elif config.schedule == "cosine":
            progress = jnp.clip((step - warmup) / max(total - warmup, 1), 0, 1)
            value = rate * (1 + jnp.cos(jnp.pi * progress)) / 2
        else:
            value = jnp.full((), rate)
        return jnp.where(step < warmup, rate * step / max(warmup, 1), value)

    return schedule  # type: ignore[return-value]


@functools.lru_cache(maxsize=32)  # one object for equal configs, so that steps are found again
def make_optimizer(config: TrainConfig, steps_per_epoch: int) -> optax.GradientTransformation:
    """Return the optimizer of a training run.

    ``sgd``: the gradient plus ``weight_decay`` times the parameter goes into the momentum, as in
    PyTorch and in the paper. ``adamw``: decoupled weight decay.

    Args:
        config: of the training run.
        steps_per_epoch: steps in one epoch.

    Returns:
        The optimizer, its schedule included.
    """
    schedule = make_schedule(config, steps_per_epoch)
    if config.optimizer == "adamw":
        return optax.adamw(schedule, weight_decay=config.weight_decay)
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(schedule, momentum=config.momentum, nesterov=config.nesterov),
    )
