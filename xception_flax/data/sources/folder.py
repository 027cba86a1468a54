"""Images in folders: which files are read, their classes, their splits."""

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xception_flax.data import decoding
from xception_flax.data.sources import splitting
from xception_flax.data.sources.source import Example, existing_directory
from xception_flax.data.sources.splitting import ALL, SPLITS, VAL_FRACTION, Rule
from xception_flax.text import naming
from xception_flax.text.counting import counted
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import lookup, suggest
from xception_flax.text.naming import canonical

# Of the formats that `decoding` reads. An .mpo file is a JPEG followed by more pictures.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".pjpeg", ".pjp", ".mpo", ".png", ".apng", ".webp", ".bmp",
    ".dib", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
HEIF_SUFFIXES = (".heic", ".heics", ".heif", ".heifs", ".hif")
IMAGE_SUFFIXES += (".avif", ".avifs") if "AVIF" in decoding.FORMATS else ()
IMAGE_SUFFIXES += HEIF_SUFFIXES if "HEIF" in decoding.FORMATS else ()

# Files of file managers, which are never reported. Other hidden files are reported only if they are images.
_NOISE = ("thumbs.db", "ehthumbs.db", "desktop.ini")

# Folders of archives, disks and NAS devices, which count as hidden. A NAS keeps a thumbnail of each image in its own.
_SYSTEM_FOLDERS = ("__macosx", "lost+found", "@eadir", "$recycle.bin", "system volume information")

MAX_KINDS = 8  # of files that are not read, in a message


class Unread(NamedTuple):
    """A file that lies in the folder of a data set but is not read.

    Attributes:
      path: of the file.
      why: its suffix in small letters, 'without a suffix', 'hidden', 'no regular file', or 'outside of a class'.
    """

    path: str
    why: str


@dataclasses.dataclass(frozen=True)
class Files:
    """Encoded image files and their labels.

    Attributes:
      paths: of the files.
      labels: the number of the class of each file.
      class_names: by number.
      unread: other files in the folder, without those of file managers.
      split: name of this split, if splits have folders.
      splits: names of all splits that have folders.
    """

    paths: tuple[str, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]
    unread: tuple[Unread, ...] = ()
    split: str = ""
    splits: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def numbered(self) -> splitting.Labels:
        """Returns the classes of the images."""
        return splitting.Labels(np.arange(len(self)), np.array(self.labels, int), self.class_names)

    def __getstate__(self) -> dict[str, Any]:
        """Returns what is sent to each worker process, which does not need the unread files."""
        return self.__dict__ | {"unread": ()}

    def __getitem__(self, index: int) -> Example:
        path = self.paths[index]
        return {"image": content(path), "label": self.labels[index], "name": path}


def content(path: str) -> bytes:
    """Returns the content of a file, in two thirds of the time that `Path.read_bytes` takes."""
    with open(path, "rb", buffering=0) as file:
        return file.read()


def folder(
    split: str,
    /,
    data_dir: str,
    val_fraction: float = VAL_FRACTION,
    group_by: str | None = None,
    stratify: bool = False,
) -> Files:
    """A folder of images, with one folder a class; classes are numbered in the order of their names.

    The layout is `data_dir/split/CLASS/image.jpg` or `data_dir/CLASS/image.jpg`. The second has the splits 'train' and
    'val', and 'all', which is both. A hash of a file's name decides its split, so a file keeps its split when others
    come or go and when it moves to another class. With `group_by` that of a group's name does, and `data_dir` must
    have the second layout, in which a class may then have folders. Names that begin with '.' are left out. Names are
    hashed, sorted and compared in Unicode's composed form, so that copies on other systems are the same data.

    Args:
      split: name of a folder, or 'train', 'val' or 'all'.
      data_dir: the folder of images: CLASS/*.jpg, or SPLIT/CLASS/*.jpg.
      val_fraction: share of 'val', if splits have no folders.
      group_by: what keeps images in one split: 'folder:1' for the folder that they lie in, 'folder:2' for the one
        above it, or a regular expression of their names with one group, as (.*)_frame; None for no groups.
      stratify: whether 'val' has its share of each class, as near as whole groups allow, instead of all images.

    Raises:
      UserError: the folder is missing or has no class, a class has no images, or both layouts are mixed; or a split
        would be without images of a class.
    """
    directory = existing_directory(data_dir, "the folders CLASS/*.jpg or train/CLASS/*.jpg")
    splitting.check_rule(rule := Rule(val_fraction, group_by, stratify))
    places = {canonical(p.name): p for p in _folders(directory)}
    if split == ALL and ALL not in places:
        return _all(directory, places)
    nested = group_by is not None and "train" not in places  # only then has a class folders in it
    splits = () if nested else folder_splits(data_dir, split)
    place = places.get(canonical(split))
    if splits:
        if group_by is not None or stratify:
            key = "stratify" if group_by is None else "group_by"
            raise UserError(f"{directory} has folders of splits ({', '.join(splits)}) already; leave out data.{key}.")
        if place is None:
            raise UserError(f"{directory} has no folder for split {split!r}; {suggest(split, splits)}")
        if canonical(split) not in splits and images_in(place):
            raise UserError(
                f"{place} has images, and no folders that say of which class they are; expected {place}/CLASS/*.jpg."
            )
        files, others = classes_in(place), _beside(directory, [places[name].name for name in splits])
        unread = (*files.unread, *others)
        return dataclasses.replace(files, unread=unread, split=canonical(split), splits=splits)
    if not nested and not any(images_in(p) for p in places.values()):
        if place is not None:
            return classes_in(place)
        there = describe_unread(_beside(directory, ()), 0)
        raise UserError(
            f"{directory} has neither CLASS/*.jpg nor {split}/CLASS/*.jpg in it; images are files that end in "
            f"{', '.join(IMAGE_SUFFIXES)}.{there and f' {there}'}"
        )
    lookup(dict.fromkeys((*SPLITS, ALL)), split, "split of a folder of classes")
    files = classes_in(directory)
    if mistake := split_mistake(directory, files, rule, split):
        raise UserError(mistake)
    return held_out(directory, files, rule)[split]


def split_mistake(directory: Path, files: Files, rule: Rule, split: str) -> str:
    """Returns what is wrong with a split of a folder of classes, and what to do; '' if nothing is."""
    return splitting.mistake(
        _keys(directory, files, rule),
        files.numbered(),
        rule,
        split,
        str(directory),
        lambda name: str(directory / name),
        "make folders train/CLASS and val/CLASS",
    )


def _keys(directory: Path, files: Files, rule: Rule) -> list[str]:
    """Returns what decides the split of each image: `splitting.keys_of` the paths below the folders of classes."""
    begin = len(os.path.join(directory, ""))
    below = (path[begin:].partition(os.sep)[2].replace(os.sep, "/") for path in files.paths)
    return splitting.keys_of(below, rule.group_by)


def _all(directory: Path, places: dict[str, Path]) -> Files:
    """Returns all images in a folder of classes, unless its folders are splits."""
    if "train" in places and _folders(places["train"]):
        splits = ", ".join(folder_splits(str(directory)))
        raise UserError(f"{directory} has folders of splits, {splits}; expected the folders CLASS/*.jpg, or one split.")
    return classes_in(directory)


def held_out(directory: Path, files: Files, rule: Rule) -> dict[str, Files]:
    """Returns images split into 'train' and 'val' by `rule`; either may be empty."""
    is_val = splitting.held_out(_keys(directory, files, rule), files.numbered(), rule)
    return {
        split: dataclasses.replace(
            files,
            paths=tuple(itertools.compress(files.paths, is_val == (split == "val"))),
            labels=tuple(itertools.compress(files.labels, is_val == (split == "val"))),
        )
        for split in SPLITS
    }


def classes_in(directory: Path) -> Files:
    """Returns all images in and below `directory/CLASS`.

    Raises:
      UserError: there is no class, or a class has no images.
    """
    classes = _folders(directory)
    if not classes:
        raise UserError(f"{directory} has no folders of classes in it; expected {directory}/CLASS/*.jpg.")
    paths, labels, unread = [], [], []
    for label, place in enumerate(classes):
        files, others = list_files(place)
        if not files:
            there = describe_unread(others, 0)
            raise UserError(
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
    """Returns the names of the splits that have folders; empty if a hash of the files' names decides.

    A split is a folder with images in folders of classes. If one of the folders is a split called 'train', folders
    beside it without folders of classes are not splits and are not read.

    Args:
      data_dir: the folder.
      split: the name of a split, if none is called 'train'.

    Raises:
      UserError: `data_dir` is missing; its folders have folders, but neither 'train' nor `split` is one of them; or
        both layouts are mixed, so that some images would be left out.
    """
    directory = existing_directory(data_dir, "the folders CLASS/*.jpg or train/CLASS/*.jpg")
    places = {canonical(p.name): p for p in _folders(directory)}
    inner = {name: folders for name, place in places.items() if (folders := _folders(place))}
    known = next((name for name in ("train", canonical(split)) if name in inner), None)
    searched = [name for name in places if known in (None, name)] if inner else []
    if images := [name for name in searched if images_in(places[name])]:
        more = f" and {len(images) - 5:,} more" if len(images) > 5 else ""
        nested = known or next(iter(inner))
        raise UserError(
            f"{directory}: there are images in {', '.join(images[:5])}{more}, and a folder in {nested} "
            f"({inner[nested][0].name}); expected either CLASS/*.jpg or SPLIT/CLASS/*.jpg, and nothing of the other."
        )
    if inner and known is None:
        raise UserError(
            f"{directory}: there are folders in {', '.join(list(inner)[:5])}, none of which is called train; expected "
            "either CLASS/*.jpg or train/CLASS/*.jpg and val/CLASS/*.jpg; if they hold groups of images, such as "
            "videos, set data.group_by=folder:1."
        )
    return tuple(name for name in inner if name == known or any(not why for _, why in _walk(places[name])))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


def _folders(directory: Path) -> list[Path]:
    """Returns the folders in `directory` in the order of their names, without hidden ones.

    Raises:
      UserError: `directory` cannot be read, or two folders have names that look the same.
    """
    try:
        with os.scandir(directory) as entries:
            names = [entry.name for entry in entries if not _is_hidden(entry.name) and entry.is_dir()]
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {error.strerror}.") from None
    names.sort(key=canonical)
    for one, other in itertools.pairwise(names):
        if canonical(one) == canonical(other):
            raise UserError(
                f"{directory} has two folders of the name {canonical(one)}, written {one!a} and {other!a}; "
                "make one of them."
            )
    return [directory / name for name in names]


def list_files(directory: Path, *, below: bool = True) -> tuple[list[Path], list[Unread]]:
    """Returns the image files of `directory` in the order of their names, and the files that are not read.

    Links to folders are followed, but no folder is entered twice.

    Args:
      directory: the folder.
      below: also list the files in the folders below it.

    Raises:
      UserError: an image is a link to nothing, or a folder cannot be read.
    """
    found = list(_walk(directory, below=below))
    images, unread = [], [Unread(path, why) for path, why in found if why]
    for path in (path for path, why in found if not why):
        if os.path.isfile(path):
            images.append(Path(path))
        elif os.path.exists(path):
            unread.append(Unread(path, "no regular file"))
        else:
            raise UserError(f"{path} is a link to {os.readlink(path)}, which is not there; remove or mend it.")
    return sorted(images, key=lambda path: canonical(path).split(os.sep)), unread


def images_in(directory: Path) -> list[Path]:
    """Returns the image files directly in `directory`, as `list_files`."""
    return list_files(directory, below=False)[0]


def _beside(directory: Path, read: Collection[str]) -> list[Unread]:
    """Returns the files of a folder that are not in the folders called `read`."""
    return [Unread(path, why or "outside of a class") for path, why in _walk(directory, left_out=read)]


def _walk(directory: Path, *, below: bool = True, left_out: Collection[str] | None = None) -> Iterator[tuple[str, str]]:
    """Yields (path, why it is not read) of files in `directory`; the reason is '' for images to read.

    Files of file managers are left out, and so are hidden files that are not images. Links to folders are followed
    unless `left_out` is given.

    Args:
      directory: the folder.
      below: also enter the folders below it.
      left_out: names of folders in `directory` not to enter.

    Raises:
      UserError: a folder cannot be read, and `left_out` is not given.
    """

    def is_within_hidden(place: str) -> bool:
        return any(map(_is_hidden, Path(place).relative_to(directory).parts))

    def unreadable(error: OSError) -> None:
        if left_out is None and not is_within_hidden(error.filename):
            raise UserError(f"{error.filename} cannot be read: {error.strerror}.")

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
        # Hidden links are not followed: a folder that they lead to would then count as seen.
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


def describe_unread(unread: Iterable[Unread], num_images: int | None, noun: str = "file") -> str:
    """Returns a sentence with the number of unread files, their kinds and an example of each; '' if there are none.

    Args:
      unread: the files that are not read.
      num_images: number of images that are read; None to leave the total out.
      noun: what they are called.
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
    total = len(places) if num_images is None else len(places) + num_images
    are = "is" if len(places) == 1 else "are"
    of_all = "" if num_images is None else f"{len(places):,} of "
    install = not set(HEIF_SUFFIXES).isdisjoint(firsts) and "HEIF" not in decoding.FORMATS
    hint = f" {decoding.HOW_TO_READ_HEIF.capitalize()}." if install else ""
    return f"{of_all}{counted(total, noun)} {are} not read: {', '.join(parts)}.{hint}"
