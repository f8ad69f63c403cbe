"""Places for the labels of points, so that they cover neither each other nor what is drawn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

_MARK_RADIUS = 5.0
_GAPS = (3.0, 8.0, 16.0, 28.0, 44.0)
_DIRECTIONS = 16
_SWEEPS = 4
_PATH_STEP = 4.0

# What a place costs: 1 a unit of distance; covering anything costs more than going far.
_OUTSIDE, _OVER_LABEL, _OVER_MARK, _OVER_PATH = 1000.0, 300.0, 200.0, 15.0


class Box(NamedTuple):
    """A rectangle, in any unit, y upwards.

    Args:
        left: smallest x.
        bottom: smallest y.
        right: largest x.
        top: largest y.
    """

    left: float
    bottom: float
    right: float
    top: float


def overlaps(one: Box, other: Box) -> bool:
    """Whether two rectangles share more than an edge.

    >>> overlaps(Box(0, 0, 2, 2), Box(1, 1, 3, 3)), overlaps(Box(0, 0, 2, 2), Box(2, 0, 3, 2))
    (True, False)

    Args:
        one: a rectangle.
        other: another.

    Returns:
        whether they overlap.
    """
    return (
        one.left < other.right
        and other.left < one.right
        and one.bottom < other.top
        and other.bottom < one.top
    )


def place_labels(
    sizes: Sequence[tuple[float, float]],
    points: Sequence[tuple[float, float]],
    *,
    area: Box,
    obstacles: Sequence[Box] = (),
    paths: Sequence[Sequence[tuple[float, float]]] = (),
) -> list[Box]:
    """Finds a place near each point for its label.

    Each label in turn takes the cheapest of some places around its point, given where the others
    lie; a few rounds of that.

    Args:
        sizes: width and height of each label, in points (1/72 inch).
        points: where the labelled marks are, likewise.
        area: where labels may lie.
        obstacles: rectangles not to be covered.
        paths: lines, as vertices, that are better not covered.

    Returns:
        the rectangle of each label.
    """
    marks = [_around(x, y, _MARK_RADIUS) for x, y in points]
    dots = [_around(x, y, 1.0) for path in paths for x, y in _dots(path)]
    placed: dict[int, Box] = {}
    for _, i in itertools.product(range(_SWEEPS), range(len(points))):
        taken = [*obstacles, *(box for j, box in placed.items() if j != i)]
        others = [mark for j, mark in enumerate(marks) if j != i]

        def cost(
            place: tuple[float, Box], taken: list[Box] = taken, others: list[Box] = others
        ) -> float:
            gap, box = place
            return (
                gap
                + _OUTSIDE * (not _inside(box, area))
                + _OVER_LABEL * sum(overlaps(box, label) for label in taken)
                + _OVER_MARK * sum(overlaps(box, mark) for mark in others)
                + _OVER_PATH * sum(overlaps(box, dot) for dot in dots)
            )

        _, placed[i] = min(_places(points[i], sizes[i]), key=cost)
    return [placed[i] for i in range(len(points))]


def _places(point: tuple[float, float], size: tuple[float, float]) -> list[tuple[float, Box]]:
    # The label touches a circle around the mark, its width and height moving with the angle.
    (x, y), (width, height) = point, size
    places = []
    for gap, k in itertools.product(_GAPS, range(_DIRECTIONS)):
        angle = 2.0 * math.pi * k / _DIRECTIONS
        reach = _MARK_RADIUS + gap
        left = x + reach * math.cos(angle) + (math.cos(angle) - 1.0) * width / 2.0
        bottom = y + reach * math.sin(angle) + (math.sin(angle) - 1.0) * height / 2.0
        places.append((gap, Box(left, bottom, left + width, bottom + height)))
    return places


def _around(x: float, y: float, radius: float) -> Box:
    return Box(x - radius, y - radius, x + radius, y + radius)


def _inside(box: Box, area: Box) -> bool:
    return (
        area.left <= box.left
        and box.right <= area.right
        and area.bottom <= box.bottom
        and box.top <= area.top
    )


def _dots(path: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    dots = []
    for (x0, y0), (x1, y1) in itertools.pairwise(path):
        n = max(1, math.ceil(math.hypot(x1 - x0, y1 - y0) / _PATH_STEP))
        dots += [(x0 + (x1 - x0) * k / n, y0 + (y1 - y0) * k / n) for k in range(n + 1)]
    return dots
