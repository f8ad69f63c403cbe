"""What `shrink` did, for people: text, JSON, and a page with the front and the sensitivities."""

import base64
import html
import math
import os

from falcon_jax.compression.search import Front, SearchedPlan, Shrunk
from falcon_jax.compression.sensitivity import Sensitivity
from falcon_jax.paths import user_path, write_whole
from falcon_jax.report.plots import new_figure, plain_axes, png_of
from falcon_jax.report.table import write_json

_LABELS = {"params": "Parameters", "mult_adds": "Mult-adds", "latency_ms": "Milliseconds"}
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>falcon_jax shrink</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body {{ font: 16px/1.5 sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem }}
img {{ max-width: 100% }} pre {{ font-size: 13px; overflow-x: auto }}
</style></head><body><h1>{title}</h1>
<h2>What it could have been</h2><img alt="Loss against cost" src="data:image/png;base64,{front}">
<h2>What each layer costs the output</h2>
<img alt="Loss by layer and candidate" src="data:image/png;base64,{effects}">
<h2>What was done</h2><pre>{text}</pre></body></html>
"""


def write_shrunk(shrunk: Shrunk, directory: str | os.PathLike[str]) -> str:
    """Write what `shrink` did: shrink.txt, shrink.json, shrink.html, front.png, sensitivity.png.

    Args:
        shrunk: as `shrink` reports it.
        directory: where the files go; made if missing.

    Returns:
        The text.

    Raises:
        ImportError: if Matplotlib is not installed.
        OSError: if a file cannot be written.
    """
    directory, text = user_path(directory), str(shrunk)
    front, effects = plot_front(shrunk.plan.front, shrunk.plan), plot_sensitivity(shrunk.effects)
    plan = shrunk.plan
    quantity = plan.front.quantity
    cost = plan.predicted_ms or getattr(plan.after, quantity)
    title = f"{_LABELS[quantity]}: {cost / plan.front.original:.1%} of the original's"
    page = _PAGE.format(
        title=html.escape(title),
        text=html.escape(text),
        front=base64.b64encode(front).decode(),
        effects=base64.b64encode(effects).decode(),
    )
    write_whole(directory / "shrink.txt", (text + "\n").encode())
    write_json(directory / "shrink.json", shrunk.to_json())
    write_whole(directory / "front.png", front)
    write_whole(directory / "sensitivity.png", effects)
    write_whole(directory / "shrink.html", page.encode())
    return text


def plot_front(front: Front, chosen: SearchedPlan | None = None) -> bytes:
    """Return a PNG of the predicted loss against the cost, with a mark at a chosen plan.

    Args:
        front: that `search` found.
        chosen: one of its plans.

    Raises:
        ImportError: if Matplotlib is not installed.
    """
    figure = new_figure()
    label = f"{_LABELS[front.quantity]} (share of the original's)"
    axes = plain_axes(figure, xlabel=label, ylabel="Predicted loss of the output")
    shares, losses = front.costs / front.original, front.losses
    axes.step(shares, losses, where="post", color="tab:blue")
    positive = losses[losses > 0]
    if len(positive):
        axes.set_yscale("symlog", linthresh=float(positive.min()))
    if chosen is not None:
        point = int(abs(losses - chosen.predicted_loss).argmin())
        axes.plot(shares[point], losses[point], "o", color="tab:orange")
    return png_of(figure)


def plot_sensitivity(effects: Sensitivity) -> bytes:
    """Return a PNG of the loss of every candidate in every layer, as a heat map.

    Args:
        effects: as `sensitivity` returned them.

    Raises:
        ImportError: if Matplotlib is not installed.
    """
    rows = [[(e.candidate.label(), e.loss) for e in each] for each in effects.effects.values()]
    columns = list(dict.fromkeys(name for row in rows for name, _ in row))
    values = [[math.log10(max(dict(row).get(c, math.nan), 1e-9)) for c in columns] for row in rows]
    figure = new_figure((2 + 0.45 * len(columns), 1.8 + 0.3 * len(rows)))
    axes = figure.add_subplot()
    picture = axes.imshow(values, aspect="auto", cmap="viridis_r")
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize=7)
    paths = [path or "(model)" for path in effects.effects]
    axes.set_yticks(range(len(paths)), paths, fontsize=7)
    figure.colorbar(picture, label="log10 loss of the output")
    return png_of(figure)
