"""Reading pages of text: the PyTorch originals, the same in JAX, and the shrunk networks.

    python -m benchmarks.ocr --out results/ocr.json [--networks runs/ocr/networks]

The whole pipeline of `examples.ocr.reading`, detector, boxes, words, recognizer, with networks
that take turns on every page. PyTorch has the same weights, inputs, sizes of batches and threads,
in the form that is the fastest here of eager, `torch.jit.freeze` and
`torch.jit.optimize_for_inference`, each with channels last or not. Words are right if the text is,
at the place. NETWORKS holds what `examples.ocr.read` shrank; it is made if it is not there.
"""

import argparse
import collections
import copy
import os
import pathlib
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

import falcon_jax as fj
import falcon_jax.native
from benchmarks.timing import settings_of_run, take_turns
from examples.ocr import detector, recognizer
from examples.ocr.pages import Pages, render_sheets
from examples.ocr.read import STAGES, build_kernels
from examples.ocr.reading import Networks, Reading, read_page, right_words, word_batches
from examples.ocr.shrinking import Models, all_deployed, originals, shrunk
from examples.ocr.weights import load_weights
from falcon_jax.report.table import (
    Column,
    format_percent,
    format_ratio,
    format_table,
    write_json,
)

SEEDS = {"same fonts": 21, "other fonts": 22}  # of the pages
FORMS = tuple(
    form + layout for layout in ("", ", channels last") for form in ("eager", "frozen", "optimized")
)
Call = Callable[[torch.Tensor], torch.Tensor]


def conv(m: int, n: int, size: int = 3, dilation: int = 1, bias: bool = True) -> nn.Conv2d:
    padding = dilation * (size // 2)
    return nn.Conv2d(m, n, size, padding=padding, dilation=dilation, bias=bias)


class Backbone(nn.Module):
    """VGG16 with BatchNorm; modules are named by the place in the authors' list."""

    def __init__(self):
        super().__init__()
        m = 3
        for number, parts in enumerate(detector.SLICES, start=1):
            layers = collections.OrderedDict()
            for place, (index, n) in enumerate(parts):
                if place:
                    layers[f"relu{index}"] = nn.ReLU()
                if index in detector.POOLED:
                    layers[f"pool{index}"] = nn.MaxPool2d(2, 2)
                layers[str(index)] = conv(m, n)
                layers[str(index + 1)] = nn.BatchNorm2d(n)
                m = n
            setattr(self, f"slice{number}", nn.Sequential(layers))
        self.slice5 = nn.Sequential(
            nn.MaxPool2d(3, 1, 1), conv(512, 1024, dilation=6), conv(1024, 1024, 1)
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the outputs; channels come second."""
        found = []
        one, two, three, four = (self.get_submodule(f"slice{n}") for n in (1, 2, 3, 4))
        for part in (one, two, three):
            x = torch.relu(part(x))
            found.append(x)
        x = four(x)
        return [*found, x, self.slice5(x)]


class Merge(nn.Module):
    """A 1x1 and a 3x3 convolution of two maps side by side."""

    def __init__(self, m: int, middle: int, n: int):
        super().__init__()
        self.conv = nn.Sequential(
            conv(m, middle, 1),
            nn.BatchNorm2d(middle),
            nn.ReLU(),
            conv(middle, n),
            nn.BatchNorm2d(n),
            nn.ReLU(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs; channels come second."""
        return self.conv(x)


class TorchDetector(nn.Module):
    """CRAFT."""

    def __init__(self):
        super().__init__()
        self.basenet = Backbone()
        self.upconv1 = Merge(1536, 512, 256)
        self.upconv2 = Merge(768, 256, 128)
        self.upconv3 = Merge(384, 128, 64)
        self.upconv4 = Merge(192, 64, 32)
        layers, m = [], 32
        for index, n in detector.HEAD:
            layers += [conv(m, n, 3 if index < 6 else 1), nn.ReLU()]
            m = n
        self.conv_cls = nn.Sequential(*layers[:-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs; channels come second."""
        one, two, three, four, x = self.basenet(x)
        x = self.upconv1(torch.cat([x, four], 1))
        for merge, skip in ((self.upconv2, three), (self.upconv3, two), (self.upconv4, one)):
            size = skip.shape[2:]
            x = nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=False)
            x = merge(torch.cat([x, skip], 1))
        return self.conv_cls(x).permute(0, 2, 3, 1)


class Features(nn.Module):
    """The recognizer's convolutions, by the place in the authors' list."""

    def __init__(self):
        super().__init__()
        relu, norm = nn.ReLU, nn.BatchNorm2d
        self.ConvNet = nn.Sequential(
            *(conv(1, 32), relu(), nn.MaxPool2d(2, 2)),
            *(conv(32, 64), relu(), nn.MaxPool2d(2, 2)),
            *(conv(64, 128), relu()),
            *(conv(128, 128), relu(), nn.MaxPool2d((2, 1), (2, 1))),
            *(conv(128, 256, bias=False), norm(256), relu()),
            *(conv(256, 256, bias=False), norm(256), relu(), nn.MaxPool2d((2, 1), (2, 1))),
            *(nn.Conv2d(256, 256, 2), relu()),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs; channels come second."""
        return self.ConvNet(x)


class Recurrent(nn.Module):
    """An LSTM in both directions and a linear map."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(256, 256, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(512, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs; channels come second."""
        return self.linear(self.rnn(x)[0])


class TorchRecognizer(nn.Module):
    """The recognizer english_g2."""

    def __init__(self):
        super().__init__()
        self.FeatureExtraction = Features()
        self.SequenceModeling = nn.Sequential(Recurrent(), Recurrent())
        self.Prediction = nn.Linear(256, 1 + len(recognizer.SYMBOLS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs; channels come second."""
        x = self.FeatureExtraction(x).mean(2).transpose(1, 2)
        return self.Prediction(self.SequenceModeling(x.contiguous()))


def loaded(model: nn.Module, name: str) -> nn.Module:
    """Return a module in evaluation mode with the weights of a file."""
    arrays = load_weights(name)
    model.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in arrays.items()})
    return model.eval()


def in_form(model: nn.Module, x: torch.Tensor, name: str) -> Call:
    """Return a module in a form, as a function of tensors."""
    form, _, last = name.partition(", ")
    layout = torch.channels_last if last else torch.contiguous_format
    made: Any = copy.deepcopy(model).to(memory_format=layout)  # type: ignore[call-overload]
    if form != "eager":
        example = x.contiguous(memory_format=layout)
        made = torch.jit.freeze(torch.jit.trace(made, example, check_trace=False))
    if form == "optimized":
        made = torch.jit.optimize_for_inference(made)
    return lambda x: made(x.contiguous(memory_format=layout))


def fastest(
    model: nn.Module, x: np.ndarray, names: Sequence[str]
) -> tuple[Callable[[Any], np.ndarray], dict[str, Any]]:
    """Return the fastest form of a module as a function of arrays, and the times of all, ms."""
    tensor = _tensor(x)
    expected = model(tensor)
    calls = {name: in_form(model, tensor, name) for name in names}
    for name, call in calls.items():
        if not torch.allclose(call(tensor), expected, rtol=1e-2, atol=1e-2):
            raise RuntimeError(f"PyTorch's form {name!r} gives other numbers than the module.")
    timed = {name: lambda call=call: call(tensor) for name, call in calls.items()}
    times = take_turns(timed, rounds=3) if len(calls) > 1 else {}
    best = min(calls, key=lambda name: times[name].median if times else 0)
    told = {"form": best, "ms": {name: timing.median for name, timing in times.items()}}
    return lambda x: calls[best](_tensor(x)).numpy(), told


def _tensor(x: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)


def torch_networks(
    page: np.ndarray, batch: np.ndarray, names: Sequence[str] = FORMS
) -> tuple[Networks, dict[str, Any]]:
    """Return PyTorch's networks and which form of them is the fastest on a page and a batch."""
    detect, told = fastest(
        loaded(TorchDetector(), "craft_mlt_25k.pth"),
        np.asarray(detector.normalized(page[None])),
        names,
    )
    recognize, told_too = fastest(
        loaded(TorchRecognizer(), "english_g2.pth"), np.asarray(recognizer.normalized(batch)), names
    )
    networks = Networks(detect=detect, recognize=recognize)
    return networks, {"detector": told, "recognizer": told_too}


def measure(
    pages: Mapping[str, Pages], networks: Mapping[str, Networks], rounds: int
) -> list[dict[str, Any]]:
    """Return a row for each of the networks: words right, milliseconds of a page, spread."""
    right = {name: dict.fromkeys(pages, 0) for name in networks}
    true = {fonts: sum(map(len, each.texts)) for fonts, each in pages.items()}
    found = dict.fromkeys(networks, 0)
    times: dict[str, list[float]] = {name: [] for name in networks}
    stages: dict[str, list[dict[str, float]]] = {name: [] for name in networks}
    for fonts, each in pages.items():
        for page, boxes, texts in zip(each.images, each.boxes, each.texts, strict=True):
            readings: dict[str, list[Reading]] = {name: [] for name in networks}
            calls = {
                name: lambda page=page, name=name, kept=readings: kept[name].append(
                    read_page(page, networks[name])
                )
                for name in networks
            }
            timings = take_turns(calls, rounds=rounds)
            for name, kept in readings.items():
                last = kept[-1]
                right[name][fonts] += int(right_words(last, boxes, texts).sum())
                found[name] += len(last.texts)
                times[name].append(timings[name].median)
                measured = [r.milliseconds for r in kept[-rounds:]]
                stages[name].append({s: statistics.median(m[s] for m in measured) for s in STAGES})
    rows = []
    for name in networks:
        shares = {fonts: right[name][fonts] / true[fonts] for fonts in pages}
        row = {"networks": name, "words_found": found[name], "words_right": right[name]}
        row |= {"words": true, "accuracy": sum(right[name].values()) / sum(true.values())}
        row |= {"accuracy_by_fonts": shares, "ms": statistics.mean(times[name])}
        row |= {f"{s} ms": statistics.mean(m[s] for m in stages[name]) for s in STAGES}
        row |= {"pages_ms": times[name]}
        rows.append(row)
    for row in rows:
        row["times_faster"] = rows[0]["ms"] / row["ms"]
        row["points_lost"] = 100 * (rows[0]["accuracy"] - row["accuracy"])
    return rows


def _sizes(models: Models, page: np.ndarray, batch: np.ndarray) -> dict[str, Any]:
    """Return parameters and mult-adds, of a page and of a word of the batch's width."""
    x = {"detector": detector.normalized(page[None]), "recognizer": recognizer.normalized(batch)}
    costs = {name: fj.profile(getattr(models, name), each[:1]) for name, each in x.items()}
    return {n: {"params": c.params, "mult_adds": c.mult_adds} for n, c in costs.items()}


COLUMNS = (
    Column(name="networks", header="Networks"),
    Column(name="accuracy", header="Words right", format=format_percent),
    Column(name="points_lost", header="Points lost", format="{:.2f}".format),
    *(Column(name=f"{s} ms", header=f"{s} ms", format="{:.1f}".format) for s in STAGES),
    Column(name="ms", header="page ms", format="{:.1f}".format),
    Column(name="times_faster", header="Faster", format=format_ratio),
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Read pages by PyTorch and by shrunk networks.")
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--networks", type=pathlib.Path, default=pathlib.Path("runs/ocr/networks"))
    parser.add_argument("--pages", type=int, default=10, help="of each kind of fonts")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="of PyTorch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    build_kernels()
    before = originals()
    after = shrunk(before, options.networks, quick=False)
    pages = {
        name: render_sheets(options.pages, seed=seed, held_out=name == "other fonts")
        for name, seed in SEEDS.items()
    }
    first = next(iter(pages.values()))
    batch = word_batches(first.images[0], first.boxes[0])[0].images
    originals_in_torch, told = torch_networks(first.images[0], batch, options.forms)
    networks = {
        "PyTorch, original": originals_in_torch,
        **{f"JAX, {name}": each for name, each in all_deployed(before, after).items()},
    }
    rows = measure(pages, networks, options.rounds)
    print(format_table(rows, COLUMNS))
    if options.out:
        content = {
            "command": shlex.join(["python", "-m", "benchmarks.ocr", *sys.argv[1:]]),
            **settings_of_run(),
            "threads": options.threads,
            "compiled_kernels": falcon_jax.native.is_built(),
            "pytorch": told,
            "page": list(first.images.shape[1:3]),
            "word_batch": list(batch.shape),
            "original": _sizes(before, first.images[0], batch),
            "shrunk": _sizes(after, first.images[0], batch),
            "rows": rows,
        }
        write_json(options.out, content)


if __name__ == "__main__":
    main()
