"""The training step and the evaluation step, as pure jitted functions."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from falcon_jax.data.augmentation import Augmentation, augment, normalize
from falcon_jax.training.network import Arrays, Network

Batch = Mapping[str, Array]
Metrics = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that training changes.

    Attributes:
        step: steps taken.
        params: parameters by path, float32.
        statistics: BatchNorm statistics by path, float32.
        opt_state: of the optimizer.
    """

    step: Int[Array, ""]
    params: Arrays
    statistics: Arrays
    opt_state: optax.OptState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What happens to uint8 images on the device.

    Attributes:
        mean: of each channel, in units of [0, 1].
        std: of each channel, likewise.
        augmentation: of training images.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)


def init_state(
    params: Arrays, statistics: Arrays, optimizer: optax.GradientTransformation
) -> TrainState:
    """Return the state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        statistics=statistics,
        opt_state=optimizer.init(params),
    )


def cross_entropy(
    logits: Float[Array, "b classes"], labels: Int[Array, "b"], *, label_smoothing: float = 0.0
) -> Float[Array, "b"]:
    """Return the cross entropy of every example with smoothed targets.

    ``-sum_c q_c log p_c``, ``q = (1 - e) onehot(label) + e / classes``

    Args:
        logits: one row an example.
        labels: true classes.
        label_smoothing: e.

    Returns:
        One value an example.
    """
    targets = jax.nn.one_hot(labels, logits.shape[-1])
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, label_smoothing))


_KEPT = 32  # compiled steps: the networks of a comparison, which come again with every seed


@functools.lru_cache(maxsize=_KEPT)
def make_train_step(
    network: Network,
    optimizer: optax.GradientTransformation,
    preprocessing: Preprocessing,
    *,
    label_smoothing: float,
) -> Callable[[TrainState, Batch, PRNGKeyArray], tuple[TrainState, Metrics]]:
    """Return the jitted step ``(state, batch, key) -> (state, metrics)``; donates the old state.

    Augmentation and dropout depend on ``key``, that of the whole run, and the step's number alone,
    so a run that is restored from a checkpoint goes on exactly as it would have.

    Args:
        network: structure of the model.
        optimizer: updates the parameters.
        preprocessing: of the images.
        label_smoothing: see `cross_entropy`.

    Returns:
        The step. Metrics: ``loss`` and ``accuracy`` of the batch, before the update.
    """

    def train_step(
        state: TrainState, batch: Batch, key: PRNGKeyArray
    ) -> tuple[TrainState, Metrics]:
        augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
        images = augment(augment_key, batch["image"], preprocessing.augmentation)
        x = normalize(images, preprocessing.mean, preprocessing.std)

        def loss(params: Arrays) -> tuple[Array, tuple[Array, Arrays]]:
            logits, statistics = network.apply_training(params, state.statistics, x, dropout_key)
            losses = cross_entropy(logits, batch["label"], label_smoothing=label_smoothing)
            return losses.mean(), (logits, statistics)

        gradient = jax.value_and_grad(loss, has_aux=True)
        (value, (logits, statistics)), gradients = gradient(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        new = TrainState(
            step=state.step + 1,
            params=jax.tree.map(jnp.add, state.params, updates),
            statistics=statistics,
            opt_state=opt_state,
        )
        accuracy = jnp.mean(logits.argmax(axis=-1) == batch["label"])
        return new, {"loss": value, "accuracy": accuracy}

    return jax.jit(train_step, donate_argnums=0)


@functools.lru_cache(maxsize=_KEPT)
def make_eval_step(
    network: Network, preprocessing: Preprocessing
) -> Callable[[Arrays, Arrays, Batch], Metrics]:
    """Return the jitted step ``(params, statistics, batch) -> sums``.

    Args:
        network: structure of the model.
        preprocessing: of the images; there is no augmentation.

    Returns:
        The step. Its sums over the examples whose ``mask`` is 1: ``loss``, ``top1``, ``top5``
        (correct among the five best, or among all classes if they are fewer) and ``count``.
    """

    def eval_step(params: Arrays, statistics: Arrays, batch: Batch) -> Metrics:
        x = normalize(batch["image"], preprocessing.mean, preprocessing.std)
        logits = network.apply(params, statistics, x)
        labels, mask = batch["label"], batch["mask"]
        own = jnp.take_along_axis(logits, labels[:, None], axis=1)
        better = (logits > own).sum(axis=1)
        earlier = jnp.arange(logits.shape[1])[None, :] < labels[:, None]
        rank = better + ((logits == own) & earlier).sum(axis=1)
        # Comparisons with NaN are false; without this a diverged network would be perfect.
        rank = jnp.where(jnp.isfinite(logits).all(axis=1), rank, logits.shape[1] + 5)
        return {
            "loss": jnp.where(mask > 0, cross_entropy(logits, labels), 0).sum(),
            "top1": ((rank < 1) * mask).sum(),
            "top5": ((rank < 5) * mask).sum(),
            "count": mask.sum(),
        }

    return jax.jit(eval_step)
