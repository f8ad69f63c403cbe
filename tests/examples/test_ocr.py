"""The networks that read text: their boxes and pages, and what they score with trained weights."""

import importlib.metadata

import numpy as np
import pytest
from flax import nnx

from examples.ocr import detector
from examples.ocr.pages import render_pages
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
