"""Reads every image of a data set and describes what it finds."""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from xception_flax.data import decoding, sources
from xception_flax.data.sources.splitting import Rule
from xception_flax.prepare.folder import check_directory, splits_there
from xception_flax.text import naming
from xception_flax.text.errors import UserError

BLOCK = 1024  # images submitted at a time; futures for all images of a data set would take gigabytes


class Checked(NamedTuple):
    """An image after it was read.

    Attributes:
      name: of the file or record.
      classes: numbers of its classes; empty if it cannot be read.
      num_bytes: of the encoded image; 0 if it cannot be read.
      digest: SHA-256 of these bytes; empty if it cannot be read.
      height, width: in pixels; 0 if it cannot be decoded.
      largest: the largest value of an image of 16 bits, None for others.
    """

    name: str
    classes: tuple[int, ...]
    num_bytes: int
    digest: bytes
    height: int
    width: int
    largest: int | None = None


def open_splits(directory: Path, val_fraction: float | None) -> dict[str, sources.Source]:
    """Returns the splits of a prepared data set or a folder, as training has them; one may be empty.

    Raises:
      UserError: there is no data set, or more than one; or `val_fraction` is given where splits are fixed.
    """
    check_directory(directory)
    if (directory / "dataset_info.json").exists():
        if val_fraction is not None:
            raise UserError(f"{directory} is a data set, which has its splits; leave out --val-fraction.")
        names = tfds.builder_from_directory(directory).info.splits
        return {split: sources.tfds.tfds(split, data_dir=str(directory)) for split in names}
    for pattern in ("*/dataset_info.json", "*/*/dataset_info.json"):
        if below := next(directory.glob(pattern), None):
            raise UserError(f"{directory} has data sets below it; give one version of one, as {below.parent}.")
    splits, fraction = splits_there(directory, val_fraction)
    if splits:
        return {split: sources.folder.folder(split, data_dir=str(directory)) for split in splits}
    return sources.folder.held_out(directory, sources.folder.classes_in(directory), Rule(fraction))


def mistakes(directory: Path, splits: Mapping[str, sources.Source], val_fraction: float | None) -> list[str]:
    """Returns what training will refuse of the splits that `open_splits` returned."""
    train, val = splits.get("train"), splits.get("val")
    if not (isinstance(train, sources.folder.Files) and isinstance(val, sources.folder.Files)) or train.splits:
        return []  # splits that are fixed
    whole = dataclasses.replace(train, paths=train.paths + val.paths, labels=train.labels + val.labels)
    fraction = val_fraction or sources.folder.VAL_FRACTION
    found = (sources.folder.split_mistake(directory, whole, Rule(fraction), split) for split in splits)
    return [mistake for mistake in found if mistake]


def read_all(
    splits: Mapping[str, sources.Source], num_threads: int, advance: Callable[[int], None]
) -> dict[str, list[Checked]]:
    """Reads every image of every split, in order.

    Args:
      splits: by name.
      num_threads: that read at the same time.
      advance: called with the number of images read since the last call.
    """
    images: dict[str, list[Checked]] = {split: [] for split in splits}
    with futures.ThreadPoolExecutor(num_threads) as executor:
        for split, source in splits.items():
            for begin in range(0, len(source), BLOCK):
                block = range(begin, min(begin + BLOCK, len(source)))
                for image in executor.map(lambda i, source=source: read(source, i), block):
                    images[split].append(image)
                    advance(1)
    return images


def read(source: sources.Source, index: int) -> Checked:
    """Reads one example and decodes its image. It raises nothing for a bad image: the result shows what is wrong."""
    try:
        example = source[index]
    except (sources.InputError, OSError):
        return Checked(f"record {index}", (), 0, b"", 0, 0)
    content, name, label = (
        example["image"],
        naming.decoded(str(example.get("name", index))),
        np.asarray(example["label"]),
    )
    classes = np.flatnonzero(label) if label.ndim else label[None]
    try:
        height, width = decoding.decode(content, 3).shape[:2]
        largest = decoding.largest_value(content)
    except decoding.BadImageError:
        height, width, largest = 0, 0, None
    digest = hashlib.sha256(content).digest()
    return Checked(name, tuple(classes.tolist()), len(content), digest, height, width, largest)


def describe(images: Sequence[Checked], class_names: Sequence[str]) -> dict[str, Any]:
    """Returns a description for JSON: images by class, names of undecodable ones, and the spread of bytes and pixels.

    The spread is (least, median, largest).
    """
    labels = np.array([label for image in images for label in image.classes], int)
    counts = np.bincount(labels, minlength=len(class_names))
    largest = [image.largest for image in images if image.largest is not None]
    return {
        "images": len(images),
        "classes": dict(zip(class_names, counts.tolist(), strict=True)),
        "undecodable": [image.name for image in images if not image.height],
        "bytes": _spread(image.num_bytes for image in images if image.num_bytes),
        "pixels": _spread(image.height * image.width for image in images if image.height),
        "sixteen_bits": {"images": len(largest), "dark": sum(map(decoding.is_dark, largest)), "largest": max(largest)}
        if largest
        else None,
    }


def _spread(values: Iterable[int]) -> list[int]:
    """Returns the least, the median and the largest value; zeros without values."""
    values = np.fromiter(values, np.int64)
    return [round(f(values)) for f in (np.min, np.median, np.max)] if len(values) else [0, 0, 0]


def repeated(images: Mapping[str, Sequence[Checked]]) -> list[list[str]]:
    """Returns groups of two or more images with equal bytes, each image as 'SPLIT: NAME'."""
    places = collections.defaultdict(list)
    for split, found in images.items():
        for image in found:
            if image.digest:
                places[image.digest].append(f"{split}: {image.name}")
    return [names for names in places.values() if len(names) > 1]
