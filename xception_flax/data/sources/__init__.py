"""Where examples come from: random access, no order, no randomness, nothing decoded.

A source has a length and `class_names`. `source[i]` is a dict of `image` (the bytes of a file, or uint8 `[H, W]` /
`[H, W, C]`), `label` (an integer, or `[num_classes]` of 0 and 1 if images have several labels) and optionally `name`,
which error messages use. Sources are sent to worker processes, so they must pickle.
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
