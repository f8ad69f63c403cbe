"""Detector and recognizer, original and shrunk on what has no labels."""

import dataclasses
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import falcon_jax as fj
from examples.ocr import detector, recognizer
from examples.ocr.pages import render_pages, render_sheets
from examples.ocr.reading import Networks
from examples.ocr.words import render_words
from falcon_jax.compression.deployment import Precision
from falcon_jax.native.library import multiplies_bfloat16

SEED = 1  # of everything that networks are shrunk on
SIDE = 256  # of the pages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Models:
    """What reads a page, as modules."""

    detector: nnx.Module
    recognizer: nnx.Module


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a network is shrunk.

    Attributes:
        rules: what is decided about its layers.
        examples: images for it.
        target: for `falcon_jax.shrink`, which searches; without one the rules decide everything.
        calibrated: how many of the images `falcon_jax.calibrate` looks at; 0 for all.
        plain: whether it takes plain least squares, in a fraction of the time.
        distill: steps of `falcon_jax.distill` afterwards, on all images.
    """

    rules: tuple[fj.Rule, ...]
    examples: int
    target: fj.Target | None = None
    calibrated: int = 0
    plain: bool = False
    distill: int = 0


# A search of the detector would take too long; distillation makes up for it. Where there are many
# channels, channel decomposition is fitted much faster than FALCON.
_FIRST = fj.Rule(path="slices/0/0/conv", method=None)
_ONCE, _FALCON = (fj.Rule(method=fj.Falcon(rank=rank)) for rank in (1, 2))
_EARLY_AND_LATE = "slices/0/.*|slices/1/0/conv|merge[34].*|head.*"
_MIXED = (
    _FIRST,
    fj.Rule(path=_EARLY_AND_LATE, method=fj.Falcon(rank=2)),
    fj.Rule(method=fj.ChannelDecomposition(rank=fj.Budget(4))),
)
_STAYS = fj.Rule(path="features/conv0", method=None)
FULL = {
    "detector": Settings(rules=(_FIRST, _ONCE), examples=48, calibrated=24, distill=100),
    "recognizer": Settings(
        rules=(_STAYS,), examples=200, target=fj.Target(mult_adds=0.31), distill=150
    ),
}
QUICK = {
    "detector": Settings(rules=_MIXED, examples=24, calibrated=8, plain=True, distill=40),
    "recognizer": Settings(rules=(_STAYS, _FALCON), examples=100),
}


def originals() -> Models:
    """Return the networks with their trained weights, read without PyTorch."""
    return Models(detector=detector.load_detector(), recognizer=recognizer.load_recognizer())


def calibration_pages(count: int) -> list[jax.Array]:
    """Return pages for the detector, two a batch: words anywhere, and lines of text."""
    half = count // 2
    scattered = render_pages(count - half, seed=SEED, side=SIDE).images
    lines = render_sheets(half, seed=SEED, height=SIDE, width=SIDE).images
    pages = np.concatenate([scattered, lines])
    order = np.random.default_rng(SEED).permutation(count)
    return [detector.normalized(pages[order[i : i + 2]]) for i in range(0, count, 2)]


def calibration_words(count: int) -> list[jax.Array]:
    """Return words for the recognizer, up to 50 a batch."""
    images = render_words(count, seed=SEED).images
    return [recognizer.normalized(jnp.asarray(images[i : i + 50])) for i in range(0, count, 50)]


def shrunk(models: Models, folder: Path, *, quick: bool) -> Models:
    """Return the shrunk networks: those kept in a folder, or made anew and kept there.

    Args:
        models: the originals.
        folder: with a saved network in each of ``detector`` and ``recognizer``.
        quick: whether to leave out the search, and to take fewer images.
    """
    settings = QUICK if quick else FULL
    examples = {"detector": calibration_pages, "recognizer": calibration_words}
    loads = {"detector": detector.load_detector, "recognizer": recognizer.load_recognizer}
    found = {}
    for name, each in settings.items():
        path = folder / name
        if path.exists():
            found[name] = fj.load_compressed(path, loads[name])
            _tell(f"{name}: the shrunk one of {path}; remove it to shrink anew")
            continue
        begin = time.perf_counter()
        _tell(f"{name}: shrinking, {each.examples} images without labels; takes minutes")
        model = getattr(models, name)
        small, plan = shrink_one(model, examples[name](each.examples), each)
        fewer = plan.before.mult_adds / plan.after.mult_adds
        _tell(f"{name}: {fewer:.1f}x fewer mult-adds after {time.perf_counter() - begin:.0f} s")
        fj.save_compressed(path, small, plan)
        found[name] = small
    return Models(**found)


def shrink_one(
    model: nnx.Module, batches: list[jax.Array], settings: Settings
) -> tuple[nnx.Module, fj.Plan]:
    """Return a smaller network and its plan.

    Args:
        model: the original.
        batches: images without labels.
        settings: how.
    """
    sample, progress = batches[0][:1], sys.stderr.isatty()
    if settings.target is None:
        plan = fj.make_plan(model, settings.rules, sample)
        small = fj.calibrate(
            model,
            fj.compress(model, plan),
            plan,
            batches[: settings.calibrated // len(batches[0])] if settings.calibrated else batches,
            relu_aware=not settings.plain,
            by_sensitivity=not settings.plain,
            progress=progress,
        )
    else:
        done: list[fj.Shrunk] = []
        small = fj.shrink(
            model,
            batches,
            target=settings.target,
            rules=settings.rules,
            sample=sample,
            progress=progress,
            report=done.append,
        )
        plan = done[0].plan
    if settings.distill:
        small = fj.distill(model, small, batches, steps=settings.distill, progress=progress)
    return small, plan


def deployed(models: Models, *, precision: Precision = "float32") -> Networks:
    """Return the networks as fast functions.

    Args:
        models: the networks.
        precision: of what is multiplied, as `falcon_jax.deploy` takes it.
    """
    page, word = jnp.zeros((1, 64, 64, 3)), jnp.zeros((1, recognizer.HEIGHT, 128, 1))
    return Networks(
        detect=fj.deploy(models.detector, page, precision=precision),
        recognize=fj.deploy(models.recognizer, word, precision=precision),
    )


def all_deployed(before: Models, after: Models) -> dict[str, Networks]:
    """Return the originals and the shrunk networks, in bfloat16, too, where that is faster."""
    networks = {"original": deployed(before), "shrunk": deployed(after)}
    if multiplies_bfloat16():
        networks["shrunk, bfloat16"] = deployed(after, precision="bfloat16")
    return networks


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
