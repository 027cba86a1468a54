"""Geometric transforms against their definitions."""

import numpy as np
import pytest

from xception_flax.data.transforms import geometry


@pytest.fixture
def photo(rng) -> np.ndarray:
    return rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)


def test_resize_is_half_pixel_bilinear():
    """2 -> 4 pixels of a ramp: samples at -0.25, 0.25, 0.75, 1.25, clamped to the edge."""
    image = np.array([[[0], [100]]], np.uint8).repeat(2, 0)
    assert geometry.resize(image, None, image_size=4)[0, :, 0].tolist() == [0, 25, 75, 100]


def test_center_crop_takes_the_centre(photo):
    np.testing.assert_array_equal(geometry.center_crop(photo, None, image_size=20, fraction=0.5), photo[10:30, 20:40])
    assert geometry.center_crop(photo[:1, :1], None, image_size=4).shape == (4, 4, 3)


def test_random_resized_crop_has_the_promised_areas_and_aspects():
    """The pixels are their own coordinates, which shows the rectangle that was taken."""
    y, x = np.mgrid[0:200, 0:250].astype(np.uint8)
    coordinates = np.stack([y, x, 0 * x], -1)
    areas, aspects = [], []
    for seed in range(300):
        crop = geometry.random_resized_crop(coordinates, np.random.default_rng(seed), image_size=100, min_area=0.2)
        h = np.ptp(crop[..., 0].astype(int)) * 100 / 99
        w = np.ptp(crop[..., 1].astype(int)) * 100 / 99
        areas.append(h * w / (200 * 250))
        aspects.append(w / h)
    assert 0.18 < min(areas) < 0.25
    assert 0.85 < max(areas) <= 1.03
    assert np.mean(areas) == pytest.approx(0.55, abs=0.06)  # less than 0.6, since large ones fit less often
    assert 0.7 < min(aspects) < 0.8
    assert 1.25 < max(aspects) < 1.4


def test_flip_mirrors_half_of_the_images(photo):
    results = [geometry.flip_left_right(photo, np.random.default_rng(seed)) for seed in range(200)]
    flipped = [np.array_equal(r, photo[:, ::-1]) for r in results]
    assert all(f or np.array_equal(r, photo) for f, r in zip(flipped, results, strict=True))
    assert 75 < sum(flipped) < 125


def test_random_affine_moves_within_its_bounds():
    image = np.zeros((101, 101, 1), np.uint8)
    image[48:53, 48:53] = 255
    centres = []
    for seed in range(100):
        moved = geometry.random_affine(image, np.random.default_rng(seed), max_degrees=20, max_shift=0.1)
        weights = moved[..., 0].astype(float)
        centres.append([(weights.sum(axis) * np.arange(101)).sum() / weights.sum() - 50 for axis in (0, 1)])
    assert 8 < np.abs(centres).max() <= 10.2
    unmoved = geometry.random_affine(image, np.random.default_rng(0))
    np.testing.assert_array_equal(unmoved, image)
