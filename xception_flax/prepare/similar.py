"""Images that look the same: their perceptual hashes (pHash), and those of two splits that are near each other."""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import imagehash
import numpy as np
from PIL import Image

# Of 64 bits, those in which the hashes of two images may differ. Written as a JPEG of quality 30, scaled to the half or
# 20 % brighter, nearly all photographs stay within. Distances are even, since half of the bits are set.
MAX_DISTANCE = 4

# Two hashes that differ in four bits agree in one of five parts, so only those that agree in a part are compared.
_PARTS = ((0, 13), (13, 13), (26, 13), (39, 13), (52, 12))  # first bit and number of bits

_COMPARED = 2**22  # pairs at a time: 100 MB

_FLAT = 16  # an image whose values differ by less has nothing that a hash could tell


class Pair(NamedTuple):
    """Two images in two splits that look the same.

    Attributes:
      distance: bits in which their hashes differ.
      one, other: the split and the place of each, from 0.
    """

    distance: int
    one: tuple[str, int]
    other: tuple[str, int]


def perceptual_hash(image: np.ndarray) -> int | None:
    """Returns the 64 bits of an image's pHash (Zauner 2010): the signs of its low frequencies against their median.

    Args:
      image: uint8 `[H, W, 3]`.

    Returns:
      The bits as a number; None for an image of one tone.
    """
    if int(image.max()) - int(image.min()) < _FLAT:
        return None
    return int.from_bytes(np.packbits(imagehash.phash(Image.fromarray(image)).hash).tobytes())


def near(hashes: Mapping[str, Sequence[int | None]]) -> list[Pair]:
    """Returns for each image that looks the same as images of other splits the nearest of these, the nearest first.

    Of two splits, the images of the smaller one are looked up in the larger one.

    Args:
      hashes: of the images of each split; None for those that are left out.
    """
    known = {}
    for split, values in hashes.items():
        places = [i for i, value in enumerate(values) if value is not None]
        known[split] = np.array(places, int), np.array([values[i] for i in places], np.uint64)
    pairs = []
    for few, many in itertools.combinations(sorted(known, key=lambda split: len(known[split][0])), 2):
        (places, values), (others, large) = known[few], known[many]
        distances, found = _nearest(values, large)
        pairs += [
            Pair(int(distances[i]), (few, int(places[i])), (many, int(others[found[i]])))
            for i in np.flatnonzero(distances <= MAX_DISTANCE)
        ]
    return sorted(pairs)


def _nearest(values: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each of `values` the distance to the nearest of `others`, and its place; 64 if none is near."""
    distances, found = np.full(len(values), 64), np.zeros(len(values), int)
    for first, bits in _PARTS:
        part, other_part = ((x >> np.uint64(first)) & np.uint64(2**bits - 1) for x in (values, others))
        order = np.argsort(other_part, kind="stable")
        begin, end = (np.searchsorted(other_part[order], part, side=side) for side in ("left", "right"))
        # The comparisons of each value, cut into pieces of about `_COMPARED`.
        ends = np.cumsum(end - begin)
        total = int(ends[-1]) if len(ends) else 0
        cuts = np.searchsorted(ends, np.arange(_COMPARED, total, _COMPARED)) + 1
        for piece in np.split(np.arange(len(values)), np.unique(cuts)):
            counts = (end - begin)[piece]
            mine = np.repeat(piece, counts)
            within = np.arange(len(mine)) - np.repeat(np.cumsum(counts) - counts, counts)
            other = order[begin[mine] + within]
            distance = np.bitwise_count(values[mine] ^ others[other]).astype(int)
            close = distance <= MAX_DISTANCE
            mine, other, distance = mine[close], other[close], distance[close]
            best = np.lexsort((other, distance, mine))  # the first of each is its nearest
            mine, where = np.unique(mine[best], return_index=True)
            distance, other = distance[best][where], other[best][where]
            better = (distance < distances[mine]) | ((distance == distances[mine]) & (other < found[mine]))
            distances[mine[better]], found[mine[better]] = distance[better], other[better]
    return distances, found
