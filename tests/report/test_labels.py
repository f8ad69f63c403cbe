import itertools

import numpy as np
import pytest

from falcon_jax.report.plots import Box, overlaps, place_labels

AREA = Box(0.0, 0.0, 400.0, 300.0)


def inside(box):
    return box.left >= 0 and box.bottom >= 0 and box.right <= 400 and box.top <= 300


def test_lone_label_stands_to_the_right_at_the_height_of_its_point():
    [box] = place_labels([(60.0, 10.0)], [(100.0, 100.0)], area=AREA)
    assert 105 <= box.left <= 112
    assert (box.bottom + box.top) / 2 == pytest.approx(100)
    assert box.right - box.left == pytest.approx(60)


def test_label_at_the_right_border_goes_elsewhere():
    [box] = place_labels([(60.0, 10.0)], [(390.0, 100.0)], area=AREA)
    assert inside(box)


def test_labels_avoid_obstacles_and_paths():
    obstacle = Box(105.0, 80.0, 200.0, 120.0)
    [box] = place_labels(
        [(60.0, 10.0)],
        [(100.0, 100.0)],
        area=AREA,
        obstacles=[obstacle],
        paths=[[(100.0, 0.0), (100.0, 300.0)]],
    )
    assert not overlaps(box, obstacle)
    assert box.right < 100


@pytest.mark.parametrize("seed", [0])
def test_a_cluster_of_labels_does_not_overlap(seed):
    points = [tuple(p) for p in np.random.default_rng(seed).uniform(100, 220, (10, 2)).tolist()]
    boxes = place_labels([(70.0, 10.0)] * 10, points, area=AREA)
    assert all(map(inside, boxes))
    assert not any(overlaps(a, b) for a, b in itertools.combinations(boxes, 2))


def test_nothing_to_place():
    assert place_labels([], [], area=AREA) == []
