"""Bringing images to one size: zero padding or bilinear interpolation."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64, UInt8

RESIZE_MODES = ("auto", "pad", "bilinear", "none")

_AUTO_PADDING = 8  # "auto" pads by at most so many pixels: 28 -> 32
_CHUNK = 1024  # images interpolated at a time, to bound the float64 copies


def resize_images(
    images: UInt8[np.ndarray, "n h w c"], image_size: int, mode: str = "auto"
) -> UInt8[np.ndarray, "n new_h new_w c"]:
    """Brings images to image_size x image_size pixels.

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
