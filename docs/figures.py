"""Draw the figures of README and docs from what is committed under results/.

python docs/figures.py
"""

import json
import pathlib

import matplotlib.pyplot as plt
import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "figures"
BLUE, RED, GREY = "#1f5fbf", "#d1495b", "#777777"


def words_read():
    """Draw how many words the recognizer reads, fitted to kernels and calibrated on data."""
    table = json.loads((ROOT / "results/training_free_recognizer/table.json").read_text())
    original = next(row for row in table["rows"] if row["method"] == "standard")
    figure, axes = plt.subplots(figsize=(7.2, 3.4))
    for fit, color, label in (("data", RED, "calibrated"), ("kernel", BLUE, "fitted to kernels")):
        rows = [row for row in table["rows"] if row["fit"] == fit and row["images"] in (0, 200)]
        share = [100 * row["mult_adds"] / original["mult_adds"] for row in rows]
        for field, line in (("accuracy", "o-"), ("held_out", "o--")):
            axes.plot(share, [100 * row[field] for row in rows], line, color=color, ms=5)
        axes.annotate(
            label,
            (share[1], 100 * rows[1]["accuracy"]),
            xytext=(8, -15),
            textcoords="offset points",
            color=color,
        )
    axes.plot(100, 100 * original["accuracy"], "*", color="black", ms=13)
    axes.annotate("original", (100, 99), xytext=(0, -17), textcoords="offset points", ha="right")
    axes.plot([], [], "o-", color=GREY, label="fonts of the calibration")
    axes.plot([], [], "o--", color=GREY, label="other fonts")
    axes.legend(frameon=False, loc="lower right")
    axes.set(
        xlim=(0, 104),
        ylim=(-3, 104),
        xlabel="Mult-adds of the whole network, % of the original's",
        ylabel="Words read exactly, %",
    )
    return figure


def falcon():
    """Draw a kernel of M x N filters as the product of D and P."""
    m, n = 6, 5
    random = np.random.default_rng(3)
    d, p = random.normal(size=(3, 3, n)), random.normal(size=(m, n))
    kernel = np.einsum("ijn,mn->ijmn", d, p)
    figure, panels = plt.subplots(
        1, 5, figsize=(8, 3.2), width_ratios=(n / 2, 0.5, n / 2, 0.5, n), layout="constrained"
    )
    parts = (
        (_tiled(d[:, :, None]), f"$D$: a 3x3 filter for\neach of N = {n} outputs", 3),
        None,
        (p, f"$P$: M x N = {m} x {n}\nweights of 1x1", 1),
        None,
        (_tiled(kernel), f"$K_{{ijmn}} = D_{{ijn}}\\,P_{{mn}}$:\nM x N = {m} x {n} filters", 3),
    )
    for axes, part, sign in zip(panels, parts, " ⊙ = ", strict=True):
        axes.axis("off")
        if part is None:
            axes.text(0.5, 0.5, sign, ha="center", va="center", fontsize=18)
            continue
        image, title, size = part
        most = np.nanmax(np.abs(image))
        axes.imshow(image, cmap="RdBu", vmin=-most, vmax=most)
        axes.set_title(title, fontsize=10)
        for side in range(0, image.shape[0] + 1, size):
            axes.axhline(side - 0.5, color="white", lw=2)
        for side in range(0, image.shape[1] + 1, size):
            axes.axvline(side - 0.5, color="white", lw=2)
    return figure


def _tiled(kernel):
    i, j, m, n = kernel.shape
    return kernel.transpose(2, 0, 3, 1).reshape(m * i, n * j)


def main():
    """Write all figures."""
    plt.rcParams.update(
        {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.alpha": 0.3, "font.size": 10}
    )  # fmt: skip
    FIGURES.mkdir(exist_ok=True)
    for draw in (words_read, falcon):
        figure = draw()
        figure.savefig(
            FIGURES / f"{draw.__name__}.png",
            dpi=144,
            bbox_inches="tight",
            metadata={"Software": None},
        )
        plt.close(figure)


if __name__ == "__main__":
    main()
