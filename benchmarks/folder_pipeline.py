"""Images a second read from a folder and cropped at random, beside PIL in a loop and torchvision.

All read the same made-up JPEG files, which lie in the page cache, and give uint8 images of 224x224
pixels. What is timed is a whole epoch, the start of its workers included.

python -m benchmarks.folder_pipeline --out results/folder_pipeline.json
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from falcon_jax.data.batching import train_batches
from falcon_jax.data.dataset import AnySplit
from falcon_jax.data.fake import make_image_folder
from falcon_jax.data.loading import DataConfig, load_dataset
from falcon_jax.report.table import Column, describe_machine, format_ratio, format_table, write_json

IMAGE_SIZE = 224
BASELINE = "PIL in a loop"

COLUMNS = (
    Column(name="pipeline", header="Pipeline"),
    Column(name="ratio", header="Of PIL in a loop", format=format_ratio),
    Column(name="ratio_lowest", header="Lowest", format=format_ratio),
    Column(name="ratio_highest", header="Highest", format=format_ratio),
    Column(name="images_per_s", header="Images/s", format="{:,.0f}".format),
    Column(name="steady_images_per_s", header="After the first", format="{:,.0f}".format),
    Column(name="first_batch_s", header="First batch, s", format="{:.2f}".format),
)

Pass = Callable[[int], Iterable[int]]  # epoch -> the size of each batch, as it comes


def pil_loop(folder: Path, batch_size: int) -> Pass:
    """Open, convert, crop, resize and mirror one image after the other, in one thread."""
    paths = sorted(folder.glob("train/*/*.jpg"))

    def run(epoch: int) -> Iterator[int]:
        random = np.random.default_rng(epoch)
        order = random.permutation(len(paths))
        for start in range(0, len(paths) - batch_size + 1, batch_size):
            images = []
            for i in order[start : start + batch_size]:
                image = Image.open(paths[i]).convert("RGB")
                part = image.crop(random_box(random, *image.size))
                pixels = np.asarray(
                    part.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
                )
                images.append(pixels[:, ::-1] if random.random() < 0.5 else pixels)
            yield len(np.stack(images))

    return run


def random_box(random: np.random.Generator, width: int, height: int) -> tuple[int, int, int, int]:
    """A random rectangle as torchvision draws it, but tried until it fits."""
    while True:
        area = random.uniform(0.08, 1) * width * height
        ratio = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
            return left, top, left + w, top + h


def load(folder: Path, workers: int) -> AnySplit:
    return load_dataset(
        DataConfig(
            source="folder",
            data_dir=str(folder),
            image_size=IMAGE_SIZE,
            workers=workers,
            validation_fraction=0.0,
        )
    ).train


def ours(folder: Path, batch_size: int, workers: int) -> Pass:
    split = load(folder, workers)

    def run(epoch: int) -> Iterator[int]:
        for batch in train_batches(split, batch_size, seed=0, epoch=epoch):
            yield len(batch["image"])

    return run


def torchvisions(folder: Path, batch_size: int, workers: int) -> Pass:
    torch, torchvision = import_torchvision()
    transforms = torchvision.transforms
    dataset = torchvision.datasets.ImageFolder(
        str(folder / "train"),
        transforms.Compose(
            [
                transforms.RandomResizedCrop(IMAGE_SIZE),
                transforms.RandomHorizontalFlip(),
                transforms.PILToTensor(),
            ]
        ),
    )
    loader = torch.utils.data.DataLoader(
        dataset, batch_size, shuffle=True, drop_last=True, num_workers=workers
    )

    def run(epoch: int) -> Iterator[int]:
        torch.manual_seed(epoch)
        for images, _ in loader:
            yield len(images)

    return run


def import_torchvision() -> tuple[Any, Any]:
    import torch

    try:
        import torchvision
    except RuntimeError:  # without its compiled operators it asks for two on import
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        library.define("qnms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        torch.folder_pipeline_library = library  # it must live as long as torch  # pyright: ignore
        import torchvision
    return torch, torchvision


def timed(run: Pass, epoch: int) -> dict[str, float]:
    """Times one epoch.

    Args:
        run: gives the size of each batch of an epoch.
        epoch: number of the epoch.

    Returns:
        images a second over the epoch and after its first batch, and seconds until that.
    """
    times, sizes = [time.perf_counter()], []
    for size in run(epoch):
        times.append(time.perf_counter())
        sizes.append(size)
    return {
        "images_per_s": sum(sizes) / (times[-1] - times[0]),
        "steady_images_per_s": sum(sizes[1:]) / (times[-1] - times[1]),
        "first_batch_s": times[1] - times[0],
    }


def measure(pipelines: dict[str, Pass], repeats: int) -> list[dict[str, Any]]:
    """Times epochs of each pipeline in turn, after one of each to warm up.

    Args:
        pipelines: by name; BASELINE is among them.
        repeats: epochs of each that are timed.

    Returns:
        one row a pipeline: medians; the ratios are those within one turn.
    """
    turns = [
        {name: timed(run, epoch) for name, run in pipelines.items()} for epoch in range(repeats + 1)
    ][1:]
    rows = []
    for name in pipelines:
        rates = [turn[name]["images_per_s"] for turn in turns]
        ratios = [turn[name]["images_per_s"] / turn[BASELINE]["images_per_s"] for turn in turns]
        row = {
            "pipeline": name,
            "ratio": statistics.median(ratios),
            "ratio_lowest": min(ratios),
            "ratio_highest": max(ratios),
            "images_per_s": statistics.median(rates),
            "images_per_s_all": rates,
        }
        for kind in ("steady_images_per_s", "first_batch_s"):
            row[kind] = statistics.median(turn[name][kind] for turn in turns)
        rows.append(row)
    return rows


def check_milliseconds(folder: Path, repeats: int) -> list[float]:
    """Times finding all files and reading their headers, milliseconds a file."""
    files = len(list(folder.glob("*/*/*")))
    milliseconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        load(folder, 0)
        milliseconds.append(1e3 * (time.perf_counter() - start) / files)
    return milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.folder_pipeline", description=__doc__
    )
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--side", type=int, default=400, help="mean height and width, pixels")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=5, help="epochs that are timed")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_image_folder(
            Path(temporary) / "images", num_train=settings.images, num_val=10, side=settings.side
        )
        sizes = [path.stat().st_size for path in folder.glob("train/*/*")]
        pipelines = {BASELINE: pil_loop(folder, settings.batch_size)}
        for workers in settings.workers:
            told = f"{workers} workers" if workers else "0 workers (threads)"
            pipelines[f"falcon_jax, {told}"] = ours(folder, settings.batch_size, workers)
        for workers in settings.workers:
            name = f"torchvision and DataLoader, {workers} workers"
            pipelines[name] = torchvisions(folder, settings.batch_size, workers)
        rows = measure(pipelines, settings.repeats)
        checks = check_milliseconds(folder, settings.repeats)
    print(format_table(rows, COLUMNS))
    print(f"checking the headers: {statistics.median(checks):.3f} ms a file")
    write_json(
        settings.out,
        {
            "command": shlex.join(["python", "-m", "benchmarks.folder_pipeline", *sys.argv[1:]]),
            "machine": describe_machine(),
            "images": settings.images,
            "mean_bytes_a_file": statistics.mean(sizes),
            "side": settings.side,
            "image_size": IMAGE_SIZE,
            "batch_size": settings.batch_size,
            "repeats": settings.repeats,
            "check_ms_a_file": statistics.median(checks),
            "check_ms_a_file_all": checks,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
