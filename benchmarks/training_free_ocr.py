"""Accuracy without training on networks that read text: every method, fitted to kernels or to data.

What is measured here `benchmarks.training_free` reports, with ``--network=recognizer`` or
``--network=detector``. Images for tests come from other seeds than those for calibration, and once
more from fonts of which nothing was calibrated.
"""

import dataclasses
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import falcon_jax as fj
from examples.ocr import detector, recognizer
from examples.ocr.pages import Pages, render_pages
from examples.ocr.words import Words, render_words

CALIBRATION_SEED, TEST_SEED, HELD_OUT_SEED = 1, 2, 3
SIZES = (20, 200, 1000)
USUAL = 200  # images that every method is calibrated on

Call = Callable[[jax.Array], jax.Array]
Score = Callable[[Call], tuple[float, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A trained network, its images and its score.

    Attributes:
        load: the network.
        first: path of the convolution that stays as it is.
        batches: images for calibration, so many.
        scores: returns a function from what a network does to its accuracy on the calibration's
            fonts and on those held out, of so many images each, in batches as for calibration.
        accuracy: what it is.
        tests: images of each score, unless another number is asked for.
    """

    load: Callable[[], nnx.Module]
    first: str
    batches: Callable[[int], list[jax.Array]]
    scores: Callable[[int], Score]
    accuracy: str
    tests: int


def _words(count: int) -> list[jax.Array]:
    images = render_words(count, seed=CALIBRATION_SEED).images
    return [recognizer.normalized(jnp.asarray(images[i : i + 50])) for i in range(0, count, 50)]


def _pages(count: int) -> list[jax.Array]:
    images = render_pages(count, seed=CALIBRATION_SEED).images
    return [detector.normalized(images[i : i + 2]) for i in range(0, count, 2)]


def jitted(model: nnx.Module) -> Call:
    graph, state = nnx.split(model)
    call = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    return lambda x: call(state, x)


def _words_read(count: int) -> Score:
    tests = [
        render_words(count, seed=TEST_SEED),
        render_words(count, seed=HELD_OUT_SEED, held_out=True),
    ]

    def share(call: Call, words: Words) -> float:
        texts: list[str] = []
        for i in range(0, count, 50):
            images = jnp.asarray(words.images[i : i + 50])
            texts += recognizer.read(call(recognizer.normalized(images)))
        return float(np.mean([a == b for a, b in zip(texts, words.texts, strict=True)]))

    return lambda call: (share(call, tests[0]), share(call, tests[1]))


def _boxes_found(count: int) -> Score:
    tests = [
        render_pages(count, seed=TEST_SEED),
        render_pages(count, seed=HELD_OUT_SEED, held_out=True),
    ]

    def f1(call: Call, pages: Pages) -> float:
        totals = np.zeros(3)
        for i in range(0, count, 2):
            scores = np.asarray(call(detector.normalized(pages.images[i : i + 2])))
            for found, truth in zip(scores, pages.boxes[i : i + 2], strict=True):
                totals += detector.match_counts(detector.find_boxes(found), truth)
        right, found, true = totals
        return float(2 * right / max(found + true, 1))

    return lambda call: (f1(call, tests[0]), f1(call, tests[1]))


STUDIES: Mapping[str, Study] = {
    "recognizer": Study(
        load=recognizer.load_recognizer,
        first="features/conv0",
        batches=_words,
        scores=_words_read,
        accuracy="words read",
        tests=400,
    ),
    "detector": Study(
        load=detector.load_detector,
        first="slices/0/0/conv",
        batches=_pages,
        scores=_boxes_found,
        accuracy="F1 of boxes",
        tests=100,
    ),
}


def _budgets(method: Callable[..., fj.Method]) -> tuple[tuple[str, fj.Method], ...]:
    return tuple((f"ratio {ratio:g}", method(rank=fj.Budget(ratio))) for ratio in (2.0, 4.0, 8.0))


METHODS: Mapping[str, tuple[tuple[str, fj.Method], ...]] = {
    "FALCON": tuple((f"rank {rank}", fj.Falcon(rank=rank)) for rank in (1, 2, 3)),
    "DPConv": tuple((f"rank {rank}", fj.DepthwiseSeparable(rank=rank)) for rank in (1, 2, 3)),
    "SD": _budgets(fj.SpatialDecomposition),
    "CD": _budgets(fj.ChannelDecomposition),
    "Tucker": _budgets(fj.Tucker),
    "CP": _budgets(fj.CP),
    "TT": _budgets(fj.TensorTrain),
    "FSNet": tuple(
        (f"ratio {ratio:g}", fj.FilterSummary(ratio=ratio, reorder=True)) for ratio in (2.0, 4.0)
    ),
}


def measured(
    study: Study,
    *,
    methods: Sequence[str],
    settings: Sequence[str] = (),
    sizes: Sequence[int] = SIZES,
    tests: int,
) -> Iterator[dict[str, Any]]:
    """Yield a row for the network, and for every method, setting, fit and number of images.

    Args:
        study: the network.
        methods: names.
        settings: of these methods; all if none are given.
        sizes: numbers of images that FALCON is calibrated on; the others take the middle one.
        tests: images of each score.
    """
    model, score = study.load(), study.scores(tests)
    sample = study.batches(1)[0]
    cost = fj.profile(model, sample)
    yield _row("standard", "", "", 0, cost.params, cost.mult_adds, 1.0, score(jitted(model)), None)
    for name in methods:
        for label, method in METHODS[name]:
            if settings and label not in settings:
                continue
            rules = [fj.Rule(path=study.first, method=None), fj.Rule(method=method)]
            plan = fj.make_plan(model, rules, sample)
            before, after = (
                sum(cost.mult_adds for cost in costs)
                for costs in zip(*((r.before, r.after) for r in plan.replaced), strict=True)
            )
            small = fj.compress(model, plan)
            numbers = plan.after.params, plan.after.mult_adds, before / max(after, 1)
            yield _row(name, label, "kernel", 0, *numbers, score(jitted(small)), None)
            for size in sizes if name == "FALCON" else (_usual(sizes),):
                batches = study.batches(size)
                begin = time.perf_counter()
                fitted = fj.calibrate(model, small, plan, batches)
                seconds = time.perf_counter() - begin
                yield _row(name, label, "data", size, *numbers, score(jitted(fitted)), seconds)


def _usual(sizes: Sequence[int]) -> int:
    return USUAL if USUAL in sizes else sizes[0]


def _row(
    method: str,
    setting: str,
    fit: str,
    images: int,
    params: int,
    mult_adds: int,
    ratio: float,
    scores: tuple[float, float],
    seconds: float | None,
) -> dict[str, Any]:
    return {
        "method": method,
        "setting": setting,
        "fit": fit,
        "images": images,
        "params": params,
        "mult_adds": mult_adds,
        "fewer_mult_adds": ratio,
        "accuracy": scores[0],
        "held_out": scores[1],
        "seconds": seconds,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
