"""The nearest images by their features."""

from pathlib import Path

import numpy as np
import pytest

from xception_flax.inference.neighbours import Gallery


def test_nearest_by_angle(tmp_path):
    """Cosines by hand; lengths do not count, a zero vector is near to nothing, the image itself is left out."""
    features = np.float32([[1, 0], [10, 0], [1, 1], [0, 5], [-2, 0], [0, 0]])
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    gallery = Gallery(paths, features)
    found = gallery.nearest(Path("elsewhere.png"), np.float32([3, 0]), 3)
    assert [neighbour.path.name for neighbour in found] == ["0.png", "1.png", "2.png"]
    assert [neighbour.similarity for neighbour in found] == pytest.approx([1, 1, 0.5**0.5])
    found = gallery.nearest(tmp_path / ".." / tmp_path.name / "0.png", features[0], 9)
    assert [neighbour.path.name for neighbour in found] == ["1.png", "2.png", "3.png", "5.png", "4.png"]
    assert found[-1].similarity == pytest.approx(-1)
