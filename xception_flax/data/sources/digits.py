"""Handwritten digits inside this package."""

from pathlib import Path

import numpy as np

from xception_flax.data.sources.source import Arrays
from xception_flax.text.lookup import lookup


def digits(split: str, /) -> Arrays:
    """1,797 handwritten digits, 8 x 8 pixels, inside this package; splits 'train', 'validation', 'test'.

    The test part of UCI's "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak 1998, CC
    BY 4.0), as scikit-learn has it too. A fixed permutation of them: 360 'test' (held out: no
    choice of a recipe is tuned on it), 180 'validation', 1,257 'train'. The splits share writers.
    """
    with np.load(Path(__file__).parents[1] / "digits.npz") as file:
        images, labels = file["images"], file["labels"]
    order = np.random.RandomState(0).permutation(len(images))  # NumPy has frozen this generator for good
    parts = {"test": order[:360], "validation": order[360:540], "train": order[540:]}
    index = np.concatenate([lookup(parts, part, "split of digits") for part in split.split("+")])
    pixels = (images[index].astype(np.float32) * (255 / 16)).round().astype(np.uint8)  # stored as 0 to 16
    return Arrays(pixels, labels[index].astype(np.int32), tuple("0123456789"))
