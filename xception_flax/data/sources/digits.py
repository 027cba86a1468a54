"""Handwritten digits that come with this package."""

from pathlib import Path

import numpy as np

from xception_flax.data.sources.source import Arrays
from xception_flax.text.lookup import lookup


def digits(split: str, /) -> Arrays:
    """1,797 handwritten digits, 8 x 8 pixels, in this package; splits 'train', 'validation', 'test'.

    The test part of UCI's "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak 1998, CC BY 4.0), which
    scikit-learn also has. A fixed permutation splits it into 360 'test' (held out: no recipe is tuned on it),
    180 'validation' and 1,257 'train'. The splits share writers.
    """
    with np.load(Path(__file__).parents[1] / "digits.npz") as file:
        images, labels = file["images"], file["labels"]
    order = np.random.RandomState(0).permutation(len(images))  # NumPy guarantees that this generator never changes
    parts = {"test": order[:360], "validation": order[360:540], "train": order[540:]}
    index = np.concatenate([lookup(parts, part, "split of digits") for part in split.split("+")])
    pixels = (images[index].astype(np.float32) * (255 / 16)).round().astype(np.uint8)  # stored as 0 to 16
    return Arrays(pixels, labels[index].astype(np.int32), tuple("0123456789"))
