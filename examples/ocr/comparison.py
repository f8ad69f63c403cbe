"""A picture of what two readers read on one page."""

import io
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFont

from examples.ocr.reading import Reading

RIGHT, WRONG, UNKNOWN = (0, 130, 60), (210, 30, 30), (30, 80, 200)
_TITLE = 28


def page_picture(
    page: UInt8[np.ndarray, "h w 3"],
    readings: Mapping[str, Reading],
    marks: Mapping[str, Bool[np.ndarray, " words"] | None],
) -> bytes:
    """Return a PNG of the page once a reader, with boxes and words.

    Args:
        page: in colour.
        readings: by the reader's name.
        marks: whether each word is right, green or red; None if that is not known.
    """
    height, width = page.shape[:2]
    picture = Image.new("RGB", (width, (height + _TITLE) * len(readings)), "white")
    font = ImageFont.load_default(18)
    for place, (name, reading) in enumerate(readings.items()):
        total = sum(reading.milliseconds.values())
        title = f"{name}: {len(reading.texts)} words in {total:.0f} ms"
        right = marks[name]
        if right is not None:
            title += f", {int(right.sum())} right"
        top = place * (height + _TITLE)
        ImageDraw.Draw(picture).text((6, top + 3), title, fill="black", font=font)
        picture.paste(_labelled(page, reading, right), (0, top + _TITLE))
    content = io.BytesIO()
    picture.quantize(128).save(content, "PNG", optimize=True)
    return content.getvalue()


def _labelled(page: np.ndarray, reading: Reading, right: np.ndarray | None) -> Image.Image:
    """Return the page, pale, with boxes and a label over each."""
    image = Image.fromarray((page // 2 + 128).astype(np.uint8))
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    for i, (box, text) in enumerate(zip(reading.boxes, reading.texts, strict=True)):
        colour = UNKNOWN if right is None else RIGHT if right[i] else WRONG
        pen.rectangle(tuple(box), outline=colour, width=1)
        at = (float(box[0]), max(float(box[1]) - 11, 0))
        pen.text(at, text, fill=colour, font=font, stroke_width=2, stroke_fill="white")
    return image
