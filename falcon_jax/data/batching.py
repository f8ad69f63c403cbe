"""Batches of an in-memory split: shuffled for training, padded and masked for evaluation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from falcon_jax.data.dataset import Split, shuffled


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Number of training batches in an epoch; the incomplete last batch is dropped.

    >>> steps_per_epoch(1000, 128)
    7

    Args:
        n: number of training images.
        batch_size: images a batch.

    Returns:
        n // batch_size, at least 1.

    Raises:
        ValueError: if batch_size is not positive or larger than n.
    """
    _require_positive(batch_size)
    if batch_size > n:
        raise ValueError(
            f"batch_size {batch_size} is larger than the training split of {n} images; use at "
            f"most {n}"
        )
    return n // batch_size


def train_batches(
    split: Split, batch_size: int, *, seed: int, epoch: int, start_step: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of one epoch in an order that is a pure function of (seed, epoch).

    A run restarted at a step of an epoch sees the batches that it would have seen.

    Args:
        split: the training split.
        batch_size: images a batch.
        seed: seed of the order.
        epoch: number of the epoch; each has its own order.
        start_step: batches of the epoch to leave out, at the beginning.

    Returns:
        an iterator over batches: "image" uint8 (batch, h, w, c), "label" int32 (batch,), and
        "index" int32 (batch,), the positions in the split.

    Raises:
        ValueError: if batch_size or start_step is out of range, or seed or epoch negative.
    """
    steps = steps_per_epoch(len(split), batch_size)
    if not 0 <= start_step <= steps:
        raise ValueError(f"start_step must lie in [0, {steps}], but is {start_step}")
    order = shuffled(len(split), seed, epoch).astype(np.int32)
    positions = (
        order[step * batch_size : (step + 1) * batch_size] for step in range(start_step, steps)
    )
    return (
        {"image": split.images[index], "label": split.labels[index], "index": index}
        for index in positions
    )


def eval_batches(split: Split, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches over a whole split, in order, each image counted exactly once by its mask.

    The last batch is padded with zero images of label 0 and mask 0, so that all batches have
    one shape.

    Args:
        split: the split; it may be smaller than a batch.
        batch_size: images a batch.

    Returns:
        an iterator over batches: "image" uint8 (batch, h, w, c), "label" int32 (batch,), and
        "mask" float32 (batch,), 1 for an image of the split and 0 for padding.

    Raises:
        ValueError: if batch_size is not positive.
    """
    _require_positive(batch_size)
    return (
        _padded(
            split.images[start : start + batch_size], split.labels[start:][:batch_size], batch_size
        )
        for start in range(0, len(split), batch_size)
    )


def _padded(images: np.ndarray, labels: np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
    lacking = batch_size - len(labels)
    return {
        "image": np.pad(images, [(0, lacking), (0, 0), (0, 0), (0, 0)]),
        "label": np.pad(labels, (0, lacking)),
        "mask": np.pad(np.ones(len(labels), np.float32), (0, lacking)),
    }


def _require_positive(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, but is {batch_size}")
