"""Pages with words on photos and plain grounds, and where the words are."""

import dataclasses
import math

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_images

from examples.ocr.words import dictionary, fonts

SIDE = 256
_TRIES = 20  # to find a place for a word
_OUTLINED = {"fill": (255, 255, 255), "stroke_width": 2, "stroke_fill": (0, 0, 0)}


@dataclasses.dataclass(frozen=True)
class Pages:
    """Images of pages, and the boxes of their words.

    Attributes:
        images: in colour.
        boxes: left, top, right, bottom of every word, page by page.
        texts: the words, in the order of the boxes.
    """

    images: UInt8[np.ndarray, "pages h w 3"]
    boxes: tuple[Float[np.ndarray, "words 4"], ...]
    texts: tuple[tuple[str, ...], ...]


def render_pages(count: int, *, seed: int, held_out: bool = False, side: int = SIDE) -> Pages:
    """Return pages with two to six words each, half of them on photos.

    Args:
        count: number of pages.
        seed: another seed gives other pages.
        held_out: whether to use the fonts held out from calibration.
        side: height and width; 16 divides it.
    """
    rng = np.random.default_rng(seed)
    photos = [np.asarray(photo) for photo in load_sample_images().images]
    choices, words = fonts(held_out=held_out), dictionary()
    images, boxes, texts = [], [], []
    for index in range(count):
        ground = _photo(photos, rng, side) if index % 2 else _plain(rng, side)
        page, found, written = Image.fromarray(ground), [], []
        for _ in range(rng.integers(2, 7)):
            word = str(words[rng.integers(len(words))])
            path = str(choices[rng.integers(len(choices))])
            font = ImageFont.truetype(path, int(rng.integers(14, 40)))
            box = _write(page, word, font, found, rng)
            if box is not None:
                found.append(box)
                written.append(word)
        images.append(_noisy(page, rng))
        boxes.append(np.asarray(found, np.float64).reshape(-1, 4))
        texts.append(tuple(written))
    return Pages(images=np.stack(images), boxes=tuple(boxes), texts=tuple(texts))


def render_sheets(
    count: int, *, seed: int, held_out: bool = False, height: int = 512, width: int = 768
) -> Pages:
    """Return pages of text in lines, the last third of each over a photo.

    Args:
        count: number of pages.
        seed: another seed gives other pages.
        held_out: whether to use the fonts held out from calibration.
        height: of a page; 16 divides it.
        width: of a page; 16 divides it.
    """
    rng = np.random.default_rng(seed)
    photos = load_sample_images().images
    choices, words = fonts(held_out=held_out), dictionary()
    images, boxes, texts = [], [], []
    for _ in range(count):
        page = Image.fromarray(_sheet(photos, rng, height, width))
        pen, found, written = ImageDraw.Draw(page), [], []
        top = height // 32
        while True:
            size = int(rng.integers(18, 34))
            font = ImageFont.truetype(str(choices[rng.integers(len(choices))]), size)
            if top + 2 * size > height:
                break
            left = width // 32 + int(rng.integers(0, 2 * size))
            on_photo = top + size > height - height // 3
            ink = _OUTLINED if on_photo else {"fill": tuple(map(int, rng.integers(0, 100, 3)))}
            while True:
                word = str(words[rng.integers(len(words))])
                place = tuple(map(int, font.getbbox(word, anchor="ls")))
                if left + place[2] > width - width // 32:
                    break
                line = top + size
                box = (left + place[0], line + place[1], left + place[2], line + place[3])
                pen.text((left, line), word, font=font, anchor="ls", **ink)
                found.append(box)
                written.append(word)
                left = box[2] + int(0.6 * size)
            top += int(1.7 * size)
        images.append(_noisy(page, rng))
        boxes.append(np.asarray(found, np.float64).reshape(-1, 4))
        texts.append(tuple(written))
    return Pages(images=np.stack(images), boxes=tuple(boxes), texts=tuple(texts))


def _sheet(
    photos: list[np.ndarray], rng: np.random.Generator, height: int, width: int
) -> np.ndarray:
    ground = np.broadcast_to(rng.integers(200, 256, 3, np.uint8), (height, width, 3)).copy()
    photo = Image.fromarray(photos[rng.integers(len(photos))])
    rows = height // 3
    scale = max(width / photo.width, rows / photo.height)
    photo = photo.resize((math.ceil(photo.width * scale), math.ceil(photo.height * scale)))
    start = int(rng.integers(photo.height - rows + 1))
    ground[height - rows :] = np.asarray(photo)[start : start + rows, :width]
    return ground


def _noisy(page: Image.Image, rng: np.random.Generator) -> np.ndarray:
    noise = rng.normal(scale=rng.uniform(0, 6), size=(page.height, page.width, 3))
    return np.clip(np.asarray(page, np.float32) + noise, 0, 255).round().astype(np.uint8)


def _photo(photos: list[np.ndarray], rng: np.random.Generator, side: int) -> np.ndarray:
    photo = photos[rng.integers(len(photos))]
    top, left = (rng.integers(n - side + 1) for n in photo.shape[:2])
    return np.ascontiguousarray(photo[top : top + side, left : left + side])


def _plain(rng: np.random.Generator, side: int) -> np.ndarray:
    return np.broadcast_to(rng.integers(0, 256, 3, np.uint8), (side, side, 3)).copy()


def _write(
    page: Image.Image,
    word: str,
    font: ImageFont.FreeTypeFont,
    taken: list[tuple[float, ...]],
    rng: np.random.Generator,
) -> tuple[float, ...] | None:
    """Write a word where there is room; return its box, or None without room."""
    left, top, right, bottom = map(int, font.getbbox(word))
    wide, tall, side = right - left, bottom - top, page.size[0]
    if wide > side - 8:
        return None
    for _ in range(_TRIES):
        x, y = rng.integers(4, side - wide - 3), rng.integers(4, side - tall - 3)
        apart = 10
        if all(
            x + wide + apart < other[0]
            or other[2] + apart < x
            or y + tall + apart < other[1]
            or other[3] + apart < y
            for other in taken
        ):
            place = (int(x), int(y), int(x + wide), int(y + tall))
            ground = np.asarray(page.crop(place), np.float64).mean((0, 1))
            ink = _ink(ground, rng)
            at = int(x) - left, int(y) - top
            ImageDraw.Draw(page).text(at, word, fill=ink, font=font)
            return tuple(map(float, place))
    return None


def _ink(ground: np.ndarray, rng: np.random.Generator) -> tuple[int, ...]:
    """Return a colour that can be told from a ground's."""
    if float(ground.mean()) > 128:
        return tuple(int(v) for v in rng.integers(0, 80, 3))
    return tuple(int(v) for v in rng.integers(176, 256, 3))
