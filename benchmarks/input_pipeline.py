"""Images a second of the input pipeline, beside those of a training step.

The step is that of the demo's small VGG with FALCON of rank 1, the fastest to train that ships.

python -m benchmarks.input_pipeline --out results/input_pipeline.json
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx

import falcon_jax as fj
from falcon_jax.data.augmentation import Augmentation, augment, normalize
from falcon_jax.data.batching import steps_per_epoch, train_batches
from falcon_jax.data.dataset import Split, channel_statistics
from falcon_jax.data.fake import make_fake
from falcon_jax.report.table import Column, describe_machine, format_ratio, format_table, write_json
from falcon_jax.training.config import TrainConfig
from falcon_jax.training.network import Network
from falcon_jax.training.optimizers import make_optimizer
from falcon_jax.training.step import Preprocessing, init_state, make_train_step

AUGMENTATION = Augmentation(crop_padding=4, flip=True)

COLUMNS = (
    Column(name="stage", header="Stage"),
    Column(name="images_per_s", header="Images/s", format="{:,.0f}".format),
    Column(name="milliseconds_per_batch", header="ms/batch", format="{:.3f}".format),
    Column(name="ratio_to_step", header="Of training step", format=format_ratio),
)


def host_stage(batches: Iterable[dict[str, Any]]) -> None:
    for _ in batches:
        pass


def device_stage(split: Split) -> Callable[[Iterable[dict[str, Any]]], None]:
    """The gather, the transfer, and crop, flip and normalisation in one jitted function."""
    mean, std = channel_statistics(split.images)

    @jax.jit
    def prepare_batch(key: jax.Array, images: jax.Array) -> jax.Array:
        return normalize(augment(key, images, AUGMENTATION), mean, std)

    def run(batches: Iterable[dict[str, Any]]) -> None:
        key = jax.random.key(0)
        for batch in batches:
            prepare_batch(key, batch["image"]).block_until_ready()

    return run


def step_images_per_s(split: Split, batch_size: int, *, repeats: int) -> float:
    """Times the jitted training step on batches that lie ready on the device."""
    mean, std = channel_statistics(split.images)
    model = fj.models.vgg8_cifar(
        in_features=split.image_shape[-1],
        unit=fj.models.method_unit(fj.Falcon()),
        rngs=nnx.Rngs(0),
    )
    network, params, statistics_ = Network.split(model)
    optimizer = make_optimizer(TrainConfig(), 100)
    step = jax.jit(
        make_train_step(
            network,
            optimizer,
            Preprocessing(mean=mean, std=std, augmentation=AUGMENTATION),
            label_smoothing=0.0,
        )
    )
    images = next(train_batches(split, batch_size, seed=0, epoch=0))
    batch = jax.device_put({**images, "stop": np.zeros(batch_size, np.float32)})
    state = init_state(params, statistics_, optimizer)
    key = jax.random.key(0)
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, batch, key, {}))
        seconds.append(time.perf_counter() - start)
    return batch_size / statistics.median(seconds[2:])


def measure(
    split: Split,
    batch_size: int,
    *,
    repeats: int,
    step_images_per_s: float,
) -> list[dict[str, Any]]:
    """Times whole epochs of each stage, median of the repeats, after one epoch of warm-up.

    Args:
        split: the images.
        batch_size: images a batch.
        repeats: epochs that are timed.
        step_images_per_s: what the training step does; each stage is compared with it.

    Returns:
        one row a stage.
    """
    stages = {
        "gather on the host": host_stage,
        "gather, augment and normalise": device_stage(split),
    }
    steps = steps_per_epoch(len(split), batch_size)
    rows = []
    for name, run in stages.items():
        seconds = []
        for epoch in range(repeats + 1):
            start = time.perf_counter()
            run(train_batches(split, batch_size, seed=0, epoch=epoch))
            seconds.append(time.perf_counter() - start)
        typical = statistics.median(seconds[1:])
        images_per_s = steps * batch_size / typical
        row = {
            "stage": name,
            "images_per_s": images_per_s,
            "milliseconds_per_batch": 1e3 * typical / steps,
            "ratio_to_step": images_per_s / step_images_per_s,
        }
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.input_pipeline", description=__doc__
    )
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5, help="epochs that are timed")
    settings = parser.parse_args()
    split = make_fake(
        image_size=settings.image_size, seed=0, num_train=settings.images, num_test=10
    ).train
    assert isinstance(split, Split)
    step = step_images_per_s(split, settings.batch_size, repeats=4 * settings.repeats)
    rows = measure(split, settings.batch_size, repeats=settings.repeats, step_images_per_s=step)
    print(format_table(rows, COLUMNS))
    print(f"training step: {step:,.0f} images/s")
    write_json(
        settings.out,
        {
            "command": shlex.join(["python", "-m", "benchmarks.input_pipeline", *sys.argv[1:]]),
            "machine": describe_machine(),
            "images": settings.images,
            "image_shape": split.image_shape,
            "batch_size": settings.batch_size,
            "repeats": settings.repeats,
            "step_images_per_s": step,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
