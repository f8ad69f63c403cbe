"""A page read: the detector's boxes, the words cut out in batches of few shapes, their texts."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from examples.ocr import detector, recognizer

STEP = 32  # divides height and width of what the detector gets
LONGEST = 1280  # of a page's sides; larger pages are made smaller
TOGETHER = 8  # words of a batch
WIDTHS = (96, 128, 192, 256, 320, 384, 512, 768)  # of batches; longer words are squeezed
MARGIN = 0.1  # around a box, of its height
SAME_PLACE = 0.3  # intersection over union of a word's box and the true one

Call = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Networks:
    """What reads a page; both functions take and return arrays of any library.

    Attributes:
        detect: from images, as `detector.normalized` has them, to scores.
        recognize: from words, as `recognizer.normalized` has them, to logits.
    """

    detect: Call
    recognize: Call


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """What was read on a page.

    Attributes:
        boxes: left, top, right, bottom of every word.
        texts: the words, in the order of the boxes.
        milliseconds: of each stage: ``detector``, ``boxes`` (what is made of its scores and the
            words cut out), ``recognizer`` (its texts, too).
    """

    boxes: Float[np.ndarray, "words 4"]
    texts: tuple[str, ...]
    milliseconds: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Words that are recognized together.

    Attributes:
        images: gray, of height 64 and one of the widths; empty ones at the end fill the batch.
        places: of the words among all of the page.
    """

    images: UInt8[np.ndarray, "batch 64 width"]
    places: tuple[int, ...]


def padded(page: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Return a page whose height and width are multiples of 32, grown at the right and below."""
    rows, columns = (-n % STEP for n in page.shape[:2])
    return np.pad(page, ((0, rows), (0, columns), (0, 0)), mode="edge")


def word_batches(
    page: UInt8[np.ndarray, "h w 3"], boxes: Float[np.ndarray, "words 4"]
) -> list[Batch]:
    """Return the words of a page in batches of one size and few widths, the widest first.

    Args:
        page: in colour.
        boxes: of the words, in points of the page.
    """
    gray = Image.fromarray(page).convert("L")
    words = [_cut(gray, box) for box in boxes]
    order = sorted(range(len(words)), key=lambda i: -words[i].shape[1])
    batches = []
    for start in range(0, len(order), TOGETHER):
        places = tuple(order[start : start + TOGETHER])
        width = next(w for w in WIDTHS if w >= words[places[0]].shape[1])
        images = np.zeros((TOGETHER, recognizer.HEIGHT, width), np.uint8)
        for row, place in zip(images, places, strict=False):
            word = words[place]
            row[:] = np.pad(word, ((0, 0), (0, width - word.shape[1])), mode="edge")
        batches.append(Batch(images=images, places=places))
    return batches


def _cut(gray: Image.Image, box: np.ndarray) -> np.ndarray:
    margin = MARGIN * (box[3] - box[1])
    left, top = (max(int(v - margin), 0) for v in box[:2])
    right = min(max(int(np.ceil(box[2] + margin)), left + 1), gray.width)
    bottom = min(max(int(np.ceil(box[3] + margin)), top + 1), gray.height)
    wide = round((right - left) * recognizer.HEIGHT / (bottom - top))
    size = min(max(wide, 1), WIDTHS[-1]), recognizer.HEIGHT
    word = gray.resize(size, Image.Resampling.BICUBIC, box=(left, top, right, bottom))
    return np.asarray(word)


def read_page(page: UInt8[np.ndarray, "h w 3"], networks: Networks) -> Reading:
    """Read a page.

    Args:
        page: in colour.
        networks: what reads it.
    """
    begin = time.perf_counter()
    scores = np.asarray(networks.detect(detector.normalized(padded(page)[None])))[0]
    detected = time.perf_counter()
    boxes = _inside(detector.find_boxes(scores), page)
    batches = word_batches(page, boxes)
    cut = time.perf_counter()
    texts = [""] * len(boxes)
    for batch in batches:
        logits = np.asarray(networks.recognize(recognizer.normalized(batch.images)))
        for place, text in zip(batch.places, recognizer.read(logits), strict=False):
            texts[place] = text
    end = time.perf_counter()
    milliseconds = {
        "detector": 1e3 * (detected - begin),
        "boxes": 1e3 * (cut - detected),
        "recognizer": 1e3 * (end - cut),
    }
    return Reading(boxes=boxes, texts=tuple(texts), milliseconds=milliseconds)


def _inside(boxes: np.ndarray, page: np.ndarray) -> np.ndarray:
    """Return the boxes cut at the page's edges, without those beyond."""
    height, width = page.shape[:2]
    boxes = np.clip(boxes, 0, (width, height, width, height))
    return boxes[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]


def right_words(
    reading: Reading, boxes: Float[np.ndarray, "true_words 4"], texts: tuple[str, ...]
) -> np.ndarray:
    """Return for every word that was read whether it is a true one, each of which counts once.

    Args:
        reading: what was read.
        boxes: of the true words.
        texts: the true words.
    """
    overlap = detector.overlaps(reading.boxes, boxes)
    same = np.array([[a == b for b in texts] for a in reading.texts], bool).reshape(overlap.shape)
    overlap = np.where(same, overlap, 0)
    right = np.zeros(len(reading.texts), bool)
    while overlap.size and overlap.max() >= SAME_PLACE:
        i, j = np.unravel_index(overlap.argmax(), overlap.shape)
        overlap[i], overlap[:, j] = 0, 0
        right[i] = True
    return right
