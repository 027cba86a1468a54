"""The order of training: which example is at which place of an endless run."""

import functools

import numpy as np

from xception_flax.data.sources.source import Example, Source
from xception_flax.data.sources.table import Rows
from xception_flax.text.errors import UserError

SAMPLINGS = ("shuffled", "balanced")

# More places than a run has: a step is counted in 32 bits.
ENDLESS = 2**62


class Balanced:
    """An endless source in which each class comes equally often, whatever the number of its images.

    Place i of the run belongs to epoch i // N, where N is the number of images. In each epoch the classes come N / C
    times, in random order; where C does not divide N, those that come once more change from epoch to epoch. Each class
    goes through its images in random order, and begins anew, in another order, when all were there. So every place is
    a function of the seed and its number alone.
    """

    def __init__(self, source: Source, seed: int) -> None:
        """Looks at the labels.

        Args:
          source: the examples.
          seed: of the order.

        Raises:
          UserError: the source does not know its labels without reading all images, or images have several.
        """
        labels = labels_of(source)
        if labels is None:
            raise UserError(
                "data.sampling=balanced needs one label an image, known without reading the images, as in a folder, a "
                "table or arrays; leave it out, or set loss.class_weights."
            )
        self._source, self._seed = source, seed
        order = np.argsort(labels, kind="stable")
        present, starts = np.unique(labels[order], return_index=True)
        self._members = np.split(order, starts[1:])  # the images of each class that has some
        self._num_classes = len(present)
        self._order = functools.lru_cache(2)(self._draw_order)
        self._cycle = functools.lru_cache(2 * self._num_classes)(self._draw_cycle)

    def __len__(self) -> int:
        return ENDLESS

    def __repr__(self) -> str:
        return f"{self._source!r}, each class equally often"

    def __getitem__(self, place: int) -> Example:
        return self._source[self.index(place)]

    def index(self, place: int) -> int:
        """Returns the number of the example at a place."""
        epoch, place = divmod(place, len(self._source))
        turn = epoch * len(self._source) + int(self._order(epoch)[place])
        draw, number = divmod(turn, self._num_classes)
        members = self._members[number]
        cycle, place = divmod(draw, len(members))
        return int(members[self._cycle(number, cycle)[place]])

    def _draw_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self._seed, 0, epoch)).permutation(len(self._source))

    def _draw_cycle(self, number: int, cycle: int) -> np.ndarray:
        return np.random.default_rng((self._seed, 1, number, cycle)).permutation(len(self._members[number]))

    def __getstate__(self) -> dict[str, object]:  # for worker processes, without the caches
        return {"source": self._source, "seed": self._seed}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)


def labels_of(source: Source) -> np.ndarray | None:
    """Returns the label of each image, `[N]`; None if images have several, or must be read for it."""
    if isinstance(source, Rows):
        return None if source.several else source.numbered().classes
    labels = getattr(source, "labels", None)
    return None if labels is None or np.ndim(labels) != 1 else np.asarray(labels)


def class_shares(source: Source) -> np.ndarray | None:
    """Returns which share of the images has each class, float64 `[classes]`; None if images must be read for it."""
    labels, count = labels_of(source), len(source.class_names)
    if labels is None and isinstance(source, Rows):
        labels = source.numbered().classes
    if labels is not None:
        return np.bincount(labels, minlength=count) / len(source)
    rows = getattr(source, "labels", None)
    return None if rows is None else (np.asarray(rows) > 0).mean(0)
