"""Predictions made of random logits."""

import numpy as np
from numpy.typing import ArrayLike

from xception_flax.reports.predictions import Mistakes, Predictions


def single(rng: np.random.Generator, count: int, num_classes: int, *, ties: bool = False) -> Predictions:
    """One label an image; the true class has a higher logit. `ties`: probabilities of two digits."""
    labels = rng.integers(0, num_classes, count).astype(np.int32)
    logits = rng.normal(size=(count, num_classes))
    logits[np.arange(count), labels] += 1
    shares = np.exp(logits)
    probabilities = (shares / shares.sum(-1, keepdims=True)).astype(np.float32)
    if ties:
        probabilities = np.round(probabilities, 2)
    return of(labels, probabilities)


def several(rng: np.random.Generator, count: int, num_classes: int) -> Predictions:
    """Any number of labels an image."""
    labels = (rng.random((count, num_classes)) < 0.3).astype(np.uint8)
    probabilities = np.clip(rng.random((count, num_classes)) * 0.8 + 0.2 * labels, 0, 1).astype(np.float32)
    return of(labels, probabilities)


def of(labels: ArrayLike, probabilities: ArrayLike, names: list[str] | None = None) -> Predictions:
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, np.float32)
    names = names or [f"c{i}" for i in range(probabilities.shape[1])]
    predicted = np.nan_to_num(probabilities, nan=-1).argmax(-1).astype(np.int32)
    index = np.arange(len(labels))
    return Predictions(names, index, labels, predicted, probabilities, Mistakes([], [], [], []), labels)
