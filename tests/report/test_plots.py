import io
import sys

import matplotlib
import numpy as np
import pytest
from PIL import Image

from falcon_jax.report.plots import plot_tradeoff, series

ROWS = [
    {"label": "StConv", "method": "standard", "rank": None, "params": 20.3e6, "accuracy": 0.9361},
    {"label": "FALCON k=2", "method": "falcon", "rank": 2, "params": 4.9e6, "accuracy": 0.9348},
    {"label": "FALCON k=1", "method": "falcon", "rank": 1, "params": 2.6e6, "accuracy": 0.9303},
    {"label": "not fitted", "method": "falcon", "rank": 1, "params": 2.6e6, "accuracy": 0.9271},
    {"label": "Tucker", "method": "tucker", "rank": None, "params": 2.6e6, "accuracy": 0.9121},
]


def plot(path, rows=ROWS):
    plot_tradeoff(rows, x="params", x_label="Parameters (millions)", path=path)
    return np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"))


def test_series_join_the_ranks_of_a_method_in_order():
    assert series(ROWS) == [[0], [2, 1], [3], [4]]


def test_draws_the_points_in_their_colours(tmp_path):
    picture = plot(tmp_path / "deep" / "plot.png")
    assert picture.shape == (960, 1280, 3)
    for color in ((0x1F, 0x5F, 0xBF), (0xD1, 0x49, 0x5B), (0x2E, 0x8B, 0x57), (0, 0, 0)):
        assert (picture == color).all(axis=2).sum() > 200


def test_same_rows_same_picture_and_no_pyplot(tmp_path):
    matplotlib.use("pdf")
    first, second = plot(tmp_path / "a.png"), plot(tmp_path / "b.png")
    np.testing.assert_array_equal(first, second)
    assert "matplotlib.pyplot" not in sys.modules
    assert matplotlib.get_backend() == "pdf"


@pytest.mark.parametrize(
    "rows", [ROWS[:1], [{**ROWS[1], "accuracy": 1.0}, {**ROWS[2], "accuracy": 1.0}]]
)
def test_degenerate_ranges_are_drawn(tmp_path, rows):
    assert plot(tmp_path / "plot.png", rows).std() > 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "nothing to plot"), ([{**ROWS[0], "accuracy": float("nan")}], "must be finite")],
)
def test_refusals(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        plot(tmp_path / "plot.png", rows)


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "falcon-jax\[train\]"'):
        plot(tmp_path / "plot.png")
