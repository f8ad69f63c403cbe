"""From the bytes of an image file to pixels, and to one size."""

import dataclasses
import io
import math
import stat
from pathlib import Path
from types import MappingProxyType

import numpy as np
from jaxtyping import Float64, Shaped, UInt8
from PIL import Image, UnidentifiedImageError

from falcon_jax.wording import reason

# Of evaluation images, widened when shrinking.
INTERPOLATIONS = MappingProxyType(
    {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
)
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")

AREA = (0.08, 1.0)  # share of the image that a random crop covers
RATIO = (3 / 4, 4 / 3)  # width over height of a random crop
_ATTEMPTS = 10
_LONGEST = 100_000  # pixels, of the longer side after resizing
DRAWS = 2 * _ATTEMPTS + 3  # random numbers an image takes
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_WHITE_IS_ZERO = 0
_SIGNED = 2


@dataclasses.dataclass(frozen=True)
class Crop:
    """A rectangle of an image, in pixels.

    Args:
        top: first row.
        left: first column.
        height: number of rows.
        width: number of columns.
    """

    top: int
    left: int
    height: int
    width: int


def decode_rgb(data: bytes) -> Image.Image:
    """Decode an image file to RGB.

    Grey images get three equal channels; palettes, CMYK and transparency are converted as PIL does.
    Of 16-bit samples the upper 8 bits are taken, grey or RGB; floats in [0, 1] are scaled. Of an
    animation or a file of several pages the first image is taken.

    Args:
        data: content of the file.

    Returns:
        the image.

    Raises:
        ValueError: if it cannot be decoded; says why, without naming the file.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if (problem := _unknown_range(image)) is not None:
                raise ValueError(problem)
            if image.mode == "F" or image.mode.startswith("I"):
                return Image.fromarray(_grey(image)).convert("RGB")
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")  # the same colours, without PIL's warning
            return image.convert("RGB")
    except Exception as error:  # PIL raises anything: OSError, SyntaxError, struct.error
        raise ValueError(_reason(error, len(data))) from error


def header_problem(source: Path | bytes) -> str | None:
    """What is wrong with an image file as far as its first bytes tell; nothing is decoded.

    Args:
        source: the file, or its content.

    Returns:
        a reason, or None if it begins as an image does and has a size.
    """
    size = None
    try:
        if isinstance(source, Path):
            status = source.stat()
            if not stat.S_ISREG(status.st_mode):
                return "it is no file"  # opening a pipe would wait for ever
            size = status.st_size
        else:
            size = len(source)
        stream = source if isinstance(source, Path) else io.BytesIO(source)
        with Image.open(stream, formats=FORMATS) as image:
            return _unknown_range(image) if min(image.size) > 0 else "it has no pixels"
    except Exception as error:
        return _reason(error, size)


def training_image(
    image: Image.Image, size: int, draws: Float64[np.ndarray, " draws"]
) -> UInt8[np.ndarray, "size size 3"]:
    """Take a random crop, resize it and mirror it with probability one half.

    Args:
        image: the image, RGB.
        size: height and width of the result, pixels.
        draws: random numbers, uniform in [0, 1).

    Returns:
        the pixels.
    """
    pixels = resized_crop(image, random_crop(image.height, image.width, draws), size)
    return pixels[:, ::-1] if draws[-1] < 0.5 else pixels


def evaluation_image(
    image: Image.Image, size: int, shorter_side: int, interpolation: str = "bilinear"
) -> UInt8[np.ndarray, "size size 3"]:
    """Resize the shorter side and take the centre.

    Args:
        image: the image, RGB.
        size: height and width of the result, pixels.
        shorter_side: height or width, whichever is smaller, before the centre is taken.
        interpolation: one of INTERPOLATIONS, antialiased as PIL does.

    Returns:
        the pixels.

    Raises:
        ValueError: if the image is so long and thin that resizing it would take too much memory.
    """
    short, long = sorted(image.size)
    longer_side = shorter_side * long // short
    if longer_side > _LONGEST:
        raise ValueError(f"at {image.width}x{image.height} pixels it is too long and thin")
    wide = image.width > image.height
    new = (longer_side, shorter_side) if wide else (shorter_side, longer_side)
    image = image if image.size == new else image.resize(new, INTERPOLATIONS[interpolation])
    top, left = round((image.height - size) / 2), round((image.width - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def random_crop(height: int, width: int, draws: Float64[np.ndarray, " draws"]) -> Crop:
    """Draw a rectangle: area uniform in AREA, log(width / height) in log(RATIO), place anywhere.

    Ten rectangles are tried; if none fits into the image, the largest centred one with a ratio
    in RATIO is taken.

    Args:
        height: of the image, pixels.
        width: of the image, pixels.
        draws: random numbers, uniform in [0, 1): two an attempt, then two for the place.

    Returns:
        the rectangle.
    """
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    for attempt in range(_ATTEMPTS):
        for_area, for_ratio = draws[2 * attempt : 2 * attempt + 2].tolist()
        area = height * width * (AREA[0] + (AREA[1] - AREA[0]) * for_area)
        ratio = math.exp(low + (high - low) * for_ratio)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            for_top, for_left = draws[2 * _ATTEMPTS : 2 * _ATTEMPTS + 2].tolist()
            return Crop(int(for_top * (height - h + 1)), int(for_left * (width - w + 1)), h, w)
    w = min(width, round(height * RATIO[1]))
    h = min(height, round(width / RATIO[0]))
    return Crop((height - h) // 2, (width - w) // 2, h, w)


def resized_crop(image: Image.Image, crop: Crop, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Cut a rectangle out of an image and resize it.

    Args:
        image: the image, RGB.
        crop: the rectangle.
        size: height and width of the result, pixels.

    Returns:
        the pixels.
    """
    # Cut first: PIL's resize of a box looks at pixels outside the box, torchvision does not.
    right, below = crop.left + crop.width, crop.top + crop.height
    part = image.crop((crop.left, crop.top, right, below))
    return np.asarray(part.resize((size, size), Image.Resampling.BILINEAR))


def eight_bits(values: Shaped[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """Scale pixels to 0 to 255: x of 8 bits, x >> 8 of 16 bits, round(255 x) of floats in [0, 1].

    >>> eight_bits(np.array([0, 255, 256, 65535], np.uint16)).tolist()
    [0, 0, 1, 255]

    Args:
        values: the pixels.

    Returns:
        the pixels, scaled.

    Raises:
        ValueError: if they are of another type, or floats beyond [0, 1].
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return (values >> 8).astype(np.uint8)
    if values.dtype.kind != "f":
        raise ValueError(
            f"its pixels are {values.dtype}; they must be uint8, uint16, or floats in [0, 1]"
        )
    low, high = values.min(), values.max()
    if not 0 <= low <= high <= 1:  # a NaN neither
        raise ValueError(
            f"its pixels are floats from {low:.4g} to {high:.4g}; floats must lie in [0, 1], else "
            "nothing tells which is white"
        )
    return np.rint(values * 255).astype(np.uint8)


def _grey(image: Image.Image) -> UInt8[np.ndarray, "h w"]:
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode != "F":
        [bits] = tags.get(_BITS, (16,))
        values = values.astype(np.uint16) << (16 - bits)
    grey = eight_bits(values)
    # PIL inverts such images of up to 8 bits only.
    return 255 - grey if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else grey


def _unknown_range(image: Image.Image) -> str | None:
    """Why nothing tells which of the image's values is white, or None if something does."""
    signed = _SIGNED in getattr(image, "tag_v2", {}).get(_SAMPLE_FORMAT, ())
    # PIL has 16-bit samples of PGM in mode I, too, scaled to 65535.
    if signed or (image.mode == "I" and image.format == "TIFF"):
        return (
            "it has signed or 32-bit samples, and nothing tells which value is white; save it with "
            "8 or 16 bits, unsigned"
        )
    return None


def _reason(error: Exception, size: int | None) -> str:
    if size == 0:
        return "it is empty"
    if isinstance(error, UnidentifiedImageError):
        return f"it is none of {', '.join(FORMATS)}"
    return reason(error)


RESIZE_MODES = ("auto", "pad", "bilinear", "none")

_AUTO_PADDING = 8  # "auto" pads by at most so many pixels: 28 -> 32
_CHUNK = 1024  # images interpolated at a time, to bound the float64 copies


def resize_images(
    images: UInt8[np.ndarray, "n h w c"], image_size: int, mode: str = "auto"
) -> UInt8[np.ndarray, "n new_h new_w c"]:
    """Bring images to image_size x image_size pixels.

    "pad" puts zeros around the image, evenly (an odd pixel goes below and to the right);
    "bilinear" interpolates, with the triangle filter widened when shrinking; "auto" pads if
    neither side lacks more than 8 pixels, and interpolates otherwise; "none" changes nothing.

    Args:
        images: images, 0 to 255, (n, h, w, c).
        image_size: height and width wanted, pixels, 1 or more.
        mode: one of RESIZE_MODES.

    Returns:
        the images, (n, image_size, image_size, c), or as they were for "none".

    Raises:
        ValueError: if the mode is unknown, or "pad" is to shrink.
    """
    if mode not in RESIZE_MODES:
        raise ValueError(f"unknown resize mode {mode!r}; known modes: {', '.join(RESIZE_MODES)}")
    height, width = images.shape[1:3]
    if mode == "none" or height == width == image_size:
        return images
    lacking = (image_size - height, image_size - width)
    if mode == "auto":
        mode = "pad" if all(0 <= side <= _AUTO_PADDING for side in lacking) else "bilinear"
    if mode == "pad":
        if min(lacking) < 0:
            raise ValueError(
                f"images of {height}x{width} pixels cannot be padded to {image_size}x{image_size}; "
                'use resize "bilinear" or a larger image_size'
            )
        borders = [(side // 2, side - side // 2) for side in lacking]
        return np.pad(images, [(0, 0), *borders, (0, 0)])
    return _bilinear(images, image_size)


def _bilinear(
    images: UInt8[np.ndarray, "n h w c"], size: int
) -> UInt8[np.ndarray, "n size size c"]:
    n, height, width, channels = images.shape
    rows = _triangle_weights(height, size)
    columns = _triangle_weights(width, size)
    resized = np.empty((n, size, size, channels), np.uint8)
    for start in range(0, n, _CHUNK):
        part = images[start : start + _CHUNK].astype(np.float64)
        tall = rows @ part.reshape(-1, height, width * channels)
        wide = columns @ tall.reshape(-1, width, channels)
        resized[start : start + _CHUNK] = np.rint(wide).reshape(-1, size, size, channels)
    return resized


def _triangle_weights(old: int, new: int) -> Float64[np.ndarray, "new old"]:
    # Pixel centres are at half-integers; weights are renormalised at the borders.
    scale = old / new
    centres = (np.arange(new) + 0.5) * scale - 0.5
    distance = np.abs(centres[:, None] - np.arange(old)[None, :]) / max(scale, 1.0)
    weights = np.maximum(1.0 - distance, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)
