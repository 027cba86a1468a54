"""Fashion-MNIST from its IDX files."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from xception_flax.data.sources.source import Arrays, check_memory, existing_directory
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import cut, lookup

FASHION_CLASSES = (
    "t-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip

BLOCK = 2**22  # bytes that are read at a time


def fashion_mnist(split: str, /, data_dir: str = "/usr/share/datasets/fashion-mnist") -> Arrays:
    """Fashion-MNIST (Xiao et al. 2017) from its four IDX files; splits 'train', 'validation', 'test'.

    'validation' is the last twelfth of the published training set (5,000 of 60,000 images), 'train' the rest. Debian's
    package dataset-fashion-mnist puts the files into the default `data_dir`.

    Args:
      split: one of the three, or several joined by '+'.
      data_dir: folder with the four IDX files, plain or as .gz.

    Raises:
      UserError: a file is missing or damaged, or there is no such split.
    """
    directory = existing_directory(data_dir, "the four IDX files of Fashion-MNIST")
    images, labels = [], []
    for part in split.split("+"):
        prefix = lookup({"train": "train", "validation": "train", "test": "t10k"}, part, "split of fashion_mnist")
        x = _read_idx(directory / f"{prefix}-images-idx3-ubyte", ndim=3)
        y = _read_idx(directory / f"{prefix}-labels-idx1-ubyte", ndim=1)
        if len(x) != len(y):
            raise UserError(f"{directory}: {len(x)} {prefix} images, but {len(y)} labels.")
        if y.max(initial=0) >= len(FASHION_CLASSES):
            raise UserError(
                f"{directory}: the {prefix} labels go up to {y.max()}, but Fashion-MNIST has {len(FASHION_CLASSES)} "
                "classes; other data can come as an .npz file, by source 'arrays'."
            )
        first_validation = len(x) - len(x) // 12
        keep = {
            "train": slice(None, first_validation),
            "validation": slice(first_validation, None),
            "test": slice(None),
        }
        images.append(x[keep[part]])
        labels.append(y[keep[part]])
    return Arrays(np.concatenate(images), np.concatenate(labels).astype(np.int32), FASHION_CLASSES)


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    """Reads an IDX file of bytes, plain or with '.gz' (format: yann.lecun.com/exdb/mnist)."""
    zipped = path.with_name(path.name + ".gz")
    if not path.exists() and not zipped.exists():
        raise UserError(
            f"{path} is missing, plain or as .gz; put the four IDX files of Fashion-MNIST there "
            "(Debian: apt install dataset-fashion-mnist) or say where they are by --config.data.data_dir=DATA."
        )
    path = path if path.exists() else zipped
    try:
        with gzip.open(path) if path == zipped else path.open("rb") as file:
            zero, kind, dims = struct.unpack(">HBB", file.read(4))
            shape = struct.unpack(f">{dims}I", file.read(4 * dims))
            expected = math.prod(shape)
            if (zero, kind, dims) == (0, 8, ndim):
                check_memory(path, expected)
                content = bytearray()  # takes what is there, and not what the header says
                while len(content) <= expected and (part := file.read(BLOCK)):
                    content += part
                pixels = np.frombuffer(content, np.uint8)
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise UserError(f"{path}: not a readable IDX file ({error}).") from None
    if (zero, kind, dims) != (0, 8, ndim):
        raise UserError(f"{path}: expected an IDX file of bytes with {ndim} dimensions, got {cut(str(shape))}.")
    if pixels.size != expected:
        wrong = "more" if pixels.size > expected else f"{pixels.size:,}; it has been cut"
        raise UserError(f"{path}: expected {expected:,} bytes of {shape}, got {wrong}.")
    return pixels.reshape(shape)
