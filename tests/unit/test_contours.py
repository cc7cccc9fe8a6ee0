"""Polygons around masks, filled again at pixel centres by rules of others: not a pixel more or less."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from matplotlib.path import Path
from skimage.measure import points_in_poly

from mshub.contours import outlines


def centres(shape: tuple[int, int]) -> np.ndarray:
    return np.argwhere(np.ones(shape, bool)).astype(float)


def winding(polygon: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return the winding numbers of points, by signed crossings of a ray."""
    numbers = np.zeros(len(points), int)
    for (ax, ay), (bx, by) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        left = (bx - ax) * (points[:, 1] - ay) - (points[:, 0] - ax) * (by - ay)
        numbers += (ay <= points[:, 1]) & (by > points[:, 1]) & (left > 0)
        numbers -= (ay > points[:, 1]) & (by <= points[:, 1]) & (left < 0)
    return numbers


def filled(mask: np.ndarray, rule: str) -> np.ndarray:
    """Return how many of the polygons around a mask hold each pixel centre."""
    points, counts = centres(mask.shape), np.zeros(mask.size, int)
    for polygon in outlines(mask):
        if rule == "even-odd":
            counts += points_in_poly(points, polygon)
        elif rule == "non-zero":
            counts += winding(polygon, points) != 0
        else:
            counts += Path(np.vstack([polygon, polygon[:1]]), closed=True).contains_points(points)
    return counts.reshape(mask.shape)


def drawn(*rows: str) -> np.ndarray:
    return np.array([[sign == "#" for sign in row] for row in rows]).T


SHAPES = {
    "one pixel": drawn("....", ".#..", "...."),
    "whole image": drawn("###", "###"),
    "corner of the image": drawn("#..", "...", "..#"),
    "hole": drawn("#####", "#...#", "#...#", "#####"),
    "hole of one pixel at the rim": drawn("###", "#.#", "###"),
    "two holes side by side": drawn("#######", "#.#.#.#", "#######"),
    "two holes one above the other": drawn("####", "#.##", "####", "##.#", "####"),
    "holes that touch at a corner": drawn("#####", "#.###", "##.##", "#####"),
    "island in a hole": drawn("#######", "#.....#", "#..#..#", "#.....#", "#######"),
    "ring in a ring": drawn("#######", "#.....#", "#.###.#", "#.#.#.#", "#.###.#", "#.....#", "#######"),
    "pixels that touch at corners": drawn("#.#.", ".#.#", "#.#."),
    "two islands": drawn("##....", "##..##", "....##"),
    "u": drawn("#..#", "#..#", "####"),
    "hole in the arm of a u": drawn("###..###", "#.#..#.#", "###..###", "########"),
}


@pytest.mark.parametrize("rule", ["even-odd", "non-zero", "matplotlib"])
@pytest.mark.parametrize("mask", SHAPES.values(), ids=SHAPES)
def test_what_is_filled_is_the_mask(mask, rule):
    np.testing.assert_array_equal(filled(mask, rule), mask.astype(int))


@pytest.mark.parametrize("rule", ["even-odd", "non-zero"])
@pytest.mark.parametrize("density", [0.1, 0.3, 0.5, 0.7, 0.9, 0.97])
def test_noise_of_any_density_comes_back(density, rule):
    generator = np.random.default_rng(int(density * 100))
    for _ in range(40):
        mask = generator.random(generator.integers(1, 18, 2)) < density
        np.testing.assert_array_equal(filled(mask, rule), mask.astype(int))


def test_an_empty_mask_has_no_polygon():
    assert outlines(np.zeros((4, 5), bool)) == []


def test_a_disc_has_its_area_but_for_half_a_pixel():
    x, y = np.mgrid[:60, :70]
    disc = (x - 30) ** 2 + (y - 33) ** 2 < 25**2
    (polygon,) = outlines(disc)
    assert shapely.Polygon(polygon).area == pytest.approx(disc.sum() - 0.5)


def test_no_corner_lies_on_a_straight_line():
    (polygon,) = outlines(np.ones((30, 20), bool))
    assert len(polygon) == 8


def test_a_keyhole_runs_between_pixels_never_through_one():
    generator = np.random.default_rng(4)
    for _ in range(20):
        mask = generator.random((15, 16)) < 0.85
        for polygon in outlines(mask):
            closed = np.vstack([polygon, polygon[:1]])
            distances = shapely.distance(shapely.points(centres(mask.shape)), shapely.LineString(closed))
            assert distances.min() > 0.35
