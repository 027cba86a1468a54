"""Where examples come from: random access, no order, no randomness, nothing decoded.

A source has a length, `num_classes`, `class_names`, and `source[i]` is a dict of `image` (the
bytes of a file, or uint8 `[H, W]` / `[H, W, C]`) and `label` (an integer, or `[num_classes]` of 0
and 1 where images have several labels); where it has a `name`, errors call it by that. Sources are
sent to worker processes: they must pickle.
"""

import dataclasses
import gzip
import hashlib
import importlib.util
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from xception_flax import naming
from xception_flax.lookup import lookup, suggest

Example = dict[str, Any]


class InputError(ValueError):
    """The examples have come to an end that is none: an image, a file or a worker process is at fault."""


@runtime_checkable
class Source(Protocol):
    """What every source function returns."""

    @property
    def class_names(self) -> tuple[str, ...]: ...

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


# Digits --------------------------------------------------------------------------------------------


def digits(split: str) -> Arrays:
    """1,797 handwritten digits, 8 x 8 pixels, inside this package; splits 'train', 'validation', 'test'.

    The test part of UCI's "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak 1998, CC
    BY 4.0), as scikit-learn has it too. A fixed permutation of them: 360 'test' (held out: no
    choice of a recipe is tuned on it), 180 'validation', 1,257 'train'. The splits share writers.
    """
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        images, labels = file["images"], file["labels"]
    order = np.random.RandomState(0).permutation(len(images))  # NumPy has frozen this generator for good
    parts = {"test": order[:360], "validation": order[360:540], "train": order[540:]}
    index = np.concatenate([lookup(parts, part, "split of digits") for part in split.split("+")])
    pixels = (images[index].astype(np.float32) * (255 / 16)).round().astype(np.uint8)  # stored as 0 to 16
    return Arrays(pixels, labels[index].astype(np.int32), tuple("0123456789"))


# Fashion-MNIST -------------------------------------------------------------------------------------

FASHION_CLASSES = (
    "t-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


def fashion_mnist(split: str, *, data_dir: str = "/usr/share/datasets/fashion-mnist") -> Arrays:
    """Fashion-MNIST (Xiao et al. 2017) from its four IDX files; splits 'train', 'validation', 'test'.

    'validation' is the last twelfth of the published training set (5,000 of 60,000 images),
    'train' the rest. Debian's package dataset-fashion-mnist puts the files into the default
    `data_dir`.
    """
    directory = _directory(data_dir, "the four IDX files of Fashion-MNIST")
    images, labels = [], []
    for part in split.split("+"):
        prefix = lookup({"train": "train", "validation": "train", "test": "t10k"}, part, "split of fashion_mnist")
        x = _read_idx(directory / f"{prefix}-images-idx3-ubyte", ndim=3)
        y = _read_idx(directory / f"{prefix}-labels-idx1-ubyte", ndim=1)
        if len(x) != len(y):
            raise ValueError(f"{directory}: {len(x)} {prefix} images, but {len(y)} labels.")
        if y.max(initial=0) >= len(FASHION_CLASSES):
            raise ValueError(
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
        raise ValueError(
            f"{path} is missing, plain or as .gz; put the four IDX files of Fashion-MNIST there "
            "(Debian: apt install dataset-fashion-mnist) or say where they are by --config.data.data_dir=DATA."
        )
    path = path if path.exists() else zipped
    try:
        content = path.read_bytes() if path != zipped else gzip.decompress(path.read_bytes())
        zero, kind, dims = struct.unpack(">HBB", content[:4])
        shape = struct.unpack(f">{dims}I", content[4 : 4 + 4 * dims])
        pixels = np.frombuffer(content, np.uint8, offset=4 + 4 * dims)
    except (OSError, EOFError, struct.error, ValueError, zlib.error) as error:
        raise ValueError(f"{path}: not a readable IDX file ({error}).") from None
    if (zero, kind, dims) != (0, 8, ndim):
        raise ValueError(f"{path}: expected an IDX file of bytes with {ndim} dimensions, got {shape}.")
    if pixels.size != math.prod(shape):
        raise ValueError(
            f"{path}: expected {math.prod(shape):,} bytes of {shape}, got {pixels.size:,}; it has been cut."
        )
    return pixels.reshape(shape)


# TensorFlow Datasets -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """A TFDS random-access source; images stay encoded, labels become integers or multi-hot rows.

    An example raises InputError where its record is damaged or not there, or has no class for a label.
    """

    records: Sequence[Example]
    class_names: tuple[str, ...]
    image_key: str
    label_key: str
    multi_label: bool

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        try:
            record = self.records[index]
        except (RuntimeError, OSError) as error:
            raise InputError(f"record {index} cannot be read: {str(error).splitlines()[0]}") from None
        if record.get(self.image_key) is None:
            raise InputError(f"record {index} cannot be read: it is not there.")
        label, num_classes = record[self.label_key], len(self.class_names)
        for number in np.atleast_1d(label).tolist():
            if not 0 <= number < num_classes:
                raise InputError(f"record {index} has the label {number}, which is none of {num_classes} classes.")
        if self.multi_label:
            row = np.zeros(num_classes, np.uint8)
            row[np.asarray(label, np.int64)] = 1
            label = row
        file_name = record.get("file_name", b"")
        file_name = file_name.decode(errors="replace") if isinstance(file_name, bytes) else file_name
        return {"image": record[self.image_key], "label": label, "name": f"record {index} {file_name}".rstrip()}


def tfds(
    split: str,
    *,
    name: str | None = None,
    data_dir: str | None = None,
    image_key: str = "image",
    label_key: str = "label",
) -> TfdsSource:
    """Any TFDS image classification set that was prepared with `file_format='array_record'`.

    Needs no TensorFlow. Splits are TFDS' own: 'train', 'validation', 'train[:10%]', ... Labels are
    a `ClassLabel`, or a sequence of them where images have several.

    Args:
      split: TFDS split.
      name: of the data set, 'imagenet2012' or 'cifar10:3.0.2'; None: `data_dir` is the directory of
        one version of one data set, the one with dataset_info.json in it.
      data_dir: where data sets are (with a name; None: TFDS' default), or the directory of this one.
      image_key: feature with the image.
      label_key: feature with the label or labels.

    Raises:
      ValueError: unknown, not prepared, prepared in a format without random access, or features
        that are not there.
    """
    import tensorflow_datasets as library  # here: half a second that other sources need not pay

    builder = _tfds_builder(library, name, data_dir)
    where, features, file_format = builder.data_dir, builder.info.features, builder.info.file_format
    if not builder.info.splits:
        raise ValueError(
            f"TFDS data set {builder.name!r} is not prepared in {where}; say where it is by "
            "--config.data.data_dir=DATA, or prepare it: imagenet2012 by `python -m xception_flax.prepare`, "
            "others by TFDS with file_format='array_record' (see the README)."
        )
    if file_format is None or file_format.value != "array_record":
        found = None if file_format is None else file_format.value
        raise ValueError(
            f"{where} holds file format {found!r}, which has no random access; prepare the data set again "
            "with file_format='array_record'."
        )
    for key in (image_key, label_key):
        if key not in features:
            raise ValueError(f"TFDS data set {builder.name!r} has no feature {key!r}; {suggest(key, features)}")
    label = features[label_key]
    multi_label = not isinstance(label, library.features.ClassLabel)
    class_label = getattr(label, "feature", None) if multi_label else label
    if not isinstance(class_label, library.features.ClassLabel):
        raise ValueError(
            f"TFDS data set {builder.name!r}: feature {label_key!r} must be a ClassLabel or a sequence of "
            f"them, got {type(label).__name__}."
        )
    try:
        records = builder.as_data_source(split, decoders={image_key: library.decode.SkipDecoding()})
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"TFDS data set {builder.name!r} has no split {split!r} ({error}); "
            f"there are: {', '.join(sorted(builder.info.splits))}."
        ) from None
    return TfdsSource(records, tuple(class_label.names), image_key, label_key, multi_label)


def _tfds_builder(library: Any, name: str | None, data_dir: str | None) -> Any:
    if data_dir is not None and not naming.is_unicode(data_dir):
        raise ValueError(
            f"data.data_dir: {naming.shown(data_dir)}: TFDS takes no name of a folder that is not UTF-8; rename it, or "
            "make a link to it."
        )
    if name is None:
        if data_dir is None:
            raise ValueError(
                "source 'tfds' needs data.name, data.data_dir or both: "
                "--config.data.name=imagenet2012 --config.data.data_dir=DATA, say."
            )
        directory = _bucket(library, data_dir) if "://" in data_dir else _directory(data_dir, "a TFDS data set")
        if not (directory / "dataset_info.json").exists():
            raise ValueError(
                f"{directory} has no dataset_info.json; point data.data_dir at NAME/VERSION of a prepared "
                "data set, or give data.name too."
            )
        return library.builder_from_directory(directory)
    if data_dir is not None:
        data_dir = str(_bucket(library, data_dir) if "://" in data_dir else _directory(data_dir, "TFDS data sets"))
    try:
        return library.builder(name, data_dir=data_dir)
    except library.core.DatasetNotFoundError:
        known = library.list_builders(with_community_datasets=False)
        raise ValueError(
            f"no TFDS data set {name!r}, neither TFDS' own nor prepared in data.data_dir={data_dir}; "
            f"{suggest(name, known)}"
        ) from None
    except (ValueError, AssertionError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"TFDS data set {name!r}: {first}") from None


def _bucket(library: Any, url: str) -> Any:
    """A directory in a bucket, which TFDS reads by fsspec, and array_record by itself."""
    scheme = url.partition("://")[0]
    if scheme != "gs":
        raise ValueError(f"data.data_dir: {url}: of buckets only gs:// is read; mount others, and give the path.")
    if importlib.util.find_spec("gcsfs") is None:
        raise ValueError(f"data.data_dir: to read {url}, pip install gcsfs; or mount the bucket and give the path.")
    return library.core.Path(url)


# Image folder --------------------------------------------------------------------------------------

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclasses.dataclass(frozen=True)
class Files:
    """Encoded image files and their labels."""

    paths: tuple[str, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        return {
            "image": Path(self.paths[index]).read_bytes(),
            "label": self.labels[index],
            "name": self.paths[index],
        }


def folder(split: str, *, data_dir: str, val_fraction: float = 0.1) -> Files:
    """A folder of images, a folder a class; classes are numbered in the order of their names.

    Either `data_dir/split/CLASS/image.jpg`, or `data_dir/CLASS/image.jpg` alone: that has the splits
    'train' and 'val', which a hash of each file's name decides, so that a file keeps its split when
    others come or go and when it is moved to another class. Names that begin with '.' are left out.

    Args:
      split: name of a folder, or 'train' or 'val'.
      data_dir: the folder.
      val_fraction: share of 'val', where there are no folders of splits.

    Raises:
      ValueError: no such folder, no class in it, a class without images, both layouts at once.
    """
    directory = _directory(data_dir, "the folders CLASS/*.jpg or train/CLASS/*.jpg")
    if not 0 < val_fraction < 1:
        raise ValueError(f"data.val_fraction must be between 0 and 1, got {val_fraction}.")
    top = _folders(directory)
    by_name = not any(_folders(p) for p in top) and any(images_in(p) for p in top)
    if not by_name:
        if split not in (p.name for p in top) or images_in(directory / split):
            folder_splits(data_dir)  # of both layouts at once it says so
            if not any(images_in(p, below=True) for p in top):
                raise ValueError(
                    f"{directory} has neither CLASS/*.jpg nor {split}/CLASS/*.jpg in it; images are files that end in "
                    f"{', '.join(IMAGE_SUFFIXES)}."
                )
            raise ValueError(f"{directory} has no folder for split {split!r}; {suggest(split, (p.name for p in top))}")
        return classes_in(directory / split)
    lookup({"train": 0, "val": 1}, split, "split of a folder of classes")
    files = classes_in(directory)
    chosen = [
        (path, label)
        for path, label in zip(files.paths, files.labels, strict=True)
        if (_hash(os.path.basename(path)) < val_fraction) == (split == "val")
    ]
    none = set(files.labels) - {label for _, label in chosen}
    if split == "train" and none:
        raise ValueError(
            f"{directory / files.class_names[min(none)]}: by their names all {files.labels.count(min(none))} images "
            f"are of split 'val' (data.val_fraction={val_fraction:g}); take a smaller fraction, or add images."
        )
    if not chosen:
        raise ValueError(
            f"{directory}: no image is of split 'val' by the hash of its name (data.val_fraction={val_fraction:g}); "
            "take a larger fraction, or make folders train/CLASS and val/CLASS."
        )
    paths, labels = zip(*chosen, strict=True)
    return Files(paths, labels, files.class_names)


def classes_in(directory: Path) -> Files:
    """Returns all images of `directory/CLASS` and below.

    Raises:
      ValueError: no class, or a class without images.
    """
    classes = _folders(directory)
    if not classes:
        raise ValueError(f"{directory} has no folders of classes in it; expected {directory}/CLASS/*.jpg.")
    paths, labels = [], []
    for label, place in enumerate(classes):
        files = images_in(place, below=True)
        if not files:
            raise ValueError(
                f"{place} has no image (of {', '.join(IMAGE_SUFFIXES)}); a class must have some, or its folder must go."
            )
        paths.extend(map(str, files))
        labels.extend([label] * len(files))
    return Files(tuple(paths), tuple(labels), tuple(naming.decoded(p.name) for p in classes))


def folder_splits(data_dir: str) -> tuple[str, ...]:
    """Returns the names of the splits that have a folder there; none where a hash of the names decides.

    Raises:
      ValueError: no such folder, folders in folders of which none is 'train', or both layouts at once: of
        which images would be left out.
    """
    directory = _directory(data_dir, "the folders CLASS/*.jpg or train/CLASS/*.jpg")
    top = _folders(directory)
    inner = [place for p in top for place in _folders(p)[:1]]
    images = [p.name for p in top if inner and images_in(p)]
    if images:
        more = f" and {len(images) - 5:,} more" if len(images) > 5 else ""
        raise ValueError(
            f"{directory}: there are images in {', '.join(images[:5])}{more}, and a folder in {inner[0].parent.name} "
            f"({inner[0].name}); expected either CLASS/*.jpg or SPLIT/CLASS/*.jpg, and nothing of the other."
        )
    splits = tuple(place.parent.name for place in inner)
    if splits and "train" not in splits:
        raise ValueError(
            f"{directory}: there are folders in {', '.join(splits[:5])}, none of which is called train; expected "
            "either CLASS/*.jpg or train/CLASS/*.jpg and val/CLASS/*.jpg."
        )
    return splits


def _folders(directory: Path) -> list[Path]:
    return sorted(p for p in directory.iterdir() if p.is_dir() and not p.name.startswith("."))


def images_in(directory: Path, *, below: bool = False) -> list[Path]:
    """The image files there, or there and below, in order; names that begin with '.' are left out.

    Links to folders are followed, but no folder is entered twice.

    Raises:
      ValueError: one is a link to nothing, or a folder cannot be read.
    """

    def unreadable(error: OSError) -> None:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}.")

    found, seen = [], set()
    for place, folders, names in os.walk(directory, onerror=unreadable, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if below and not name.startswith("."))
        found += [Path(place, name) for name in names if not name.startswith(".")]
    found = [p for p in found if p.suffix.lower() in IMAGE_SUFFIXES]
    files = [p for p in found if p.is_file()]
    broken = [p for p in found if p.is_symlink() and not p.exists()] if len(files) < len(found) else []
    if broken:
        raise ValueError(f"{broken[0]} is a link to {os.readlink(broken[0])}, which is not there; remove or mend it.")
    return sorted(files)


def _hash(name: str) -> float:
    """A number in [0, 1) that looks drawn at random, and is the same for the same name everywhere."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8]) / 2**64


# Arrays --------------------------------------------------------------------------------------------


def arrays(split: str, *, path: str) -> Arrays:
    """Arrays of an .npz file: `{split}_images` uint8, `{split}_labels` integers `[N]` or 0/1 `[N, classes]`.

    `class_names` in the file is optional; without it classes are called by their numbers.
    """
    if not Path(path).is_file():
        raise ValueError(f"data.path: {path} is no file; expected an .npz file.")
    keys = (f"{split}_images", f"{split}_labels")
    try:
        with np.load(path, allow_pickle=False) as file:
            there = tuple(file)
            found = {key: file[key] for key in (*keys, "class_names") if key in there}
    except (OSError, EOFError, RuntimeError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a readable .npz file ({error}).") from None
    for key in keys:
        if key not in found:
            raise ValueError(f"{path} has no array {key!r}; {suggest(key, there)}")
    images, labels = (found[key] for key in keys)
    names = tuple(map(str, np.atleast_1d(found["class_names"]))) if "class_names" in found else None
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[:1] != labels.shape[:1]:
        raise ValueError(
            f"{path}: {split}_images must be uint8 [N, H, W] or [N, H, W, C] with a label each, got "
            f"{images.dtype} {images.shape} and labels {labels.shape}."
        )
    if labels.ndim not in (1, 2) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{path}: {split}_labels must be integers, [N] or [N, classes], got {labels.dtype} {labels.shape}."
        )
    if not len(images):
        raise ValueError(f"{path}: {split}_images has no image; it must have some.")
    if labels.ndim == 2 and not np.isin(labels, (0, 1)).all():
        raise ValueError(f"{path}: {split}_labels [N, classes] must be 0 or 1, got {labels.min()} to {labels.max()}.")
    num_classes = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
    names = names or tuple(map(str, range(num_classes)))
    if labels.ndim == 2 and len(names) != num_classes:
        raise ValueError(
            f"{path}: {split}_labels [N, classes] must have a column for each of the {len(names)} class_names, got "
            f"{num_classes}."
        )
    if labels.ndim == 1 and (labels.min() < 0 or labels.max() >= len(names)):
        raise ValueError(
            f"{path}: {split}_labels must be in 0 to {len(names) - 1}, got {labels.min()} to {labels.max()}."
        )
    return Arrays(images, labels.astype(np.int32 if labels.ndim == 1 else np.uint8), names)


def _directory(path: str, content: str) -> Path:
    directory = Path(path).expanduser().absolute()
    if not directory.is_dir():
        raise ValueError(f"data.data_dir: {directory} is no directory; expected {content} there.")
    return directory


SOURCES: dict[str, Callable[..., Source]] = {
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "tfds": tfds,
    "folder": folder,
    "arrays": arrays,
}
