"""Reads every image of a data set and describes what it finds."""

import collections
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from xception_flax.data import decoding, sources
from xception_flax.data.sources import splitting
from xception_flax.prepare import similar
from xception_flax.prepare.folder import check_directory, open_split, splits_there
from xception_flax.text import naming
from xception_flax.text.errors import UserError

DECODED = ("max_value", "orientation")  # the keys of a recipe's data that change what an image looks like

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
      look: as of `similar.perceptual_hash`; None if it cannot be decoded too.
    """

    name: str
    classes: tuple[int, ...]
    num_bytes: int
    digest: bytes
    height: int
    width: int
    largest: int | None = None
    look: int | None = None


def open_splits(path: Path, options: Mapping[str, Any]) -> tuple[Mapping[str, sources.Source], list[str]]:
    """Returns the splits of a prepared data set, a folder or a table, as training has them, and what it will refuse.

    Args:
      path: of the folder of a version of a data set, a folder of images or a table.
      options: keywords of the source 'folder' or 'table'.

    Returns:
      The splits by name, of which one may be empty; and the messages of training about them.

    Raises:
      UserError: there is no data set, or more than one; or `options` are given where splits are fixed.
    """
    if path.is_file():
        return _splits_of_table(path, options)
    check_directory(path)
    if (path / "dataset_info.json").exists():
        if options:
            key = "--val-fraction" if "val_fraction" in options else f"data.{next(iter(options))}"
            raise UserError(f"{path} is a data set, which has its splits; leave out {key}.")
        names = tfds.builder_from_directory(path).info.splits
        return {split: sources.tfds.tfds(split, data_dir=str(path)) for split in names}, []
    for pattern in ("*/dataset_info.json", "*/*/dataset_info.json"):
        if below := next(path.glob(pattern), None):
            raise UserError(f"{path} has data sets below it; give one version of one, as {below.parent}.")
    if there := splits_there(path, options):
        return {split: open_split(path, split, options) for split in there}, []
    splitting.check_rule(rule := splitting.Rule(**options))
    files = sources.folder.classes_in(path)
    splits = sources.folder.held_out(path, files, rule)
    mistakes = (sources.folder.split_mistake(path, files, rule, split) for split in splits)
    return splits, [mistake for mistake in mistakes if mistake]


def _splits_of_table(path: Path, options: Mapping[str, Any]) -> tuple[Mapping[str, sources.Source], list[str]]:
    splits, mistakes = {}, []
    for split in splits_there(path, options) or ("train", "val"):
        try:
            splits[split] = open_split(path, split, options)
        except UserError as error:
            mistakes.append(str(error))
    if not splits:
        raise UserError(mistakes[0])
    return splits, mistakes


def read_all(
    splits: Mapping[str, sources.Source],
    num_threads: int,
    advance: Callable[[int], None],
    decoded: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, list[Checked]]:
    """Reads every image of every split, in order.

    Args:
      splits: by name.
      num_threads: that read at the same time.
      advance: called with the number of images read since the last call.
      decoded: see `read`.
    """
    images: dict[str, list[Checked]] = {split: [] for split in splits}
    with futures.ThreadPoolExecutor(num_threads) as executor:
        for split, source in splits.items():
            for begin in range(0, len(source), BLOCK):
                block = range(begin, min(begin + BLOCK, len(source)))
                for image in executor.map(lambda i, source=source: read(source, i, decoded), block):
                    images[split].append(image)
                    advance(1)
    return images


def read(source: sources.Source, index: int, decoded: Mapping[str, Any] = MappingProxyType({})) -> Checked:
    """Reads one example and decodes its image. It raises nothing for a bad image: the result shows what is wrong.

    Args:
      source: of the example.
      index: of it.
      decoded: how its image is, some of `DECODED`, as of `decoding.decode`.
    """
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
        image = decoding.decode(content, 3, **decoded)
        (height, width), largest = image.shape[:2], decoding.largest_value(content)
        look = similar.perceptual_hash(image)
    except decoding.BadImageError:
        height, width, largest, look = 0, 0, None, None
    digest = hashlib.sha256(content).digest()
    return Checked(name, tuple(classes.tolist()), len(content), digest, height, width, largest, look)


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


def alike(images: Mapping[str, Sequence[Checked]]) -> list[dict[str, Any]]:
    """Returns images that look the same as one of another split and have other bytes, the most alike first.

    Returns:
      For JSON: `distance`, the bits of the hashes that differ, and `images`, both as 'SPLIT: NAME'.
    """
    splits_of = collections.defaultdict(set)
    for split, found in images.items():
        for image in found:
            splits_of[image.digest].add(split)
    # What has equal bytes in another split is in `repeated`.
    looks = {
        split: [None if len(splits_of[image.digest]) > 1 else image.look for image in found]
        for split, found in images.items()
    }
    return [
        {"distance": distance, "images": [f"{split}: {images[split][place].name}" for split, place in both]}
        for distance, *both in similar.near(looks)
    ]
