"""Reads every image of a data set, and counts what it finds."""

import collections
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from xception_flax.data import decoding, sources
from xception_flax.text import naming
from xception_flax.text.errors import UserError


def _folder_splits(directory: Path, val_fraction: float | None) -> tuple[tuple[str, ...], float]:
    """The splits that have a folder there; and where none has one, the share of 'val'."""
    there = sources.folder.folder_splits(str(directory))
    if there and val_fraction is not None:
        raise UserError(f"{directory} has folders of splits ({', '.join(there)}) already; leave out --val-fraction.")
    return there, val_fraction or sources.folder.VAL_FRACTION


def _check_directory(path: Path) -> None:
    if not path.is_dir():
        raise UserError(f"{path} is no directory; expected the folders CLASS/*.jpg or train/CLASS/*.jpg there.")


def _common_classes(directory: Path, splits: Mapping[str, sources.source.Source]) -> tuple[str, ...]:
    first, class_names = next((split, source.class_names) for split, source in splits.items())
    for split, source in splits.items():
        if source.class_names != class_names:
            raise UserError(
                f"{directory}: {first} and {split} must have the same classes; "
                f"only in one: {', '.join(sorted(set(class_names) ^ set(source.class_names))[:5])}."
            )
    return class_names


class Checked(NamedTuple):
    """What is known of an image after it was read; height and width are 0 where it cannot be decoded.

    Of a record that cannot be read nothing is known: no classes, and no bytes. `largest` is the largest value of an
    image of 16 bits, None of others.
    """

    name: str
    classes: tuple[int, ...]
    num_bytes: int
    digest: bytes
    height: int
    width: int
    largest: int | None = None


def _open(directory: Path, val_fraction: float | None) -> dict[str, sources.source.Source]:
    """The splits of a prepared data set, or of a folder, as training has them; where it is small one may be empty."""
    _check_directory(directory)
    if (directory / "dataset_info.json").exists():
        if val_fraction is not None:
            raise UserError(f"{directory} is a data set, which has its splits; leave out --val-fraction.")
        names = tfds.builder_from_directory(directory).info.splits
        return {split: sources.tfds.tfds(split, data_dir=str(directory)) for split in names}
    for pattern in ("*/dataset_info.json", "*/*/dataset_info.json"):
        if below := next(directory.glob(pattern), None):
            raise UserError(f"{directory} has data sets below it; give one version of one, as {below.parent}.")
    splits, fraction = _folder_splits(directory, val_fraction)
    if splits:
        return {split: sources.folder.folder(split, data_dir=str(directory)) for split in splits}
    return sources.folder.split_by_names(sources.folder.classes_in(directory), fraction)


def _read(source: sources.source.Source, index: int) -> Checked:
    try:
        example = source[index]
    except (sources.source.InputError, OSError):
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


def _describe(images: Sequence[Checked], class_names: Sequence[str]) -> dict[str, Any]:
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
    """Least, median and largest."""
    values = np.fromiter(values, np.int64)
    return [round(f(values)) for f in (np.min, np.median, np.max)] if len(values) else [0, 0, 0]


def _repeated(images: Mapping[str, Sequence[Checked]]) -> list[list[str]]:
    """The images of equal bytes, where there is more than one, each as 'SPLIT: NAME'."""
    places = collections.defaultdict(list)
    for split, found in images.items():
        for image in found:
            if image.digest:
                places[image.digest].append(f"{split}: {image.name}")
    return [names for names in places.values() if len(names) > 1]
