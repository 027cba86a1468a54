"""Colours over an image say where something is, and nothing where nothing is."""

import numpy as np
import pytest

from xception_flax.display import heat


@pytest.mark.parametrize("channels", [1, 3])
def test_warm_where_the_heat_is(channels):
    pixels = np.full((60, 90, channels), 100, np.uint8)
    values = np.zeros((4, 6), np.float32)
    np.testing.assert_array_equal(heat.warm(pixels, values), 85 + np.full((60, 90, 3), 15))  # as it was
    values[1, 4] = 1e-6  # place (15 to 30, 60 to 75) of the image
    drawn = heat.warm(pixels, values).astype(int)
    changed = np.abs(drawn - 100).max(-1)
    y, x = np.unravel_index(changed.argmax(), changed.shape)
    assert (15 <= y < 30, 60 <= x < 75) == (True, True)
    assert changed[:, :30].max() == 0
    assert drawn[y, x, 0] > drawn[y, x, 2] + 50  # yellow: more red than blue


def test_red_for_and_blue_against():
    pixels = np.full((100, 100, 3), 128, np.float32)
    values = np.zeros((100, 100))
    values[20:30, 20:30], values[70:80, 70:80] = 3.0, -3.0
    drawn = heat.for_and_against(pixels, values).astype(int)
    assert drawn[25, 25, 0] > drawn[25, 25, 2] + 50
    assert drawn[75, 75, 2] > drawn[75, 75, 0] + 50
    np.testing.assert_array_equal(drawn[50, 5], [128] * 3)
