"""One of a thing is no plural."""

import pytest

from xception_flax.text.counting import counted


@pytest.mark.parametrize(
    ("number", "noun", "shown"),
    [
        (0, "image", "0 images"),
        (1, "image", "1 image"),
        (2, "class", "2 classes"),
        (1, "class", "1 class"),
        (3, "batch", "3 batches"),
        (1, "process", "1 process"),
        (1_281_167, "image", "1,281,167 images"),
    ],
)
def test_counted(number, noun, shown):
    assert counted(number, noun) == shown
