"""Accuracy against size or cost, one labelled point per model (Figures 1 and 4 of the paper)."""

import io
import itertools
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from falcon_jax.paths import write_whole
from falcon_jax.report.table import Row

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


Boxes = Box | Sequence[Box] | Float[np.ndarray, "... 4"]


def overlaps(one: Boxes, other: Boxes) -> Bool[np.ndarray, "..."]:
    """Whether rectangles share more than an edge.

    >>> overlaps([Box(0, 0, 2, 2), Box(0, 0, 1, 1)], Box(1, 1, 3, 3)).tolist()
    [True, False]

    Args:
        one: rectangles as `Box` has them, along the last axis.
        other: likewise, in a shape that goes together with it.

    Returns:
        whether they overlap.
    """
    a, b = np.asarray(one), np.asarray(other)
    return np.asarray(((a[..., :2] < b[..., 2:]) & (b[..., :2] < a[..., 2:])).all(axis=-1))


def place_labels(
    sizes: Sequence[tuple[float, float]],
    points: Sequence[tuple[float, float]],
    *,
    area: Box,
    obstacles: Sequence[Box] = (),
    paths: Sequence[Sequence[tuple[float, float]]] = (),
) -> list[Box]:
    """Find a place near each point for its label.

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
        gaps, boxes = _places(points[i], sizes[i])
        within = (boxes[:, :2] >= area[:2]) & (boxes[:, 2:] <= area[2:])
        cost = gaps + _OUTSIDE * ~within.all(axis=1)
        cost += _OVER_LABEL * _covered(boxes, obstacles)
        cost += _OVER_LABEL * _covered(boxes, [box for j, box in placed.items() if j != i])
        cost += _OVER_MARK * _covered(boxes, [mark for j, mark in enumerate(marks) if j != i])
        cost += _OVER_PATH * _covered(boxes, dots)
        placed[i] = Box(*boxes[np.argmin(cost)].tolist())
    return [placed[i] for i in range(len(points))]


def _places(
    point: tuple[float, float], size: tuple[float, float]
) -> tuple[Float[np.ndarray, " places"], Float[np.ndarray, "places 4"]]:
    # The label touches a circle around the mark, its width and height moving with the angle.
    gaps = np.repeat(_GAPS, _DIRECTIONS)
    angles = np.tile(2.0 * math.pi / _DIRECTIONS * np.arange(_DIRECTIONS), len(_GAPS))
    steps = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    reach = (_MARK_RADIUS + gaps)[:, None]
    corners = np.asarray(point) + reach * steps + (steps - 1.0) * np.asarray(size) / 2.0
    return gaps, np.concatenate([corners, corners + np.asarray(size)], axis=1)


def _covered(
    places: Float[np.ndarray, "places 4"], boxes: Sequence[Box]
) -> Int[np.ndarray, " places"]:
    """Return how many boxes each place would cover."""
    return overlaps(places[:, None], np.asarray(boxes).reshape(1, -1, 4)).sum(axis=1)


def _around(x: float, y: float, radius: float) -> Box:
    return Box(x - radius, y - radius, x + radius, y + radius)


def _dots(path: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    dots = []
    for (x0, y0), (x1, y1) in itertools.pairwise(path):
        n = max(1, math.ceil(math.hypot(x1 - x0, y1 - y0) / _PATH_STEP))
        dots += [(x0 + (x1 - x0) * k / n, y0 + (y1 - y0) * k / n) for k in range(n + 1)]
    return dots


STANDARD = "standard"

_COLORS = (
    "#1f5fbf",
    "#d1495b",
    "#2e8b57",
    "#e08e0b",
    "#7b4fa3",
    "#008b8b",
    "#8c564b",
    "#c2479b",
    "#5c6b73",
)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")  # one fewer, so that a colour's marker changes
_LEADER_LENGTH = 12.0  # points (1/72 inch); a label farther from its mark gets a line


def plot_tradeoff(
    rows: Sequence[Row], *, x: str, x_label: str, path: str | os.PathLike[str]
) -> None:
    """Plot accuracy in percent against parameters or mult-adds in millions.

    Rows of one method that differ in rank are joined by a line. Rows of the method "standard"
    are drawn as stars, with a dotted line at their accuracy.

    Args:
        rows: one mapping a model: "label", "method", "rank" (or None), "accuracy" (a fraction),
            and the key given as x (a count).
        x: "params" or "mult_adds".
        x_label: label of the horizontal axis.
        path: the PNG file; its directory is made if missing.

    Raises:
        ValueError: if there are no rows, or a coordinate is not finite.
        ImportError: if Matplotlib is not installed.
        OSError: if the file cannot be written.

    Reference:
        FALCON: Lightweight and Accurate Convolution, Figures 1 and 4.
    """
    points = [(float(row[x]) / 1e6, 100.0 * float(row["accuracy"])) for row in rows]
    if not points:
        raise ValueError("there is nothing to plot: no row has an accuracy")
    if not all(math.isfinite(value) for point in points for value in point):
        raise ValueError(f"cannot plot {points}: every {x} and accuracy must be finite")
    figure = new_figure()
    canvas: Any = figure.canvas
    axes = plain_axes(figure, xlabel=x_label, ylabel="Accuracy (%)")
    _set_limits(axes, points)
    colors = _draw_series(axes, rows, points)
    corner = _draw_best_corner(axes)
    canvas.draw()  # fixes the layout, so that places are known
    labels = [str(row["label"]) for row in rows]
    _draw_labels(axes, canvas.get_renderer(), labels, points, colors, corner)
    write_whole(path, png_of(figure))


def new_figure(size: tuple[float, float] = (6.4, 4.8)) -> Any:
    """Return a figure of Matplotlib on a canvas of its own, apart from what is shown on screens.

    Args:
        size: inches.

    Raises:
        ImportError: if Matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f'plots need Matplotlib ({error}): pip install "falcon-jax[train]"'
        ) from error
    figure = Figure(figsize=size, dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain_axes(figure: Any, **labels: Any) -> Any:
    """Return axes with a faint grid and no frame at the top and the right."""
    axes = figure.add_subplot()
    axes.set(axisbelow=True, **labels)
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def png_of(figure: Any) -> bytes:
    """Return a figure as a PNG file."""
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def series(rows: Sequence[Row]) -> list[list[int]]:
    """Group rows that are joined by a line: one method, each rank once, ascending.

    A row that repeats a rank of its method begins another series.

    Args:
        rows: mappings with "method" and "rank".

    Returns:
        positions of the rows of each series, in order of appearance.
    """
    groups: dict[tuple[str, int], list[int]] = {}
    for position, row in enumerate(rows):
        for repeat in itertools.count():
            group = groups.setdefault((row["method"], repeat), [])
            if all(rows[other].get("rank") != row.get("rank") for other in group):
                group.append(position)
                break
    return [sorted(group, key=lambda i: rows[i].get("rank") or 0) for group in groups.values()]


def _draw_series(
    axes: Any, rows: Sequence[Row], points: Sequence[tuple[float, float]]
) -> list[str]:
    colors = ["black"] * len(rows)
    styles = zip(itertools.cycle(_COLORS), itertools.cycle(_MARKERS), strict=False)
    for group in series(rows):
        xs, ys = zip(*(points[i] for i in group), strict=True)
        if rows[group[0]]["method"] == STANDARD:
            axes.plot(xs, ys, "*", color="black", markersize=13, zorder=3)
            axes.plot(axes.get_xlim(), [max(ys)] * 2, color="0.6", linestyle=":", linewidth=1)
            continue
        color, marker = next(styles)
        axes.plot(xs, ys, marker=marker, color=color, markersize=8, linewidth=1.5, zorder=3)
        for i in group:
            colors[i] = color
    return colors


def _set_limits(axes: Any, points: Sequence[tuple[float, float]]) -> None:
    xs, ys = zip(*points, strict=True)
    low, high = min(ys), max(ys)
    span = max(high - low, 0.5)
    heights = low - 0.15 * span, high + 0.3 * span  # room for the arrow above the points
    axes.set(xlim=(0.0, 1.12 * max(xs) or 1.0), ylim=heights)
    axes.set_yticks([tick for tick in axes.get_yticks() if 0.0 <= tick <= 100.0])
    axes.set(ylim=heights)  # ticks beyond the limits have widened them
    axes.autoscale(False)


def _draw_best_corner(axes: Any) -> Any:
    return axes.annotate(
        "best",
        xy=(0.015, 0.985),
        xytext=(0.085, 0.895),
        xycoords="axes fraction",
        textcoords="axes fraction",
        color="0.45",
        fontstyle="italic",
        arrowprops={"arrowstyle": "-|>", "color": "0.45", "linewidth": 1.5},
    )


def _draw_labels(
    axes: Any,
    renderer: Any,
    labels: Sequence[str],
    points: Sequence[tuple[float, float]],
    colors: Sequence[str],
    corner: Any,
) -> None:
    to_typographic = 72.0 / axes.figure.dpi

    def box(artist: Any) -> Box:
        return Box(*(to_typographic * artist.get_window_extent(renderer).extents).tolist())

    def path(line: Any) -> list[tuple[float, float]]:
        return list(map(tuple, (to_typographic * axes.transData.transform(line)).tolist()))

    texts = [
        axes.annotate(
            label, point, xytext=(0, 0), textcoords="offset points", fontsize=9, color=color
        )
        for label, point, color in zip(labels, points, colors, strict=True)
    ]
    marks = path(points)
    boxes = place_labels(
        [(b.right - b.left, b.top - b.bottom) for b in map(box, texts)],
        marks,
        area=box(axes.patch),
        obstacles=[box(corner)],
        paths=[path(line.get_xydata()) for line in axes.get_lines()],
    )
    for text, mark, place, color in zip(texts, marks, boxes, colors, strict=True):
        text.set_position((place.left - mark[0], place.bottom - mark[1]))
        text.set_in_layout(False)
        near = (
            min(max(mark[0], place.left), place.right) - mark[0],
            min(max(mark[1], place.bottom), place.top) - mark[1],
        )
        if math.hypot(*near) > _LEADER_LENGTH:
            leader = {"arrowstyle": "-", "color": color, "linewidth": 0.7, "shrinkA": 1}
            axes.annotate(
                "", text.xy, xytext=near, textcoords="offset points", arrowprops=leader
            ).set_in_layout(False)
