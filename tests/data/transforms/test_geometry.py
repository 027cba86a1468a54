"""Geometric transforms against their definitions."""

import numpy as np
import PIL.Image
import pytest

from xception_flax.data import transforms
from xception_flax.data.transforms import crops, geometry
from xception_flax.text.errors import UserError


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


# Sizes that are not square: height x width ---------------------------------------------------------

SQUARES = (
    "resize",
    "resize(antialias=True)",
    "center_crop(fraction=0.8)",
    "resize_center_crop(resize_size=45, kernel=bicubic, antialias=True)",
    "random_resized_crop(antialias=True)",
    "random_resized_crop(sampling=tensorflow)",
    "random_crop_with_padding(padding=5)",
)


def apply(chain: str, image: np.ndarray, image_size) -> np.ndarray:
    rng = np.random.default_rng(7)
    for transform in transforms.parse_transforms(chain, image_size):
        image = transform(image, rng)
    return image


@pytest.mark.parametrize("chain", SQUARES)
def test_a_square_pair_is_the_number(chain, photo):
    np.testing.assert_array_equal(apply(chain, photo, (32, 32)), apply(chain, photo, 32))


@pytest.mark.parametrize("size", [(24, 36), (36, 24)], ids=str)
@pytest.mark.parametrize("chain", SQUARES)
def test_every_transform_makes_height_times_width(chain, size, photo):
    assert apply(chain, photo, size).shape == (*size, 3)


def test_resize_to_a_rectangle_is_pils(photo):
    expected = np.asarray(PIL.Image.fromarray(photo).resize((20, 30), PIL.Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(apply("resize(antialias=True)", photo, (30, 20)), expected)


def test_center_crop_has_the_shape_of_the_size(photo):
    """Of 40 x 60, the largest rectangle of 3:2 is all, of 1:3 (40, 13.3), of 3:1 (20, 60); half of each is taken."""
    half = "center_crop(fraction=0.5)"
    np.testing.assert_array_equal(apply(half, photo, (20, 30)), photo[10:30, 15:45])
    np.testing.assert_array_equal(apply(half, photo, (10, 30)), photo[15:25, 15:45])
    np.testing.assert_array_equal(apply("center_crop(fraction=1)", photo, (40, 10)), photo[:, 25:35])


def test_resize_center_crop_to_a_rectangle_is_timms():
    """ResizeKeepRatio((30, 60)) of 100 x 151: the width is the tight side, so 151 / 60 = 2.52 makes 40 x 60. Then
    CenterCrop((24, 48)) starts at 8 and 6. With 48 for the shorter side, 48 x 72 (72.48 cut off), at 12 and 12."""
    photo = np.random.default_rng(0).integers(0, 256, (100, 151, 3), dtype=np.uint8)
    for chain, size, box in (
        ("resize_center_crop(resize_size=(30, 60), antialias=True)", (60, 40), np.s_[8:32, 6:54]),
        ("resize_center_crop(resize_size=48, antialias=True)", (72, 48), np.s_[12:36, 12:60]),
    ):
        expected = np.asarray(PIL.Image.fromarray(photo).resize(size, PIL.Image.Resampling.BILINEAR))[box]
        np.testing.assert_array_equal(apply(chain, photo, (24, 48)), expected)


def test_a_strip_is_cut_to_what_a_rectangle_covers():
    """Scaled whole, 1 x 200,000 pixels would be 60 x 12,000,000."""
    strip = np.zeros((1, 200_000, 3), np.uint8)
    strip[:, 99_000:101_000] = 255
    assert (apply("resize_center_crop(resize_size=(60, 90))", strip, (32, 48)) == 255).all()


def test_random_resized_crop_stretches_the_same_rectangle(photo):
    """The rectangle is drawn of the image alone; for another shape the same one is scaled to it."""
    box = crops.torchvision_box(np.random.default_rng(7), 40, 60, min_area=0.08, max_area=1.0, max_aspect=4 / 3)
    top, left, height, width = box
    part = PIL.Image.fromarray(photo[top : top + height, left : left + width])
    chain = "random_resized_crop(antialias=True)"
    for size in ((10, 10), (8, 12), (12, 8)):
        expected = np.asarray(part.resize(size[::-1], PIL.Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(apply(chain, photo, size), expected)


def test_random_crop_with_padding_of_a_rectangle(photo):
    """It is a window of the padded image, somewhere."""
    padded = np.pad(photo, ((3, 3), (3, 3), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (30, 50, 3))[..., 0, :, :, :]
    found = apply("random_crop_with_padding(padding=3)", photo, (30, 50))
    assert (windows == found).all((-1, -2, -3)).sum() == 1


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ("resize_center_crop(resize_size=40)", r"resize_size must be in \[48, 10,000\], got 40"),
        ("resize_center_crop(resize_size=(23, 60))", r"the height of resize_size must be in \[24, 10,000\], got 23"),
        ("resize_center_crop(resize_size=(60, 47))", r"the width of resize_size must be in \[48, 10,000\], got 47"),
        ("resize(image_size=(8, 0))", r"the width of image_size must be in \[1, 10,000\], got 0"),
        ("resize(image_size=(8, 8, 8))", r"image_size must be a number, or height x width such as 224x320"),
        ("resize(image_size=8x8)", "a transform must be written as name"),
        ("random_crop_with_padding(padding=25)", r"padding must be in \[0, 24\], got 25"),
    ],
)
def test_sizes_that_are_refused(chain, message):
    with pytest.raises(UserError, match=message):
        transforms.parse_transforms(chain, (24, 48))
