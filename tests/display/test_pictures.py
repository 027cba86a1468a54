"""Pictures of images with their captions."""

import cv2
import numpy as np

from xception_flax.display import pictures


def test_mistakes_show_every_image(tmp_path):
    images = [np.full((8, 8, c), 200, np.uint8) for c in (1, 3, 1, 3, 1, 3, 1, 3, 1)]
    pictures.draw_mistakes(images, ["a"] * 9, ["b" * 30] * 9, [0.5] * 9, "9 wrong", tmp_path / "m.png")
    nine = cv2.imread(str(tmp_path / "m.png"))
    pictures.draw_mistakes([], [], [], [], "none wrong", tmp_path / "none.png")
    none = cv2.imread(str(tmp_path / "none.png"))
    pictures.draw_mistakes(images[:1], ["a"], ["b"], [0.5], "a title\nof three\nlines", tmp_path / "one.png")
    one = cv2.imread(str(tmp_path / "one.png"))
    assert (one == 200).all(-1).mean() > 0.2  # the picture is no larger than its content
    assert none.shape[0] < 100
    gray = (nine == 200).all(-1).sum()
    assert gray > 9 * 50 * 50
    assert (none < 128).any()
