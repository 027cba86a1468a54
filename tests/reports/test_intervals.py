"""Intervals against published and hand-computed numbers."""

import math

import numpy as np
import pytest

from xception_flax.reports import intervals


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17, 857-872, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_shares_are_as_published(successes, count, low, high):
    assert intervals.wilson(successes, count) == pytest.approx((low, high), abs=5e-5)


def test_a_share_of_nothing_has_none():
    assert all(map(math.isnan, intervals.wilson(0, 0)))


def test_the_difference_of_two_networks():
    """By hand, after Bonett and Price: (9 + 1 - 1 - 1) / 22 and 1.96 sqrt((12 / 22 - (8 / 22)^2) / 22)."""
    middle, half = 8 / 22, 1.959964 * math.sqrt((12 / 22 - (8 / 22) ** 2) / 22)
    assert intervals.difference(9, 1, 20) == pytest.approx((middle - half, middle + half))
    assert intervals.difference(1, 9, 20) == pytest.approx((-middle - half, -middle + half))
    low, high = intervals.difference(0, 0, 20)
    assert low == -high < 0  # networks that agree on 20 images may still differ


def test_resamples_have_the_standard_error_of_a_mean():
    """Of a share p of n images it is sqrt(p (1 - p) / n). Each resample has n images, and each time the same ones."""
    right = np.arange(400) < 300
    weights = intervals.resample(400)
    assert weights.shape == (400, 1001)
    assert (weights[:, 0] == 1).all()
    assert (weights.sum(0) == 400).all()
    assert (weights == intervals.resample(400)).all()
    value, low, high = intervals.around(right @ weights / 400)
    assert value == 0.75
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.75 * 0.25 / 400), rel=0.05)
    assert (high + low) / 2 == pytest.approx(0.75)


def test_fewer_resamples_of_many_images():
    assert [intervals.num_resamples(n) for n in (1, 5000, 10_000, 50_000, 10**7)] == [1000, 1000, 500, 100, 100]


def test_an_interval_is_cut_and_leaves_out_what_is_undefined():
    assert intervals.around(np.array([1.0, 1.0, 0.5, np.nan])) == pytest.approx([1, 1 - 1.959964 * math.sqrt(0.125), 1])
    assert np.isnan(intervals.around(np.array([[np.nan, 1.0, 0.5]]))).all()


def test_what_is_the_same_in_all_resamples_has_no_interval():
    """Also where the same number is computed with other rounding, and where one resample alone has it defined."""
    third = np.nextafter(1 / 3, 1)
    for values in ([1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1 / 3, 1 / 3, third], [0.5, np.nan, 0.25], [0.5, np.nan, np.nan]):
        found = intervals.around(np.array(values))
        assert found[0] == values[0]
        assert np.isnan(found[1:]).all()
    assert np.isfinite(intervals.around(np.array([1e-9, 1e-9, 2e-9]))).all()
