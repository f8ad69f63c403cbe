"""Rendered words with known truth."""

import dataclasses
import math
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFilter, ImageFont

FONTS = Path("/usr/share/fonts/truetype")
WORDS = Path("/usr/share/dict/words")
# Families of which nothing is rendered for calibration.
HELD_OUT = ("LiberationSerif", "DejaVuSansMono", "FreeSans")
WIDTH = 256


@dataclasses.dataclass(frozen=True)
class Words:
    """Images of words, and the words.

    Attributes:
        images: gray, of height 64, padded at the right with the last column.
        texts: what stands there.
    """

    images: UInt8[np.ndarray, "words height width"]
    texts: tuple[str, ...]


def fonts(*, held_out: bool) -> list[Path]:
    """Return the fonts for tests (held out from calibration), or those for calibration."""
    found = sorted(path for path in FONTS.glob("*/*.ttf") if "Math" not in path.name)
    if not found:
        raise FileNotFoundError(
            f"no fonts under {FONTS}; install fonts-dejavu-core, fonts-liberation and "
            "fonts-freefont-ttf."
        )
    return [p for p in found if p.stem.split("-")[0].startswith(HELD_OUT) == held_out]


def dictionary() -> list[str]:
    """Return words of 3 to 12 ASCII letters."""
    if not WORDS.exists():
        raise FileNotFoundError(f"no words in {WORDS}; install wamerican.")
    words = WORDS.read_text(encoding="utf-8").split()
    return [w for w in words if 3 <= len(w) <= 12 and w.isascii() and w.isalpha()]


def render_words(
    count: int, *, seed: int, held_out: bool = False, width: int = WIDTH, height: int = 64
) -> Words:
    """Return words in various fonts, sizes, contrasts, with noise and blur.

    Args:
        count: number of images.
        seed: another seed gives other words.
        held_out: whether to use the fonts held out from calibration.
        width: of the images; longer words are squeezed.
        height: of the images.
    """
    rng = np.random.default_rng(seed)
    choices, words = fonts(held_out=held_out), dictionary()
    images, texts = [], []
    for _ in range(count):
        word = words[rng.integers(len(words))]
        word = (word, word.capitalize(), word.upper())[rng.choice(3, p=(0.6, 0.25, 0.15))]
        font = ImageFont.truetype(
            str(choices[rng.integers(len(choices))]), int(rng.integers(18, 56))
        )
        images.append(_image(word, font, rng, width, height))
        texts.append(word)
    return Words(images=np.stack(images), texts=tuple(texts))


def _image(
    word: str, font: ImageFont.FreeTypeFont, rng: np.random.Generator, width: int, height: int
) -> np.ndarray:
    left, top, right, bottom = font.getbbox(word)
    tall = bottom - top
    margins = rng.uniform(0.05, 0.3, size=4) * tall
    size = (
        math.ceil(right - left + margins[0] + margins[1]),
        math.ceil(tall + margins[2] + margins[3]),
    )
    contrast = rng.uniform(60, 220)
    dark = rng.uniform(0, 255 - contrast)
    ink, paper = (dark, dark + contrast) if rng.random() < 0.8 else (dark + contrast, dark)
    image = Image.new("L", size, int(paper))
    ImageDraw.Draw(image).text(
        (margins[0] - left, margins[2] - top), word, fill=int(ink), font=font
    )
    wide = min(width, max(1, round(size[0] * height / size[1])))
    image = image.resize((wide, height), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.8)))
    pixels = np.asarray(image, np.float32)
    pixels = pixels + rng.normal(scale=rng.uniform(0, 10), size=pixels.shape)
    pixels = np.clip(pixels, 0, 255).round().astype(np.uint8)
    return np.pad(pixels, ((0, 0), (0, width - wide)), mode="edge")
