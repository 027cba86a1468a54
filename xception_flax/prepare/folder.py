"""A folder or a table of images as a TFDS data set: refuses what TFDS cannot read, and lists every image."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from xception_flax.data import sources
from xception_flax.data.sources.folder import Files
from xception_flax.data.sources.table import Rows
from xception_flax.data.sources.tfds import Reencoding
from xception_flax.prepare import encoding
from xception_flax.prepare.records import EncodedImage
from xception_flax.text import naming
from xception_flax.text.errors import UserError


def default_name(path: Path) -> str:
    """Returns the name of a data set made from that of its folder or table: 'My Photos' -> 'my_photos'."""
    return re.sub(r"\W+", "_", (path.stem if path.is_file() else path.name).lower()).strip("_")


def open_images(path: Path, options: Mapping[str, Any]) -> dict[str, Files | Rows]:
    """Returns the splits of a folder or a table by name, as training has them.

    Args:
      path: of a table, or of a folder with CLASS/*.jpg, or with train/CLASS/*.jpg and folders of other splits.
      options: keywords of the source.

    Raises:
      UserError: there is none, it has fewer than two classes, has splits with different classes, or has a name in it
        that TFDS cannot read.
    """
    is_table = path.is_file()
    there = splits_there(path, options)
    if wrong := [split for split in there if not re.fullmatch(r"[\w-]+", split) or split == "all"]:
        raise UserError(
            f"{path}: TFDS reads no split {wrong[0]!r}; rename {'it' if is_table else 'the folder'}, by letters, "
            "digits, _ and -, and not 'all', which is all of them."
        )
    images = {split: open_split(path, split, options) for split in there or ("train", "val")}
    class_names = common_classes(path, images)
    if len(class_names) < 2:
        raise UserError(f"{path} has one class only, {class_names[0]!r}; expected two or more.")
    if wrong := [name for name in class_names if name.splitlines() != [name.strip()]]:
        raise UserError(
            f"{path}: TFDS reads no class {wrong[0]!r}; rename {'it' if is_table else 'the folder'}, without white "
            "space around its name or line breaks."
        )
    for of_split in images.values():
        for file in of_split.paths if isinstance(of_split, Files) else ():
            if not naming.is_unicode(naming.decoded(file)):
                raise UserError(f"{naming.shown(file)}: TFDS takes no file name that is not UTF-8; rename it.")
    return images


def open_split(path: Path, split: str, options: Mapping[str, Any]) -> Files | Rows:
    """Returns a split of a folder or a table, as training has it."""
    if path.is_file():
        return sources.table.table(split, path=str(path), **options)
    return sources.folder.folder(split, data_dir=str(path), **options)


def list_images(path: Path, images: Mapping[str, Files | Rows], data_dir: str | None) -> dict[str, list[EncodedImage]]:
    """Returns the images of each split for `records` to write, named by their paths below the folder of the images.

    Args:
      path: of the folder or the table.
      images: of each split, from `open_images`.
      data_dir: the folder of a table's images; None for its own, or for a folder.
    """
    place = path if path.is_dir() else path.parent if data_dir is None else Path(os.path.abspath(data_dir))
    return {
        split: [_encoded(path, place, of_split, index) for index in range(len(of_split))]
        for split, of_split in images.items()
    }


def _encoded(path: Path, place: Path, images: Files | Rows, index: int) -> EncodedImage:
    if isinstance(images, Files):
        file, label = images.paths[index], images.labels[index]
    else:
        label = images.labels[index].as_py()
        label = tuple(label) if images.several else label
        if images.names is not None:
            content = images.images[index].as_py()
            return EncodedImage(images.names[index].as_py(), label, str(path), 0, len(content), content)
        file = images.path(index)
    # The name is the same on every system; the path is that of this system.
    name = naming.canonical(os.path.relpath(file, place) if Path(file).is_relative_to(place) else file)
    return EncodedImage(name, label, file, 0, os.stat(file).st_size)


def create_info(
    name: str,
    class_names: tuple[str, ...],
    data_dir: Path,
    *,
    several: bool = False,
    reencoding: Reencoding | None = None,
) -> tfds.core.DatasetInfo:
    """Returns the description of the data set to be written to `data_dir/name/1.0.0`.

    Args:
      name: of the data set.
      class_names: by number.
      data_dir: the folder of data sets.
      several: whether an image may have several labels.
      reencoding: what is done to the images; None for originals.

    Raises:
      UserError: TFDS does not accept `name`.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"--name must be of small letters, digits and _, and begin with a letter; got {name!r}.")
    label = tfds.features.ClassLabel(names=class_names)
    return tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(
            name=name, version=tfds.core.Version("1.0.0"), data_dir=str(data_dir), module_name=""
        ),
        description=f"Images of {len(class_names)} classes{'' if reencoding is None else f', {reencoding}'}.",
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(),
                "label": tfds.features.Sequence(label) if several else label,
                "file_name": tfds.features.Text(),
            }
        ),
        supervised_keys=("image", "label"),
        metadata=encoding.metadata(reencoding),
    )


def splits_there(path: Path, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names of the splits that have folders, or are in a column of a table; empty if there are none.

    Args:
      path: of a folder of classes or splits, or of a table.
      options: keywords of the source.

    Raises:
      UserError: there is no such folder; there are splits, and a share is given too; or 'val' is a folder without
        images of classes.
    """
    if path.is_file():
        if (there := sources.table.table_splits(str(path), **options)) and "val_fraction" in options:
            raise UserError(f"{path} has a column of splits ({', '.join(there)}) already; leave out --val-fraction.")
        return there
    check_directory(path)
    if options.get("group_by") is not None and not (path / "train").is_dir():
        return ()  # a class may have folders in it
    there = sources.folder.folder_splits(str(path))
    if there and "val" not in there and (path / "val").is_dir():
        sources.folder.folder("val", data_dir=str(path))  # says what is wrong there, as training does
    if there and "val_fraction" in options:
        raise UserError(f"{path} has folders of splits ({', '.join(there)}) already; leave out --val-fraction.")
    return there


def check_directory(path: Path) -> None:
    """Raises UserError if the folder does not exist."""
    if not path.is_dir():
        raise UserError(f"{path} is no directory; expected the folders CLASS/*.jpg or train/CLASS/*.jpg there.")


def common_classes(directory: Path, splits: Mapping[str, sources.Source]) -> tuple[str, ...]:
    """Returns the classes of the splits.

    Raises:
      UserError: the splits have different classes.
    """
    first, class_names = next((split, source.class_names) for split, source in splits.items())
    for split, source in splits.items():
        if source.class_names != class_names:
            raise UserError(
                f"{directory}: {first} and {split} must have the same classes; "
                f"only in one: {', '.join(sorted(set(class_names) ^ set(source.class_names))[:5])}."
            )
    return class_names
