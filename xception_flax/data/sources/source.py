"""What a source is, and checks that several share."""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from xception_flax.host import allocator
from xception_flax.text.errors import TRY_AGAIN, UserError
from xception_flax.text.lookup import written
from xception_flax.text.naming import composed

Example = dict[str, Any]

# Without names the largest label gives the number of classes. No data set has as many as this.
MAX_UNNAMED_CLASSES = 2**20


class InputError(UserError):
    """Examples cannot be read any further, because of an image, a file or a worker process."""


class WorkerEnded(InputError):
    """A worker process has ended, most likely for lack of memory: with luck the same command goes on."""

    exit_code = TRY_AGAIN


@runtime_checkable
class Source(Protocol):
    """What every source function returns."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the labels 0, 1, ..., in their order."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Examples in memory: `images` `[N, H, W]` or `[N, H, W, C]` uint8, `labels` `[N]` or `[N, classes]`."""

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        return {"image": self.images[index], "label": self.labels[index]}


@dataclasses.dataclass(frozen=True)
class Renumbered:
    """The examples of a source, with a network's numbers of the classes.

    Attributes:
      source: the examples.
      numbers: the new number of each of its classes.
      class_names: by the new numbers.
    """

    source: Source
    numbers: tuple[int, ...]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        example = self.source[index]
        label = np.asarray(example["label"])
        if not label.ndim:
            return example | {"label": self.numbers[int(label)]}
        row = np.zeros(len(self.class_names), label.dtype)
        row[list(self.numbers)] = label
        return example | {"label": row}


def distinct(names: Iterable[str], what: str) -> tuple[str, ...]:
    """Returns names of classes in Unicode's composed form.

    Raises:
      UserError: two are equal, so that a table, a picture or a JSON could not tell them apart.
    """
    names = tuple(map(composed, names))
    if len(set(names)) < len(names):
        twice, count = Counter(names).most_common(1)[0]
        raise UserError(f"{what} must differ, got {written(twice)} {count} times.")
    return names


def check_num_classes(num_classes: int, num_images: int, what: str) -> None:
    """Raises UserError if there are more unnamed classes than images, and than any data set has.

    Otherwise the names for one wrong label could take all memory.
    """
    if num_classes > max(num_images, MAX_UNNAMED_CLASSES):
        raise UserError(
            f"{what}: {num_classes:,} classes, by the largest label or the number of columns, are too many for "
            f"{num_images:,} images; number the classes from 0, or give their names too."
        )


def check_memory(path: str | Path, num_bytes: int) -> None:
    """Raises UserError if arrays of `num_bytes` do not fit into free memory. Call it before reading them."""
    if num_bytes > (free := allocator.free_memory_bytes()):
        raise UserError(
            f"{path} holds {num_bytes / 2**30:,.1f} GiB by its header, but {free / 2**30:,.1f} GiB of memory are free; "
            "data sets of that size are read from files: by source 'folder' or 'tfds'."
        )


def existing_directory(path: str, content: str) -> Path:
    """Returns the absolute path of a directory, with '~' expanded.

    Args:
      path: of the directory.
      content: what is expected there, for the message.

    Raises:
      UserError: it does not exist.
    """
    directory = Path(os.path.expanduser(path)).absolute()
    if not os.path.isdir(directory):  # unlike Path's methods, these raise for no user name and no path
        raise UserError(f"data.data_dir: {directory} is no directory; expected {content} there.")
    return directory
