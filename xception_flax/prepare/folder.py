"""A folder of images as a TFDS data set: refuses what TFDS cannot read, and lists every image."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import tensorflow_datasets as tfds

from xception_flax.data import sources
from xception_flax.prepare.records import EncodedImage
from xception_flax.text import naming
from xception_flax.text.errors import UserError


def default_name(directory: Path) -> str:
    """Returns the name of a data set made from that of its folder: 'My Photos' -> 'my_photos'."""
    return re.sub(r"\W+", "_", directory.name.lower()).strip("_")


def open_folder(directory: Path, val_fraction: float | None) -> dict[str, sources.folder.Files]:
    """Returns the splits of a folder by name, as training has them.

    Args:
      directory: with CLASS/*.jpg, or with train/CLASS/*.jpg and folders of other splits.
      val_fraction: share of 'val' if splits have no folders; None for the default.

    Raises:
      UserError: the folder is missing, has fewer than two classes, has splits with different classes, or has a name
        in it that TFDS cannot read.
    """
    check_directory(directory)
    there, fraction = splits_there(directory, val_fraction)
    if wrong := [split for split in there if not re.fullmatch(r"[\w-]+", split) or split == "all"]:
        raise UserError(
            f"{directory}: TFDS reads no split {wrong[0]!r}; rename the folder, by letters, digits, _ and -, "
            "and not 'all', which is all of them."
        )
    files = {
        split: sources.folder.folder(split, data_dir=str(directory), val_fraction=fraction)
        for split in there or ("train", "val")
    }
    class_names = common_classes(directory, files)
    if len(class_names) < 2:
        raise UserError(f"{directory} has one class only, {class_names[0]!r}; expected two or more.")
    if wrong := [name for name in class_names if name.splitlines() != [name.strip()]]:
        raise UserError(
            f"{directory}: TFDS reads no class {wrong[0]!r}; rename the folder, without white space around its "
            "name or line breaks."
        )
    for split in files.values():
        for path in split.paths:
            if not naming.is_unicode(naming.decoded(path)):
                raise UserError(f"{naming.shown(path)}: TFDS takes no file name that is not UTF-8; rename it.")
    return files


def list_images(directory: Path, files: Mapping[str, sources.folder.Files]) -> dict[str, list[EncodedImage]]:
    """Returns the images of each split for `records` to write, named by their paths below `directory`."""
    return {
        split: [
            EncodedImage(
                # The name is the same on every system; the path is that of this system.
                naming.canonical(Path(path).relative_to(directory)),
                label,
                path,
                0,
                os.stat(path).st_size,
            )
            for path, label in zip(of_split.paths, of_split.labels, strict=True)
        ]
        for split, of_split in files.items()
    }


def create_info(name: str, class_names: tuple[str, ...], data_dir: Path) -> tfds.core.DatasetInfo:
    """Returns the description of the data set to be written to `data_dir/name/1.0.0`.

    Raises:
      UserError: TFDS does not accept `name`.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"--name must be of small letters, digits and _, and begin with a letter; got {name!r}.")
    return tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(
            name=name, version=tfds.core.Version("1.0.0"), data_dir=str(data_dir), module_name=""
        ),
        description=f"Images of {len(class_names)} classes.",
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(),
                "label": tfds.features.ClassLabel(names=class_names),
                "file_name": tfds.features.Text(),
            }
        ),
        supervised_keys=("image", "label"),
    )


def splits_there(directory: Path, val_fraction: float | None) -> tuple[tuple[str, ...], float]:
    """Returns the splits that have folders, and the share of 'val' if none has.

    Raises:
      UserError: splits have folders, and a share is given too; or 'val' is a folder without images of classes.
    """
    there = sources.folder.folder_splits(str(directory))
    if there and "val" not in there and (directory / "val").is_dir():
        sources.folder.folder("val", data_dir=str(directory))  # says what is wrong there, as training does
    if there and val_fraction is not None:
        raise UserError(f"{directory} has folders of splits ({', '.join(there)}) already; leave out --val-fraction.")
    return there, val_fraction or sources.folder.VAL_FRACTION


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
