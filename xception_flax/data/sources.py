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
import itertools
import math
import os
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from xception_flax import allocator, naming
from xception_flax.lookup import lookup, suggest, written
from xception_flax.naming import canonical, composed
from xception_flax.ranges import check_range

Example = dict[str, Any]


# Classes without names are called by their numbers, of which one label may claim any. No data set has as many.
MAX_UNNAMED_CLASSES = 2**20

# How small an .npz file may make arrays of gigabytes. Deflate makes zeros 1,030 times smaller, the digits 2.5 times.
MAX_RATIO = 500


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
        with gzip.open(path) if path == zipped else path.open("rb") as file:
            zero, kind, dims = struct.unpack(">HBB", file.read(4))
            shape = struct.unpack(f">{dims}I", file.read(4 * dims))
            expected = math.prod(shape)
            if (zero, kind, dims) == (0, 8, ndim):
                _check_memory(path, expected)
                pixels = np.frombuffer(file.read(expected + 1), np.uint8)
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise ValueError(f"{path}: not a readable IDX file ({error}).") from None
    if (zero, kind, dims) != (0, 8, ndim):
        raise ValueError(f"{path}: expected an IDX file of bytes with {ndim} dimensions, got {shape}.")
    if pixels.size != expected:
        wrong = "more" if pixels.size > expected else f"{pixels.size:,}; it has been cut"
        raise ValueError(f"{path}: expected {expected:,} bytes of {shape}, got {wrong}.")
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
    what = f"TFDS data set {builder.name!r}: feature {label_key!r}"
    if not class_label.num_classes:
        raise ValueError(f"{what} says nothing of its classes; expected their number, or their names.")
    _check_num_classes(class_label.num_classes, len(records), what)
    names = _distinct(class_label.names, f"TFDS data set {builder.name!r}: the names of classes")
    return TfdsSource(records, names, image_key, label_key, multi_label)


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

# Of the formats that `decoding` reads; .mpo is a JPEG with more pictures behind the first.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".pjpeg", ".pjp", ".mpo", ".png", ".apng", ".webp", ".bmp",
    ".dib", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip

# What file managers leave behind, which is not worth a word; so are hidden files, but for images. And the folders
# of systems, which count as hidden: of archives, disks, and a NAS, which has a small copy of each image in its own.
_NOISE = ("thumbs.db", "ehthumbs.db", "desktop.ini")
_SYSTEM_FOLDERS = ("__macosx", "lost+found", "@eadir", "$recycle.bin", "system volume information")

VAL_FRACTION = 0.1

MAX_KINDS = 8  # of files that are not read, in a message


class Unread(NamedTuple):
    """A file in the folder of a data set that is no part of it.

    Attributes:
      path: of the file.
      why: its suffix in small letters, 'without a suffix', 'hidden', 'no regular file', or 'outside of a class'.
    """

    path: str
    why: str


@dataclasses.dataclass(frozen=True)
class Files:
    """Encoded image files and their labels; and what lies beside them and is not read, file managers' own apart.

    Where splits have folders, `split` is the name of this one and `splits` those of all.
    """

    paths: tuple[str, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]
    unread: tuple[Unread, ...] = ()
    split: str = ""
    splits: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def __getstate__(self) -> dict[str, Any]:
        """What goes to each worker process, which has no use for the files that are not read."""
        return self.__dict__ | {"unread": ()}

    def __getitem__(self, index: int) -> Example:
        return {
            "image": Path(self.paths[index]).read_bytes(),
            "label": self.labels[index],
            "name": self.paths[index],
        }


def folder(split: str, *, data_dir: str, val_fraction: float = VAL_FRACTION) -> Files:
    """A folder of images, a folder a class; classes are numbered in the order of their names.

    Either `data_dir/split/CLASS/image.jpg`, or `data_dir/CLASS/image.jpg` alone: that has the splits
    'train' and 'val', which a hash of each file's name decides, so that a file keeps its split when
    others come or go and when it is moved to another class. Names that begin with '.' are left out.
    Names are hashed, sorted and compared in Unicode's composed form: copies on other systems are the same data.

    Args:
      split: name of a folder, or 'train' or 'val'.
      data_dir: the folder.
      val_fraction: share of 'val', where there are no folders of splits.

    Raises:
      ValueError: no such folder, no class in it, a class without images, both layouts at once.
    """
    directory = _directory(data_dir, "the folders CLASS/*.jpg or train/CLASS/*.jpg")
    check_range("data.val_fraction", val_fraction, 0, 1, above=True, below=True)
    splits, places = folder_splits(data_dir, split), {canonical(p.name): p for p in _folders(directory)}
    place = places.get(canonical(split))
    if splits:
        if place is None:
            raise ValueError(f"{directory} has no folder for split {split!r}; {suggest(split, splits)}")
        if canonical(split) not in splits and images_in(place):
            raise ValueError(
                f"{place} has images, and no folders that say of which class they are; expected {place}/CLASS/*.jpg."
            )
        files, others = classes_in(place), _beside(directory, [places[name].name for name in splits])
        unread = (*files.unread, *others)
        return dataclasses.replace(files, unread=unread, split=canonical(split), splits=splits)
    if not any(images_in(p) for p in places.values()):
        if place is not None:
            return classes_in(place)
        there = describe_unread(_beside(directory, ()), 0)
        raise ValueError(
            f"{directory} has neither CLASS/*.jpg nor {split}/CLASS/*.jpg in it; images are files that end in "
            f"{', '.join(IMAGE_SUFFIXES)}.{there and f' {there}'}"
        )
    lookup({"train": 0, "val": 1}, split, "split of a folder of classes")
    files = classes_in(directory)
    chosen = split_by_names(files, val_fraction)[split]
    none = set(files.labels) - set(chosen.labels)
    if split == "train" and none:
        raise ValueError(
            f"{directory / files.class_names[min(none)]}: by their names all {files.labels.count(min(none))} images "
            f"are of split 'val' (data.val_fraction={val_fraction:g}); take a smaller fraction, or add images."
        )
    if not len(chosen):
        raise ValueError(
            f"{directory}: no image is of split 'val' by the hash of its name (data.val_fraction={val_fraction:g}); "
            "take a larger fraction, or make folders train/CLASS and val/CLASS."
        )
    return chosen


def split_by_names(files: Files, val_fraction: float) -> dict[str, Files]:
    """Returns the splits 'train' and 'val' of images, as a hash of each file's name decides; either may be empty."""
    splits = {}
    for split in ("train", "val"):
        chosen = [
            (path, label)
            for path, label in zip(files.paths, files.labels, strict=True)
            if (_hash(os.path.basename(path)) < val_fraction) == (split == "val")
        ]
        paths, labels = zip(*chosen, strict=True) if chosen else ((), ())
        splits[split] = dataclasses.replace(files, paths=paths, labels=labels)
    return splits


def classes_in(directory: Path) -> Files:
    """Returns all images of `directory/CLASS` and below.

    Raises:
      ValueError: no class, or a class without images.
    """
    classes = _folders(directory)
    if not classes:
        raise ValueError(f"{directory} has no folders of classes in it; expected {directory}/CLASS/*.jpg.")
    paths, labels, unread = [], [], []
    for label, place in enumerate(classes):
        files, others = list_files(place)
        if not files:
            there = describe_unread(others, 0)
            raise ValueError(
                f"{place} has no image (of {', '.join(IMAGE_SUFFIXES)}); a class must have some, or its folder must go."
                + (there and f" {there}")
            )
        paths.extend(map(str, files))
        labels.extend([label] * len(files))
        unread.extend(others)
    unread.extend(_beside(directory, [p.name for p in classes]))
    names = tuple(canonical(p.name) for p in classes)
    return Files(tuple(paths), tuple(labels), names, tuple(unread))


def folder_splits(data_dir: str, split: str = "train") -> tuple[str, ...]:
    """Returns the names of the splits that have a folder there; none where a hash of the names decides.

    A split is a folder with images in folders of classes. Where 'train' is one, a folder without classes beside it
    is none, and not read.

    Args:
      data_dir: the folder.
      split: the name of one of them, where none is called 'train'.

    Raises:
      ValueError: no such folder, folders in folders of which none is that split, or both layouts at once: of
        which images would be left out.
    """
    directory = _directory(data_dir, "the folders CLASS/*.jpg or train/CLASS/*.jpg")
    places = {canonical(p.name): p for p in _folders(directory)}
    inner = {name: folders for name, place in places.items() if (folders := _folders(place))}
    known = next((name for name in ("train", canonical(split)) if name in inner), None)
    searched = [name for name in places if known in (None, name)] if inner else []
    if images := [name for name in searched if images_in(places[name])]:
        more = f" and {len(images) - 5:,} more" if len(images) > 5 else ""
        nested = known or next(iter(inner))
        raise ValueError(
            f"{directory}: there are images in {', '.join(images[:5])}{more}, and a folder in {nested} "
            f"({inner[nested][0].name}); expected either CLASS/*.jpg or SPLIT/CLASS/*.jpg, and nothing of the other."
        )
    if inner and known is None:
        raise ValueError(
            f"{directory}: there are folders in {', '.join(list(inner)[:5])}, none of which is called train; expected "
            "either CLASS/*.jpg or train/CLASS/*.jpg and val/CLASS/*.jpg."
        )
    return tuple(name for name in inner if name == known or any(not why for _, why in _walk(places[name])))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


def _folders(directory: Path) -> list[Path]:
    """The folders there in the order of their names, but for hidden ones.

    Raises:
      ValueError: it cannot be read, or two have names that look the same.
    """
    try:
        with os.scandir(directory) as entries:
            names = [entry.name for entry in entries if not _is_hidden(entry.name) and entry.is_dir()]
    except OSError as error:
        raise ValueError(f"{directory} cannot be read: {error.strerror}.") from None
    names.sort(key=canonical)
    for one, other in itertools.pairwise(names):
        if canonical(one) == canonical(other):
            raise ValueError(
                f"{directory} has two folders of the name {canonical(one)}, written {one!a} and {other!a}; "
                "make one of them."
            )
    return [directory / name for name in names]


def list_files(directory: Path, *, below: bool = True) -> tuple[list[Path], list[Unread]]:
    """The image files there, and below, in the order of their names; and all others but for noise.

    Links to folders are followed, but no folder is entered twice.

    Raises:
      ValueError: one is a link to nothing, or a folder cannot be read.
    """
    found = list(_walk(directory, below=below))
    images, unread = [], [Unread(path, why) for path, why in found if why]
    for path in (path for path, why in found if not why):
        if os.path.isfile(path):
            images.append(Path(path))
        elif os.path.exists(path):
            unread.append(Unread(path, "no regular file"))
        else:
            raise ValueError(f"{path} is a link to {os.readlink(path)}, which is not there; remove or mend it.")
    return sorted(images, key=lambda path: canonical(path).split(os.sep)), unread


def images_in(directory: Path) -> list[Path]:
    """The image files right there; as `list_files`."""
    return list_files(directory, below=False)[0]


def _beside(directory: Path, read: Collection[str]) -> list[Unread]:
    """What is in a folder, but not in those folders of it that are read."""
    return [Unread(path, why or "outside of a class") for path, why in _walk(directory, left_out=read)]


def _walk(directory: Path, *, below: bool = True, left_out: Collection[str] | None = None) -> Iterator[tuple[str, str]]:
    """Yields each file there that is worth a word, and why it is none to read: '' for images.

    Of hidden files and folders only images are. Links to folders are followed where all of it is read.

    Args:
      below: enter folders.
      left_out: folders there not to enter.

    Raises:
      ValueError: a folder cannot be read.
    """

    def is_within_hidden(place: str) -> bool:
        return any(map(_is_hidden, Path(place).relative_to(directory).parts))

    def unreadable(error: OSError) -> None:
        if left_out is None and not is_within_hidden(error.filename):
            raise ValueError(f"{error.filename} cannot be read: {error.strerror}.")

    follow, seen = left_out is None, set()
    for place, folders, names in os.walk(directory, onerror=unreadable, followlinks=follow):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        hidden = is_within_hidden(place)
        if not hidden:
            seen.add(real)
        if left_out and place == str(directory):
            folders[:] = [name for name in folders if name not in left_out]
        # Hidden links are not followed: what they lead to might then count as seen.
        folders[:] = sorted(
            name
            for name in folders
            if below and not ((hidden or _is_hidden(name)) and os.path.islink(os.path.join(place, name)))
        )
        for name in sorted(names):
            path, suffix = os.path.join(place, name), os.path.splitext(name)[1].lower()
            if hidden or _is_hidden(name):  # macOS writes a '._' file beside each file on foreign disks
                if suffix in IMAGE_SUFFIXES and not name.startswith("._") and os.path.exists(path):
                    yield path, "hidden"
            elif suffix in IMAGE_SUFFIXES:
                yield path, ""
            elif name.lower() not in _NOISE:
                yield path, suffix or "without a suffix"


def describe_unread(unread: Iterable[Unread], num_images: int | None) -> str:
    """A sentence for people: how many files are not read, of which kinds, and one of each; '' where all are read.

    Args:
      num_images: that are read; None where it is not known.
    """
    places = dict(unread)
    if not places:
        return ""
    kinds = Counter(places.values()).most_common()
    firsts = {why: path for path, why in reversed(places.items())}
    parts = []
    for why, count in kinds[:MAX_KINDS]:
        example = os.path.join(*Path(firsts[why]).parts[-2:])
        parts.append(f"{count:,} {naming.shown(why)} ({naming.shown(example)})")
    if kinds[MAX_KINDS:]:
        parts.append(f"{sum(count for _, count in kinds[MAX_KINDS:]):,} of other kinds")
    are = "are" if len(places) > 1 else "is"
    of_all = "" if num_images is None else f" of {len(places) + num_images:,}"
    files = "file" if num_images is None and len(places) == 1 else "files"
    return f"{len(places):,}{of_all} {files} {are} not read: {', '.join(parts)}."


def unread_of(read: Iterable[Source], *, whole: bool = True) -> str:
    """Says what is not read of the folders that sources are of, as `describe_unread`; of other sources nothing.

    Args:
      read: splits.
      whole: they are all that is used: how many files there are is said, and which splits are not used. Of one split
        neither would be of interest, as what is not read is of the whole folder.
    """
    files = [source for source in read if isinstance(source, Files)]
    unread = [file for source in files for file in source.unread]
    num_images = len({path for source in files for path in source.paths}) if whole else None
    said = [describe_unread(unread, num_images)] if unread else []
    used = {source.split for source in files}
    others = list(dict.fromkeys(name for source in files for name in source.splits if name not in used))
    if whole and others:
        more = f" and {len(others) - MAX_KINDS:,} more" if len(others) > MAX_KINDS else ""
        said.append(
            f"Other splits there, which are not used: {', '.join(map(naming.shown, others[:MAX_KINDS]))}{more}."
        )
    return " ".join(said)


def _hash(name: str) -> float:
    """A number in [0, 1) that looks drawn at random, and is the same for the same name everywhere."""
    return int.from_bytes(hashlib.sha256(canonical(name).encode("utf-8", "surrogateescape")).digest()[:8]) / 2**64


# Arrays --------------------------------------------------------------------------------------------


def arrays(split: str, *, path: str) -> Arrays:
    """Arrays of an .npz file: `{split}_images` uint8, `{split}_labels` integers `[N]` or 0/1 `[N, classes]`.

    Labels may be whole numbers of any type, and `[N, 1]`. `class_names` in the file is optional; without it classes
    are called by their numbers.

    Raises:
      ValueError: no such file or array, or one of another kind, of which the message says what is expected; more
        than there is memory for, by the header, before it is read.
    """
    if not os.path.isfile(path):  # which, unlike Path's, is False where a path is too long to be one
        raise ValueError(f"data.path: {path} is no file; expected an .npz file.")
    needed = (f"{split}_images", f"{split}_labels")
    found = _read_npz(path, needed, ("class_names",))
    images, labels = (found[key] for key in needed)
    wrong = images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape[1:]
    if wrong or images.shape[:1] != labels.shape[:1]:
        raise ValueError(
            f"{path}: {split}_images must be uint8 [N, H, W] or [N, H, W, C], 0 to 255, with a label each, got "
            f"{images.dtype} {images.shape} and labels {labels.shape}."
        )
    if not len(images):
        raise ValueError(f"{path}: {split}_images has no image; it must have some.")
    if images.ndim == 4 and images.shape[-1] not in (1, 3):
        hint = "; their channels come last: np.moveaxis(images, 1, -1)" if images.shape[1] in (1, 3) else ""
        raise ValueError(
            f"{path}: {split}_images [N, H, W, C] must have 1 or 3 channels, got {images.shape[-1]} of "
            f"{images.shape}{hint}."
        )
    labels = _whole_numbers(f"{path}: {split}_labels", labels)
    if labels.ndim == 2 and not np.isin(labels, (0, 1)).all():
        raise ValueError(
            f"{path}: {split}_labels [N, classes] must be 0 or 1, got {labels.min()} to {labels.max()} of shape "
            f"{labels.shape}; where an image has one class they are [N]."
        )
    least, most = int(labels.min()), int(labels.max())
    if least < 0:
        raise ValueError(f"{path}: {split}_labels must be the numbers of classes, from 0 on, got {least}.")
    num_classes = labels.shape[1] if labels.ndim == 2 else most + 1
    names = _stated_names(path, found["class_names"]) if "class_names" in found else None
    if names is None:
        _check_num_classes(num_classes, len(images), f"{path}: {split}_labels")
        names = tuple(map(str, range(num_classes)))
    if labels.ndim == 2 and len(names) != num_classes:
        raise ValueError(
            f"{path}: {split}_labels [N, classes] must have a column for each of the {len(names)} class_names, got "
            f"{num_classes}."
        )
    if labels.ndim == 1 and most >= len(names):
        raise ValueError(
            f"{path}: {split}_labels must be in 0 to {len(names) - 1}, got {least} to {most}; there are {len(names)} "
            "class_names."
        )
    return Arrays(images, labels.astype(np.int32 if labels.ndim == 1 else np.uint8), names)


def _whole_numbers(what: str, labels: np.ndarray) -> np.ndarray:
    """Labels `[N]` or `[N, classes]` as integers; `[N, 1]` becomes `[N]`."""
    if labels.ndim not in (1, 2) or labels.dtype.kind not in "biuf" or not labels.size:
        raise ValueError(f"{what} must be integers, [N] or [N, classes], got {labels.dtype} {labels.shape}.")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype.kind == "f":
        labels = labels.astype(np.float64)  # float16 is compared with no number above its own largest
        if broken := labels[~(np.isfinite(labels) & (labels == np.round(labels)))].tolist()[:1]:
            raise ValueError(f"{what} must be integers, [N] or [N, classes], got {broken[0]}.")
        if np.abs(labels).max(initial=0) >= 2**53:  # of which not each whole number is a float
            raise ValueError(f"{what} must be the numbers of classes, got {np.abs(labels).max():g}.")
        return labels.astype(np.int64)
    return labels.astype(np.uint8) if labels.dtype.kind == "b" else labels


def _stated_names(path: str, names: np.ndarray) -> tuple[str, ...]:
    names = np.atleast_1d(names)
    if names.ndim != 1 or not len(names) or names.dtype.kind not in "USiu":
        raise ValueError(f"{path}: class_names must be a list of names, one a class, got {names.dtype} {names.shape}.")
    if names.dtype.kind == "S":
        names = np.char.decode(names, "utf-8", "replace")
    return _distinct(map(str, names.tolist()), f"{path}: class_names")


def _distinct(names: Iterable[str], what: str) -> tuple[str, ...]:
    """Names of classes in Unicode's composed form.

    Raises:
      ValueError: two are the same: a table, a picture or a JSON would show one of them.
    """
    names = tuple(map(composed, names))
    if len(set(names)) < len(names):
        twice, count = Counter(names).most_common(1)[0]
        raise ValueError(f"{what} must differ, got {written(twice)} {count} times.")
    return names


def _check_num_classes(num_classes: int, num_images: int, what: str) -> None:
    """Raises ValueError where classes that nobody has named are more than images, and than any data set has.

    One wrong label would otherwise take all memory for their names.
    """
    if num_classes > max(num_images, MAX_UNNAMED_CLASSES):
        raise ValueError(
            f"{what}: {num_classes:,} classes, by the largest label or the columns, of {num_images:,} images cannot be "
            "meant; expected the numbers of classes, from 0 on, or their names too."
        )


def _read_npz(path: str, needed: Sequence[str], optional: Sequence[str]) -> dict[str, np.ndarray]:
    """Reads arrays of an .npz file, once their headers are found to be true and to fit into memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            files = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            keys = [key for key in (*needed, *optional) if key in files]
            declared = {key: _declared(archive, files[key]) for key in keys}
    except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a readable .npz file ({error}).") from None
    for key in needed:
        if key not in files:
            raise ValueError(f"{path} has no array {key!r}; {suggest(key, files)}")
    for key, (dtype, shape, num_bytes) in declared.items():
        if dtype.hasobject:
            raise ValueError(
                f"{path}: {key} is an array of Python objects, which is not read: they may be programs; make it one of "
                "numbers, or of names."
            )
        if dtype.itemsize * math.prod(shape) != num_bytes:
            raise ValueError(
                f"{path}: {key} is {dtype} {shape} by its header, {dtype.itemsize * math.prod(shape):,} bytes, and has "
                f"{num_bytes:,}; the file is damaged."
            )
    total, packed = sum(num_bytes for _, _, num_bytes in declared.values()), sum(files[k].compress_size for k in keys)
    if total > 2**30 and total > MAX_RATIO * packed:
        raise ValueError(
            f"{path} holds {total / 2**30:,.1f} GiB by its header, in {packed:,} bytes, as no images do; it is "
            "damaged, or made to fill memory."
        )
    _check_memory(path, total)
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in keys}
    except (OSError, EOFError, RuntimeError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a readable .npz file ({error}).") from None


def _declared(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[np.dtype, tuple[int, ...], int]:
    """Type and shape of an array by its header, and the bytes that follow it by the archive's."""
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{info.filename} is of version {version}, expected 1.0 or 2.0")
        read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[version[0]]
        shape, _, dtype = read_header(file)
        return dtype, shape, info.file_size - file.tell()


def _check_memory(path: str | Path, num_bytes: int) -> None:
    """Raises ValueError where so much does not fit into memory, before it is tried."""
    if num_bytes > (free := allocator.free_memory_bytes()):
        raise ValueError(
            f"{path} holds {num_bytes / 2**30:,.1f} GiB by its header, and of memory {free / 2**30:,.1f} GiB are free; "
            "data sets of that size are read from files: by source 'folder' or 'tfds'."
        )


def _directory(path: str, content: str) -> Path:
    directory = Path(os.path.expanduser(path)).absolute()
    if not os.path.isdir(directory):  # and neither raises, for a user or a path that cannot be
        raise ValueError(f"data.data_dir: {directory} is no directory; expected {content} there.")
    return directory


SOURCES: dict[str, Callable[..., Source]] = {
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "tfds": tfds,
    "folder": folder,
    "arrays": arrays,
}
