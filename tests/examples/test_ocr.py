"""The networks that read text: their boxes and pages, and what they score with trained weights."""

import importlib.metadata
import io

import numpy as np
import pytest
from flax import nnx
from PIL import Image

import falcon_jax as fj
import falcon_jax.native
from examples.ocr import detector, read, recognizer, shrinking, weights
from examples.ocr.comparison import page_picture
from examples.ocr.pages import render_pages, render_sheets
from examples.ocr.reading import (
    TOGETHER,
    WIDTHS,
    Networks,
    Reading,
    padded,
    read_page,
    right_words,
    word_batches,
)
from examples.ocr.weights import PACKAGE
from examples.ocr.words import FONTS, WORDS

needs_fonts = pytest.mark.skipif(
    not (WORDS.exists() and any(FONTS.glob("*/*.ttf"))), reason="no fonts or no words here"
)


def installed():
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


def test_boxes_enclose_what_the_maps_show():
    scores = np.zeros((40, 60, 2))
    scores[10:16, 5:25, 0] = 0.9  # a word of two parts, joined by a link
    scores[10:16, 12:15] = (0.1, 0.9)
    scores[30:36, 40:50, 0] = 0.6  # nothing certain
    scores[2:4, 2:4, 0] = 0.9  # too small
    (box,) = detector.find_boxes(scores)
    grown = np.sqrt((6 * 20 - 6 * 3) * 6 / (6 * 20))
    np.testing.assert_allclose(
        box, 2 * np.array([5, 10, 25, 16]) + 2 * grown * np.array([-1, -1, 1, 1])
    )
    assert detector.find_boxes(np.zeros((4, 4, 2))).shape == (0, 4)


def test_each_true_box_is_matched_once():
    truth = np.array([[0, 0, 10, 10], [20, 0, 30, 10]], float)
    found = np.array([[1, 0, 10, 10], [0, 0, 9, 10], [20, 5, 30, 15]], float)
    assert detector.match_counts(found, truth) == (1, 3, 2)  # the third shares a third
    assert detector.match_counts(found, truth, 1 / 3) == (2, 3, 2)
    assert detector.match_counts(found[:0], truth) == (0, 0, 2)
    assert detector.match_counts(found, truth[:0]) == (0, 3, 0)


@needs_fonts
def test_pages_are_the_seeds_and_words_stand_in_their_boxes():
    pages, again = render_pages(4, seed=5), render_pages(4, seed=5)
    np.testing.assert_array_equal(pages.images, again.images)
    assert not np.array_equal(pages.images, render_pages(4, seed=6).images)
    for image, boxes in zip(pages.images[::2], pages.boxes[::2], strict=True):  # plain grounds
        ground = np.median(image.reshape(-1, 3), axis=0)
        differs = np.abs(image.astype(float) - ground).max(-1) > 60
        for left, top, right, bottom in boxes.astype(int):
            assert differs[top:bottom, left:right].mean() > 0.05
            differs[top : bottom + 1, left : right + 1] = False
        assert not differs.any()


@needs_fonts
def test_sheets_are_the_seeds_and_every_word_has_its_box():
    sheets, again = (render_sheets(2, seed=5, height=256, width=320) for _ in range(2))
    np.testing.assert_array_equal(sheets.images, again.images)
    assert not np.array_equal(sheets.images, render_sheets(2, seed=6).images[:, :256, :320])
    assert sheets.images.shape == (2, 256, 320, 3)
    for image, boxes, texts in zip(sheets.images, sheets.boxes, sheets.texts, strict=True):
        assert len(boxes) == len(texts) > 3
        ground = np.median(image[:170].reshape(-1, 3), axis=0)  # paper; the rest is a photo
        differs = np.abs(image.astype(float) - ground).max(-1) > 60
        for left, top, right, bottom in boxes[boxes[:, 3] < 170].astype(int):
            assert differs[top : bottom + 1, left : right + 1].mean() > 0.05


def gray_page(width, height=64):
    return np.full((height, width, 3), 200, np.uint8)


def test_words_come_in_batches_of_few_shapes_each_once():
    widths = [20, 40, 60, 80, 100, 33, 47, 12, 90, 5, 1500]
    boxes = np.array([[3, 20, 3 + w, 36] for w in widths], float)
    batches = word_batches(gray_page(1600), boxes)
    assert sorted(p for batch in batches for p in batch.places) == list(range(len(widths)))
    assert {batch.images.shape[:2] for batch in batches} == {(TOGETHER, recognizer.HEIGHT)}
    assert [batch.images.shape[2] for batch in batches] == [WIDTHS[-1], WIDTHS[0]]
    assert batches[0].places[0] == 10  # the widest, squeezed
    for batch in batches:
        filled = batch.images[: len(batch.places)]
        assert (filled == 200).all()
        assert (batch.images[len(batch.places) :] == 0).all()
    assert word_batches(gray_page(64), np.zeros((0, 4))) == []


def test_a_word_is_right_at_its_place_and_once():
    boxes = np.array([[0, 0, 10, 10], [20, 0, 30, 10]], float)
    found = np.array([[1, 0, 10, 10], [0, 0, 10, 10], [20, 0, 30, 10], [50, 0, 60, 10]], float)
    texts = ("one", "one", "tow", "two")
    reading = Reading(boxes=found, texts=texts, milliseconds={})
    np.testing.assert_array_equal(
        right_words(reading, boxes, ("one", "two")), [False, True, False, False]
    )
    assert right_words(reading, boxes[:0], ()).tolist() == [False] * 4


def fake_networks(word="Hi"):
    """Networks that see a word wherever the page is dark, and read the same everywhere."""

    def detect(x):
        dark = np.asarray(x)[:, ::2, ::2, :1] < 0
        return np.where(dark, (0.9, 0.0), (0.0, 0.0))

    def recognize(x):
        logits = np.zeros((len(x), 2 * len(word), 1 + len(recognizer.SYMBOLS)))
        for step, letter in enumerate(word):
            logits[:, 2 * step, recognizer.SYMBOLS.index(letter) + 1] = 1
            logits[:, 2 * step + 1, 0] = 1
        return logits

    return Networks(detect=detect, recognize=recognize)


def page_with_words():
    page = np.full((50, 101, 3), 255, np.uint8)
    page[10:20, 60:101] = 0  # up to the edge
    page[12:22, 8:40] = 0
    page[34:46, 8:40] = 0
    return page


def test_a_page_of_any_size_is_read():
    page = page_with_words()
    assert padded(page).shape == (64, 128, 3)
    reading = read_page(page, fake_networks())
    assert reading.texts == ("Hi",) * 3
    assert set(reading.milliseconds) == set(read.STAGES)
    assert reading.boxes.min() >= 0 and reading.boxes[:, 2].max() <= 101
    middles = (reading.boxes[:, :2] + reading.boxes[:, 2:]) / 2
    assert np.abs(middles[:, 1] - (15, 17, 40)).max() <= 3
    empty = read_page(np.full((20, 20, 3), 255, np.uint8), fake_networks())
    assert empty.texts == () and empty.boxes.shape == (0, 4)


def test_the_report_has_words_line_by_line_and_what_is_right():
    first = read_page(page_with_words(), fake_networks())
    last = Reading(
        boxes=first.boxes, texts=("b", "a", "c"), milliseconds=dict.fromkeys(read.STAGES, 1.0)
    )
    readings = {"original": first, "shrunk": last}
    truth = (first.boxes, ("b", "a", "Hi"))
    marks = {name: read.marked(each, truth) for name, each in readings.items()}
    text = str(read.report(readings, marks, truth))
    assert text.startswith("a b c\n")
    assert "1 of 3 (33.3%)" in text and "2 of 3 (66.7%)" in text
    assert text.endswith("0 of the original's 3 words are read alike.")
    nothing = Reading(boxes=np.zeros((0, 4)), texts=(), milliseconds=last.milliseconds)
    nothings = dict.fromkeys(readings, nothing)
    assert str(read.report(nothings, dict.fromkeys(readings), None)).startswith("(none)\n")


def test_the_picture_shows_the_page_once_a_reader():
    page = page_with_words()
    reading = read_page(page, fake_networks())
    marks = {"original": np.array([True, False, True]), "shrunk": None}
    content = page_picture(page, dict.fromkeys(marks, reading), marks)
    picture = Image.open(io.BytesIO(content))
    assert picture.format == "PNG" and picture.width == 101 and picture.height > 2 * 50
    colours = {tuple(c) for c in np.asarray(picture.convert("RGB")).reshape(-1, 3)}
    for wanted in ((0, 130, 60), (210, 30, 30), (30, 80, 200)):
        assert min(np.abs(np.subtract(c, wanted)).max() for c in colours) < 16


def test_images_of_any_kind_and_size_are_pages(tmp_path):
    Image.new("L", (2560, 100), 7).save(tmp_path / "wide.png")
    page = read.load_page(tmp_path / "wide.png")
    assert page.shape == (50, 1280, 3) and (page == 7).all()


@pytest.mark.parametrize("kind", ["missing", "text", "folder", "cut"])
def test_an_image_that_cannot_be_read_is_told_in_a_line(kind, tmp_path, capsys):
    path = tmp_path / "page.png"
    if kind == "text":
        path.write_text("no image")
    elif kind == "folder":
        path.mkdir()
    elif kind == "cut":
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:2000])
    assert read.main([f"--image={path}", f"--out={tmp_path / 'out'}"]) == read.BAD_INPUT
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and str(path) in told and "Traceback" not in told
    assert not (tmp_path / "out").exists()


def test_missing_weights_are_told_in_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(weights, "PACKAGE", "no-such-package")
    monkeypatch.setattr(read, "build_kernels", lambda: None)
    Image.new("RGB", (64, 64)).save(tmp_path / "page.png")
    assert read.main([f"--image={tmp_path / 'page.png'}"]) == read.BAD_INPUT
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "pip install" in told


def test_without_a_compiler_the_example_goes_on(capsys, monkeypatch):
    def build():
        raise ValueError("no C++ compiler was found")

    monkeypatch.setattr(falcon_jax.native, "is_built", lambda: False)
    monkeypatch.setattr(falcon_jax.native, "build", build)
    read.build_kernels()
    assert "without compiled kernels" in capsys.readouterr().err


class Tiny(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.second = nnx.Conv(8, 16, (3, 3), rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


def test_shrunk_networks_are_kept(tmp_path, monkeypatch):
    def load():
        return Tiny(nnx.Rngs(0))

    rules = fj.Rule(path="first", method=None), fj.Rule(method=fj.Falcon())
    settings = shrinking.Settings(rules=rules, examples=2)
    for name in ("detector", "recognizer"):
        monkeypatch.setattr(getattr(shrinking, name), f"load_{name}", load)
    monkeypatch.setattr(shrinking, "QUICK", dict.fromkeys(("detector", "recognizer"), settings))
    batch = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    for name in ("pages", "words"):
        monkeypatch.setattr(shrinking, f"calibration_{name}", lambda count: [batch])
    models = shrinking.Models(detector=load(), recognizer=load())
    made = shrinking.shrunk(models, tmp_path / "kept", quick=True)
    monkeypatch.setattr(shrinking, "shrink_one", None)
    again = shrinking.shrunk(models, tmp_path / "kept", quick=True)
    small, loaded = made.detector, again.detector
    assert callable(small) and callable(loaded)
    np.testing.assert_array_equal(small(batch), loaded(batch))
    assert fj.profile(small, batch).mult_adds < fj.profile(models.detector, batch).mult_adds


@pytest.mark.slow
def test_the_detectors_maps_have_half_the_size():
    model = nnx.eval_shape(lambda: detector.Detector(rngs=nnx.Rngs(0)))
    x = nnx.eval_shape(lambda: np.zeros((1, 64, 96, 3), np.float32))
    assert nnx.eval_shape(lambda m, x: m(x), model, x).shape == (1, 32, 48, 2)


@needs_fonts
@pytest.mark.slow
@pytest.mark.skipif(installed() is None, reason="the weights are not installed")
def test_the_trained_detector_finds_words():
    pages = render_pages(8, seed=7)
    scores = np.asarray(detector.load_detector()(detector.normalized(pages.images)))
    totals = np.zeros(3)
    for found, truth in zip(scores, pages.boxes, strict=True):
        totals += detector.match_counts(detector.find_boxes(found), truth)
    right, found, true = totals
    assert 2 * right / (found + true) > 0.8


@needs_fonts
@pytest.mark.slow
@pytest.mark.skipif(installed() is None, reason="the weights are not installed")
def test_the_trained_networks_read_a_page():
    sheets = render_sheets(1, seed=7, height=160, width=320)
    reading = read_page(sheets.images[0], shrinking.deployed(shrinking.originals()))
    right = right_words(reading, sheets.boxes[0], sheets.texts[0]).sum()
    assert right >= 0.7 * len(sheets.texts[0])


@pytest.mark.slow
@pytest.mark.skipif(installed() is None, reason="the weights are not installed")
def test_pytorchs_networks_are_ours():
    torch = pytest.importorskip("torch")
    from benchmarks import ocr

    rng = np.random.default_rng(0)
    pages = rng.normal(size=(1, 64, 96, 3)).astype(np.float32)
    words = rng.uniform(-1, 1, size=(2, 64, 96, 1)).astype(np.float32)
    models = shrinking.originals()
    for x, ours, theirs, name in (
        (pages, models.detector, ocr.TorchDetector(), "craft_mlt_25k.pth"),
        (words, models.recognizer, ocr.TorchRecognizer(), "english_g2.pth"),
    ):
        assert callable(ours)
        with torch.no_grad():
            y = ocr.loaded(theirs, name)(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
        np.testing.assert_allclose(np.asarray(ours(x)), y, atol=1e-3 * np.abs(y).max())
