"""Where examples come from: random access, no order, no randomness, nothing decoded.

A source has a length, `num_classes`, `class_names`, and `source[i]` is a dict of `image` (the
bytes of a file, or uint8 `[H, W]` / `[H, W, C]`) and `label` (an integer, or `[num_classes]` of 0
and 1 where images have several labels); where it has a `name`, errors call it by that. Sources are
sent to worker processes: they must pickle.
"""

from collections.abc import Callable

from xception_flax.data.sources import arrays, digits, fashion_mnist, folder, tfds
from xception_flax.data.sources.source import InputError, Source

__all__ = ["SOURCES", "InputError", "Source"]

SOURCES: dict[str, Callable[..., Source]] = {
    "digits": digits.digits,
    "fashion_mnist": fashion_mnist.fashion_mnist,
    "tfds": tfds.tfds,
    "folder": folder.folder,
    "arrays": arrays.arrays,
}
