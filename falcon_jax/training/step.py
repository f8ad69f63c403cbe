"""The training step, as a pure function."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from falcon_jax.data.augmentation import Augmentation, Part, augment, normalize
from falcon_jax.training.devices import AXIS, mean_over_replicas, own_rows
from falcon_jax.training.network import Arrays, Network

Batch = Mapping[str, Array]
Metrics = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that training changes; under pmap with one copy a replica, along a leading axis.

    Attributes:
        step: steps taken.
        skipped: those of them whose numbers were not finite, so that they changed nothing.
        params: parameters by path, float32.
        statistics: BatchNorm statistics by path, float32.
        opt_state: of the optimizer.
    """

    step: Int[Array, "*replicas"]
    skipped: Int[Array, "*replicas"]
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


TeacherArrays = Mapping[str, Arrays]  # params and statistics; nothing without a teacher
TrainStep = Callable[..., tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """A network whose answers another one is to give.

    ``(1 - w) loss + w T^2 KL(softmax(t / T), softmax(s / T))``, t its logits, s the other's

    Attributes:
        network: its structure.
        weight: w.
        temperature: T.

    Reference:
        Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015, Section 2.
    """

    network: Network
    weight: float
    temperature: float

    def loss(
        self, taught: Float[Array, "b classes"], logits: Float[Array, "b classes"]
    ) -> Float[Array, " b"]:
        """Return the divergence of every example."""
        p, q = (jax.nn.log_softmax(y / self.temperature) for y in (taught, logits))
        return self.temperature**2 * jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def init_state(
    params: Arrays, statistics: Arrays, optimizer: optax.GradientTransformation
) -> TrainState:
    """Return the state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
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


def make_train_step(
    network: Network,
    optimizer: optax.GradientTransformation,
    preprocessing: Preprocessing,
    *,
    label_smoothing: float,
    accumulate: int = 1,
    replicated: bool = False,
    teacher: Teacher | None = None,
) -> TrainStep:
    """Return the step ``(state, batch, key, teacher) -> (state, metrics)``, to jit or map.

    Augmentation and dropout depend on ``key``, that of the whole run, and the step's number alone,
    so a run that is restored from a checkpoint goes on exactly as it would have. A step whose loss
    or gradient is not finite changes nothing but the counts.

    Args:
        network: structure of the model; if ``replicated``, one made by `for_replicas`.
        optimizer: updates the parameters.
        preprocessing: of the images.
        label_smoothing: see `cross_entropy`.
        accumulate: parts that a batch is split into; their gradients are averaged. BatchNorm sees
            one part at a time.
        replicated: whether the step is mapped over the axis `devices.AXIS` and sees only the rows
            of one replica.
        teacher: whose answers count beside the labels, on the same augmented images; its arrays
            are the last argument of the step, ``{}`` without one.

    Returns:
        The step. Metrics: ``loss`` and ``accuracy`` of the batch, before the update;
        ``gradient_norm``; ``skipped``, the steps so far that changed nothing; ``stop``, whether any
        process asked for that (``batch["stop"]``, zero or one for every row).
    """

    def loss(
        params: Arrays,
        statistics: Arrays,
        x: Array,
        labels: Array,
        key: PRNGKeyArray,
        arrays: TeacherArrays,
    ) -> tuple[Array, tuple[Array, Arrays]]:
        logits, statistics = network.apply_training(params, statistics, x, key)
        losses = cross_entropy(logits, labels, label_smoothing=label_smoothing)
        if teacher is not None:
            taught = teacher.network.apply(arrays["params"], arrays["statistics"], x)
            share = teacher.weight
            losses = (1 - share) * losses + share * teacher.loss(taught, logits)
        return losses.mean(), (jnp.mean(logits.argmax(axis=-1) == labels), statistics)

    gradient = jax.value_and_grad(loss, has_aux=True)

    def train_step(
        state: TrainState, batch: Batch, key: PRNGKeyArray, arrays: TeacherArrays
    ) -> tuple[TrainState, Metrics]:
        augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
        part = _part(batch["image"]) if replicated else None
        images = augment(augment_key, batch["image"], preprocessing.augmentation, part)
        x = normalize(images, preprocessing.mean, preprocessing.std)

        def piece_sums(statistics: Arrays, piece: tuple[Array, Array, Array]) -> Any:
            x, labels, key = piece
            (value, (accuracy, statistics)), gradients = gradient(
                state.params, statistics, x, labels, key, arrays
            )
            return statistics, (value, accuracy, gradients)

        if accumulate == 1:
            statistics, sums = piece_sums(state.statistics, (x, batch["label"], dropout_key))
        else:
            keys = jax.random.split(dropout_key, accumulate)
            pieces = (_pieces(x, accumulate), _pieces(batch["label"], accumulate), keys)
            statistics, sums = _sum_over(piece_sums, state.statistics, pieces)
        stop = batch["stop"].max()
        if replicated:
            statistics, sums = mean_over_replicas((statistics, sums))
            stop = lax.pmax(stop, AXIS)
        value, accuracy, gradients = jax.tree.map(lambda a: a / accumulate, sums)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        norm = optax.tree.norm(gradients)
        good = jnp.isfinite(value) & jnp.isfinite(norm)
        skipped = state.skipped + (1 - good.astype(jnp.int32))
        params = jax.tree.map(jnp.add, state.params, updates)
        new = (params, statistics, opt_state)
        old = (state.params, state.statistics, state.opt_state)
        params, statistics, opt_state = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
        changed = TrainState(
            step=state.step + 1,
            skipped=skipped,
            params=params,
            statistics=statistics,
            opt_state=opt_state,
        )
        return changed, {
            "loss": value,
            "accuracy": accuracy,
            "gradient_norm": norm,
            "skipped": skipped,
            "stop": stop,
        }

    return train_step


def _part(images: Array) -> Part:
    return Part(count=len(images) * lax.axis_size(AXIS), own_rows=own_rows)


def _sum_over(body: Callable[..., Any], first: Any, pieces: Any) -> tuple[Any, Any]:
    """Carry a value through all pieces and add up what else comes out of them."""

    def add(carry: Any, piece: Any) -> tuple[Any, None]:
        value, sums = carry
        value, new = body(value, piece)
        return (value, jax.tree.map(jnp.add, sums, new)), None

    _, shapes = jax.eval_shape(body, first, jax.tree.map(lambda a: a[0], pieces))
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    (value, sums), _ = lax.scan(add, (first, zeros), pieces)
    return value, sums


def _pieces(rows: Array, count: int) -> Array:
    """Split a batch so that every piece has rows of every device, which stay where they are."""
    return jnp.moveaxis(rows.reshape(len(rows) // count, count, *rows.shape[1:]), 1, 0)
