"""Digits against what is published of them."""

from pathlib import Path

import numpy as np
import pytest

from xception_flax import data
from xception_flax.data import sources


def test_digits_are_the_published_ones():
    """1,797 images; scikit-learn's documentation of the same file has the class counts and the mean."""
    whole = sources.digits.digits("train+validation+test")
    assert np.bincount(whole.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    with np.load(Path(data.__file__).with_name("digits.npz")) as file:
        assert file["images"].shape == (1797, 8, 8)
        assert file["images"].max() == 16
        assert file["images"].mean() == pytest.approx(4.8842, abs=1e-4)
        assert file["labels"][:10].tolist() == list(range(10))


def test_digits_splits_are_fixed_and_apart():
    parts = {name: sources.digits.digits(name) for name in ("train", "validation", "test")}
    assert {name: len(part) for name, part in parts.items()} == {"train": 1257, "validation": 180, "test": 360}
    assert parts["test"].labels[:12].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5, 2, 8]
    rows = [{image.tobytes() for image in part.images} for part in parts.values()]
    assert len(rows[0] | rows[1] | rows[2]) == sum(map(len, rows))
