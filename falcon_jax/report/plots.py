"""Accuracy against size or cost, one labelled point a model (Figures 1 and 4 of the paper)."""

from __future__ import annotations

import io
import itertools
import math
import os
from collections.abc import Sequence
from typing import Any

from falcon_jax.report.labels import Box, place_labels
from falcon_jax.report.table import Row
from falcon_jax.report.writing import write_whole

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
    """Plots accuracy in percent against parameters or mult-adds in millions.

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
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f'plots need Matplotlib ({error}): pip install "falcon-jax[train]"'
        ) from error
    figure = Figure(figsize=(6.4, 4.8), dpi=200, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(xlabel=x_label, ylabel="Accuracy (%)", axisbelow=True)
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    _set_limits(axes, points)
    colors = _draw_series(axes, rows, points)
    corner = _draw_best_corner(axes)
    canvas.draw()  # fixes the layout, so that places are known
    labels = [str(row["label"]) for row in rows]
    _draw_labels(axes, canvas.get_renderer(), labels, points, colors, corner)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_whole(path, image.getvalue())


def series(rows: Sequence[Row]) -> list[list[int]]:
    """Groups rows that are joined by a line: one method, each rank once, ascending.

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
