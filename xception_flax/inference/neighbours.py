"""Images that look alike to a network: those with the nearest features."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Neighbour(NamedTuple):
    """An image near another one: its file, and the cosine of the angle between the features of both, -1 to 1."""

    path: Path
    similarity: float


class Gallery:
    """Images with their pooled features, to be searched."""

    def __init__(self, paths: Sequence[Path], features: np.ndarray) -> None:
        """Keeps the directions of `features`, `[N, C]`, each of the image in `paths` at its place."""
        self._paths = tuple(paths)
        self._real = [path.resolve() for path in paths]
        self._directions = _directions(features)

    def nearest(self, path: Path, features: np.ndarray, count: int) -> list[Neighbour]:
        """Returns the `count` nearest images to the one at `path`, the nearest first; `features` are `[C]`.

        The image itself is not among them. Of equally near ones the first in the gallery comes first.
        """
        similarities = self._directions @ _directions(features[None])[0]
        real = path.resolve()
        order = np.argsort(-similarities, kind="stable")[: count + self._real.count(real)]
        return [Neighbour(self._paths[i], float(similarities[i])) for i in order if self._real[i] != real][:count]


def _directions(features: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(features, axis=-1, keepdims=True)
    return features / np.maximum(lengths, np.finfo(np.float32).tiny)
