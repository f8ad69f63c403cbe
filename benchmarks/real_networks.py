"""Real networks at real sizes: FALCON of ranks 1 to 3 against the original, here and elsewhere.

CRAFT, the text detector, on 256x256 and 640x640; VGG16-BN, ResNet-18 and ResNet-50 on 224x224; a
U-net on 256x256; MobileNet, which is depthwise as it is, on 224x224. Weights are random, every 3x3
convolution but the first is compressed. All runtimes get the same graph, by `falcon_jax.export`.

``jax`` is `deploy` with its native kernels, ``plain`` without; ``torch`` is PyTorch traced and
frozen, ``ort`` is ONNX Runtime, ``ov`` OpenVINO in float32. ``gain`` is the original's time over
the compressed one's, both `deploy`; ``share`` is that gain over the ratio of mult-adds. Times of a
network and batch size are of one process, in turns. With ``--precision bfloat16``, `deploy` and
OpenVINO multiply in bfloat16; ``f32`` is `deploy` without.

python -m benchmarks.real_networks --out results/real_networks.json [--precision bfloat16]
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import glob
import gzip
import json
import multiprocessing
import os
import pathlib
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import falcon_jax as fj
from benchmarks.timing import geometric_mean, settings_of_run, synchronised, take_turns
from examples.ocr.detector import Detector
from falcon_jax.compression.deployment import Precision
from falcon_jax.report.table import Column, format_ratio, format_table, write_json

Call = Callable[[np.ndarray], Any]
RUNTIMES = {"float32": ("plain", "torch", "ort", "ov"), "bfloat16": ("f32", "ov")}  # beside ours
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


class Pair(nnx.Module):
    """Two convolutions with BatchNorm."""

    def __init__(self, m: int, n: int, *, rngs: nnx.Rngs):
        self.convs = nnx.List(
            [nnx.Conv(m, n, (3, 3), rngs=rngs), nnx.Conv(n, n, (3, 3), rngs=rngs)]
        )
        self.norms = nnx.List([nnx.BatchNorm(n, rngs=rngs), nnx.BatchNorm(n, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return a map of n channels."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return x


class UNet(nnx.Module):
    """Four resolutions, skip connections side by side with what is interpolated."""

    def __init__(self, *, rngs: nnx.Rngs):
        widths = (32, 64, 128, 256)
        ins = (3, *widths)
        self.down = nnx.List([Pair(m, n, rngs=rngs) for m, n in zip(ins, widths, strict=False)])
        self.up = nnx.List(
            [Pair(m + n, n, rngs=rngs) for m, n in zip(widths[:0:-1], widths[-2::-1], strict=True)]
        )
        self.head = nnx.Conv(32, 2, (1, 1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return two scores for every point."""
        skips = []
        for i, pair in enumerate(self.down):
            x = pair(nnx.max_pool(x, (2, 2), strides=(2, 2)) if i else x)
            skips.append(x)
        for pair, skip in zip(self.up, skips[-2::-1], strict=True):
            x = jax.image.resize(x, (*skip.shape[:3], x.shape[-1]), "bilinear")
            x = pair(jnp.concatenate([x, skip], axis=-1))
        return self.head(x)


class MobileNet(nnx.Module):
    """MobileNet (Howard et al., 2017): depthwise and pointwise convolutions in turn."""

    def __init__(self, *, rngs: nnx.Rngs):
        widths = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
        strides = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
        convs = [nnx.Conv(3, 32, (3, 3), strides=2, rngs=rngs)]
        m = 32
        for n, s in zip(widths, strides, strict=True):
            convs.append(nnx.Conv(m, m, (3, 3), strides=s, feature_group_count=m, rngs=rngs))
            convs.append(nnx.Conv(m, n, (1, 1), rngs=rngs))
            m = n
        self.convs = nnx.List(convs)
        self.norms = nnx.List([nnx.BatchNorm(c.out_features, rngs=rngs) for c in convs])
        self.head = nnx.Linear(m, 1000, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the scores of classes."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return self.head(x.mean(axis=(1, 2)))


NETWORKS: dict[str, tuple[Callable[..., nnx.Module], int]] = {
    "craft-256": (Detector, 256),
    "craft-640": (Detector, 640),
    "vgg16_bn": (fj.models.vgg16_bn, 224),
    "resnet18": (fj.models.resnet18, 224),
    "resnet50": (fj.models.resnet50, 224),
    "unet": (UNet, 256),
    "mobilenet": (MobileNet, 224),
}
DEPTHWISE = ("mobilenet",)  # nothing to compress
LARGEST = 15 * 10**10  # mult-adds of a call; larger ones are left out
MANY = 10**8  # parameters from which on ranks are measured apart: weights of all take 24 GB


def compressed(model: nnx.Module, x: np.ndarray, rank: int) -> nnx.Module:
    """Return a model whose 3x3 convolutions but the first are FALCON of a rank."""
    falcon = fj.Rule(method=fj.Falcon(rank=rank), where=lambda spec: spec.kernel_size == (3, 3))
    others = fj.Rule(method=None)
    first = fj.make_plan(model, [others], x).rows[0].path
    plan = fj.make_plan(model, [fj.Rule(path=first, method=None), falcon, others], x)
    small = fj.compress(model, plan)
    small.eval()
    return small


def elsewhere(
    model: nnx.Module, x: np.ndarray, names: Sequence[str], precision: str, threads: int
) -> dict[str, Call]:
    """Return a model's call in the other runtimes.

    Args:
        model: in evaluation mode.
        x: what it is called on.
        names: of the runtimes.
        precision: of what OpenVINO multiplies.
        threads: of each.
    """
    import onnxruntime
    import openvino
    import torch

    from benchmarks.onnx_in_torch import frozen

    torch.set_num_threads(threads)
    calls: dict[str, Call] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = str(
            fj.export.onnx(model, x, pathlib.Path(folder) / "model.onnx", open_sizes=()).path
        )
        if "torch" in names:
            calls["torch"] = frozen(path, x)
        if "ort" in names:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.log_severity_level = 3
            providers = ["CPUExecutionProvider"]
            session = onnxruntime.InferenceSession(path, options, providers=providers)
            calls["ort"] = lambda x: session.run(None, {"x": x})[0]
        settings = {
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
        calls["ov"] = lambda x: request.infer({"x": x})[0]
    return calls


def measure(
    name: str, batch: int, ranks: list[int], *, precision: Precision, rounds: int, threads: int
) -> list[dict[str, Any]]:
    """Return a row for the original (rank 0) and one for each rank.

    Raises:
        ValueError: if runtimes do not agree.
    """
    make, size = NETWORKS[name]
    x = np.random.default_rng(0).normal(size=(batch, size, size, 3)).astype(np.float32)
    model = make(rngs=nnx.Rngs(0))
    model.eval()
    calls: dict[str, Callable[[], Any]] = {}
    counts: dict[int, int] = {}
    others = RUNTIMES[precision]
    on_device = jnp.asarray(x)
    for rank in (0, *([] if name in DEPTHWISE else ranks)):
        small = compressed(model, x[:1], rank) if rank else model
        counts[rank] = fj.profile(small, x[:1]).mult_adds
        ours = {"jax": fj.deploy(small, x, native=True, precision=precision)}
        if precision == "float32":
            ours["plain"] = fj.deploy(small, x, native=False)
        else:
            ours["f32"] = fj.deploy(small, x, native=True)
        calls |= {f"{rank} {n}": synchronised(call, on_device) for n, call in ours.items()}
        wanted, near = np.asarray(ours["jax"](on_device)), TOLERANCE[precision]
        for runtime, call in elsewhere(small, x, others, precision, threads).items():
            found = np.asarray(call(x))
            if not np.allclose(found, wanted, rtol=near, atol=near * np.abs(wanted).max()):
                raise ValueError(f"{runtime} and JAX do not agree on {name}, rank {rank}.")
            calls[f"{rank} {runtime}"] = lambda call=call: call(x)
    times = take_turns(calls, rounds=rounds)
    rows = []
    for rank, count in counts.items():
        ms = {r: times[f"{rank} {r}"].median for r in ("jax", *others)}
        fewer = counts[0] / count
        gain = times["0 jax"].median / ms["jax"]
        rows.append(
            {
                "network": name,
                "batch": batch,
                "rank": rank,
                "mult_adds": count,
                "fewer": fewer,
                "gain": gain,
                "share": gain / fewer,
                **{f"jax / {r}": ms["jax"] / ms[r] for r in others},
                **{f"{r} ms": value for r, value in ms.items()},
                "quartiles": {
                    r: [times[f"{rank} {r}"].low, times[f"{rank} {r}"].high]
                    for r in ("jax", *others)
                },
            }
        )
    return rows


def operations(name: str, rank: int) -> list[dict[str, Any]]:
    """Return milliseconds of the operations of a deployed model on one image, by JAX's profiler."""
    make, size = NETWORKS[name]
    x = np.random.default_rng(0).normal(size=(1, size, size, 3)).astype(np.float32)
    model = make(rngs=nnx.Rngs(0))
    model.eval()
    function = fj.deploy(compressed(model, x, rank) if rank else model, x, native=True)
    call = synchronised(function, jnp.asarray(x))
    call()
    text = function.lower(x).compile().as_text() or ""
    lines = (line.strip().removeprefix("ROOT ").lstrip("%") for line in text.splitlines())
    shapes = {op: shape for op, _, shape in (line.partition(" = ") for line in lines)}
    repeats = 5
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(repeats):
                call()
        (found,) = glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)
        with gzip.open(found) as file:
            events = json.load(file)["traceEvents"]
    total: collections.Counter[str] = collections.Counter()
    for event in events:
        if event.get("ph") == "X" and "hlo_op" in event.get("args", {}):
            total[event["args"]["hlo_op"]] += event["dur"] / 1e3 / repeats
    return [
        {"operation": op, "result": shapes.get(op, "").split(" ")[0], "ms": ms}
        for op, ms in total.most_common()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--precision", choices=list(RUNTIMES), default="float32")
    parser.add_argument("--operations", action="store_true", help="print operations of one image")
    options = parser.parse_args()
    if not fj.native.is_built():
        fj.native.build()
    if options.operations:
        for name in options.networks:
            rows = operations(name, options.ranks[0])
            columns = [Column(name=n, header=n) for n in ("operation", "result")]
            columns.append(Column(name="ms", header="ms", format="{:.2f}".format))
            print(format_table(rows[:20], columns))
        return
    rows: list[dict[str, Any]] = []
    fresh = multiprocessing.get_context("spawn")  # frees what was compiled, with its weights
    for name in options.networks:
        for batch in options.batches:
            make, size = NETWORKS[name]
            sample = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
            shapes = nnx.eval_shape(lambda m=make: m(rngs=nnx.Rngs(0)))
            cost = fj.profile(shapes, sample)
            if batch * cost.mult_adds > LARGEST:
                continue
            groups = [options.ranks]
            if cost.params > MANY:
                groups = [[rank] for rank in options.ranks]
            for number, group in enumerate(groups):
                with concurrent.futures.ProcessPoolExecutor(1, mp_context=fresh) as process:
                    found = process.submit(
                        measure,
                        name,
                        batch,
                        group,
                        precision=options.precision,
                        rounds=options.rounds,
                        threads=options.threads,
                    ).result()
                rows += [row for row in found if row["rank"] or not number]
            report(rows, RUNTIMES[options.precision], options.out)  # as far as it is


def report(rows: list[dict[str, Any]], others: Sequence[str], out: str | None) -> None:
    """Print all rows, their geometric means and the worst, and write them."""
    ratios = [f"jax / {r}" for r in others]
    columns = [Column(name=n, header=n) for n in ("network", "batch", "rank")]
    columns += [
        Column(name=n, header=n, format=format_ratio) for n in ("fewer", "gain", "share", *ratios)
    ]
    columns += [
        Column(name=f"{r} ms", header=f"{r} ms", format="{:.2f}".format) for r in ("jax", *others)
    ]
    print(format_table(rows, columns))
    compressed_rows = [row for row in rows if row["rank"]]
    means = {r: geometric_mean(row[r] for row in rows) for r in ratios}
    if compressed_rows:
        of_falcon = {r: geometric_mean(row[r] for row in compressed_rows) for r in ratios}
        means |= {f"{r}, FALCON": value for r, value in of_falcon.items()}
    worst = {r: max(row[r] for row in rows) for r in ratios}
    print("geometric means", {n: round(v, 2) for n, v in means.items()})
    print("worst", {n: round(v, 2) for n, v in worst.items()}, flush=True)
    if out:
        command = shlex.join(["python", "-m", "benchmarks.real_networks", *sys.argv[1:]])
        content = {"command": command, **settings_of_run(), "rows": rows}
        write_json(out, {**content, "geometric_means": means, "worst": worst})


if __name__ == "__main__":
    main()
