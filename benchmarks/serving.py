"""Where a compressed network is served: JAX, ONNX Runtime and OpenVINO, float32, bfloat16, 8 bits.

VGG19 on 32x32 images, ResNet-18 on 224x224, the text recognizer on 64x320 and the text detector on
256x256, each as it is and with FALCON of rank 1, random weights. ``jax`` is `deploy`, with its
kernels where they are built; ``ort`` and ``ov`` are ONNX Runtime and OpenVINO on the file of
`falcon_jax.export.onnx`, shapes fixed as servers do; ``bf16`` is the ``precision`` of `deploy` and
OpenVINO's hint; ``int8`` is the file of `onnx_int8`. Ratios are of medians in one run.

With ``--stored`` and ``--data``, stored models are timed, too, and the test split is classified by
each of the runtimes; with ``--ocr``, words are read and found by the trained networks and by those
that `examples.ocr.read` shrank and keeps there.

python -m benchmarks.serving --out results/serving.json [--stored DIRECTORY ... --data digits]
    [--ocr runs/ocr/networks]
"""

from __future__ import annotations

import argparse
import itertools
import os
import pathlib
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

import falcon_jax as fj
import falcon_jax.native
from benchmarks.timing import ratios_and_times, settings_of_run, synchronised, take_turns
from benchmarks.training_free_ocr import STUDIES
from examples.ocr.detector import Detector
from examples.ocr.recognizer import Recognizer
from falcon_jax.cli.data import add_data_options, load_data
from falcon_jax.data.augmentation import normalize
from falcon_jax.data.batching import eval_batches
from falcon_jax.native.library import multiplies_bfloat16
from falcon_jax.report.table import (
    Column,
    format_percent,
    format_ratio,
    format_table,
    write_json,
)
from falcon_jax.storage.models import load_stored

Call = Callable[[np.ndarray], Any]

RATIOS = {
    "jax / ort": ("jax", "ort"),
    "jax / ov": ("jax", "ov"),
    "ort / ort int8": ("ort", "ort int8"),
    "jax / jax bf16": ("jax", "jax bf16"),
    "jax bf16 / ov bf16": ("jax bf16", "ov bf16"),
    "ov / ov bf16": ("ov", "ov bf16"),
    "ov / ov int8": ("ov", "ov int8"),
}
NETWORKS: dict[str, tuple[Callable[[], nnx.Module], tuple[int, int, int]]] = {
    "vgg19": (lambda: fj.models.vgg19_cifar(rngs=nnx.Rngs(0)), (32, 32, 3)),
    "resnet18": (lambda: fj.models.resnet18(rngs=nnx.Rngs(0)), (224, 224, 3)),
    "recognizer": (lambda: Recognizer(rngs=nnx.Rngs(0)), (64, 320, 1)),
    "detector": (lambda: Detector(rngs=nnx.Rngs(0)), (256, 256, 3)),
}
MOST = {"detector": 8}  # images of a batch
TESTS = {"recognizer": 400, "detector": 100}  # images of each score


def compressed(model: nnx.Module, sample: np.ndarray) -> nnx.Module:
    """Return a model whose convolutions but the first are FALCON of rank 1."""
    plan = fj.make_plan(model, [fj.Rule(method=fj.Falcon())], sample)
    keep = fj.Rule(path=plan.rows[0].path, method=None)
    plan = fj.make_plan(model, [keep, fj.Rule(method=fj.Falcon())], sample)
    small = fj.compress(model, plan)
    small.eval()
    return small


def runtimes(
    model: nnx.Module, sample: np.ndarray, calibration: list[np.ndarray], threads: int
) -> dict[str, Call]:
    """Return a model's call in every runtime, of inputs of the sample's shape.

    Args:
        model: in evaluation mode.
        sample: one input.
        calibration: inputs that the ranges of 8 bits are found on.
        threads: of each runtime.
    """
    import onnxruntime
    import openvino

    calls: dict[str, Call] = {"jax": fj.deploy(model, sample)}
    if multiplies_bfloat16():
        calls["jax bf16"] = fj.deploy(model, sample, precision="bfloat16")
    core = openvino.Core()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        whole = fj.export.onnx(model, sample, folder / "whole.onnx", open_sizes=()).path
        small = fj.export.onnx_int8(
            model, sample, folder / "small.onnx", calibration, open_sizes=()
        ).path
        for suffix, file in (("", whole), (" int8", small)):
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.log_severity_level = 3
            session = onnxruntime.InferenceSession(
                file, options, providers=["CPUExecutionProvider"]
            )
            calls[f"ort{suffix}"] = lambda x, s=session: s.run(None, {"x": x})[0]
            for hint in ("f32", "bf16") if not suffix else ("f32",):
                settings = {
                    "INFERENCE_PRECISION_HINT": hint,
                    "INFERENCE_NUM_THREADS": threads,
                    "PERFORMANCE_HINT": "LATENCY",
                }
                request = core.compile_model(file, "CPU", settings).create_infer_request()
                label = "ov bf16" if hint == "bf16" else f"ov{suffix}"
                calls[label] = lambda x, r=request: r.infer({"x": x})[0]
    return calls


def measure(label: str, model: nnx.Module, x: np.ndarray, options: Any) -> dict[str, Any]:
    """Return ratios, milliseconds and spread of one network at one batch."""
    calls = runtimes(model, x, [x], options.threads)
    timed = {name: synchronised(call, x) for name, call in calls.items()}
    times = take_turns(timed, rounds=options.rounds)
    return {"network": label, "batch": len(x), **ratios_and_times(times, RATIOS)}


def networks(options: argparse.Namespace) -> Iterator[tuple[str, nnx.Module, np.ndarray]]:
    """Yield every network that is timed, its label and its inputs."""
    rng = np.random.default_rng(0)
    for name in options.networks:
        make, shape = NETWORKS[name]
        batches = [n for n in options.batches if n <= MOST.get(name, n)]
        for falcon in (False, True):
            for batch in batches:
                x = rng.normal(size=(batch, *shape)).astype(np.float32)
                model = make()
                model.eval()
                label = f"{name}, FALCON" if falcon else name
                yield label, compressed(model, x[:1]) if falcon else model, x
    for path in options.stored:
        stored = load_stored(path)
        shape = load_data(options, stored.description).test.image_shape
        for batch in options.batches:
            yield str(path), stored.model, rng.normal(size=(batch, *shape)).astype(np.float32)


def classified(path: pathlib.Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the share of test images that a stored model classifies correctly in each runtime."""
    stored = load_stored(path)
    preprocessing = stored.description.preprocessing
    dataset = load_data(options, stored.description)

    def batches(split: Any) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for batch in eval_batches(split, options.batch_size):
            images = normalize(jnp.asarray(batch["image"]), preprocessing.mean, preprocessing.std)
            yield np.asarray(images), np.asarray(batch["label"]), np.asarray(batch["mask"])

    calibration = [x for x, _, _ in itertools.islice(batches(dataset.train), 8)]
    calls = runtimes(stored.model, calibration[0], calibration, options.threads)
    right, count = dict.fromkeys(calls, 0), 0
    for x, labels, real in batches(dataset.test):
        count += int(np.sum(real))
        for label, call in calls.items():
            found = np.argmax(np.asarray(call(x)), axis=-1)
            right[label] += int(np.sum((found == labels) & (real > 0)))
    shares = {label: n / count for label, n in right.items()}
    return {"network": str(path), "accuracy": "images classified", "tests": count, **shares}


def read(name: str, folder: pathlib.Path, threads: int) -> Iterator[dict[str, Any]]:
    """Yield the accuracy of a network that reads text and of its shrunk one, in each runtime."""
    study = STUDIES[name]
    score = study.scores(TESTS[name])
    calibration = [np.asarray(x) for x in study.batches(100)]
    shrunk = fj.load_compressed(folder / name, study.load)
    for label, model in ((name, study.load()), (f"{name}, shrunk", shrunk)):
        model.eval()
        calls = runtimes(model, calibration[0], calibration, threads)
        shares = {
            runtime: score(lambda x, c=c: c(np.asarray(x)))[0] for runtime, c in calls.items()
        }
        yield {"network": label, "accuracy": study.accuracy, "tests": TESTS[name], **shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--stored", nargs="+", type=pathlib.Path, default=[], help="models for --data"
    )
    parser.add_argument("--ocr", type=pathlib.Path, help="folder of the shrunk OCR networks")
    add_data_options(parser, required=False)
    options = parser.parse_args()
    rows = [measure(label, model, x, options) for label, model, x in networks(options)]
    shown = [n for n in rows[0] if n in RATIOS or n.endswith(" ms")]
    columns = [Column(name="network", header="Network"), Column(name="batch", header="Images")]
    columns += [
        Column(name=n, header=n, format=format_ratio if n in RATIOS else "{:.2f}".format)
        for n in shown
    ]
    print(format_table(rows, columns))
    found = [classified(path, options) for path in options.stored]
    if options.ocr:
        found += [row for name in TESTS for row in read(name, options.ocr, options.threads)]
    if found:
        told = [Column(name=n, header=n) for n in ("network", "accuracy", "tests")]
        told += [Column(name=n, header=n, format=format_percent) for n in list(found[0])[3:]]
        print(format_table(found, told))
    if options.out:
        command = shlex.join(["python", "-m", "benchmarks.serving", *sys.argv[1:]])
        content = {
            "command": command,
            **settings_of_run(),
            "compiled_kernels": falcon_jax.native.is_built(),
            "rows": rows,
            "accuracy": found,
        }
        write_json(options.out, content)


if __name__ == "__main__":
    main()
