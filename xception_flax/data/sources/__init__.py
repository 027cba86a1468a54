"""Where examples come from: random access, no order, no randomness, nothing decoded.

A source has a length and `class_names`. `source[i]` is a dict of `image` (the bytes of a file, or uint8 `[H, W]` /
`[H, W, C]`), `label` (an integer, or `[num_classes]` of 0 and 1 if images have several labels) and optionally `name`,
which error messages use. Sources are sent to worker processes, so they must pickle.
"""

import os
from collections.abc import Callable

from xception_flax.data.sources import arrays, digits, fashion_mnist, folder, table, tfds
from xception_flax.data.sources.columns import SUFFIXES
from xception_flax.data.sources.source import InputError, Source

__all__ = ["SOURCES", "InputError", "Source", "source_at"]

#: The sources by name, for `data.source` of a recipe.
SOURCES: dict[str, Callable[..., Source]] = {
    "digits": digits.digits,
    "fashion_mnist": fashion_mnist.fashion_mnist,
    "tfds": tfds.tfds,
    "folder": folder.folder,
    "table": table.table,
    "arrays": arrays.arrays,
}


def source_at(path: str) -> dict[str, str]:
    """Returns the keys of the group `data` that read a folder of images, or a table if `path` is a file.

    A recipe gives it what the user names: `config.data = dict(**data.source_at(path), train_split="train", ...)`.
    """
    place = os.path.expanduser(path)
    is_table = os.path.isfile(place) or (os.path.splitext(path)[1].lower() in SUFFIXES and not os.path.isdir(place))
    return {"source": "table", "path": path} if is_table else {"source": "folder", "data_dir": path}
