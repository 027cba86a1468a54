"""Images and labels in a table: a row an image. Its order of rows is the order of the data."""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from xception_flax.data.sources import splitting
from xception_flax.data.sources.columns import TableFile, open_table
from xception_flax.data.sources.folder import IMAGE_SUFFIXES, Unread, content, list_files
from xception_flax.data.sources.source import Example, check_memory, distinct, existing_directory
from xception_flax.data.sources.splitting import ALL, SPLITS, VAL_FRACTION, Labels, Rule
from xception_flax.text import naming
from xception_flax.text.counting import counted
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import cut, lookup, suggest, written
from xception_flax.text.naming import canonical, composed
from xception_flax.text.values import MAX_TEXT

if TYPE_CHECKING:
    import pyarrow as pa

# Names of columns, in small letters and without other signs than letters and digits.
IMAGE_NAMES = (
    "image", "img", "path", "file", "id", "filename", "filepath", "imagefile", "imageid", "imagename", "imagepath",
    "imgid", "imgname", "imgpath",
)  # fmt: skip
LABEL_NAMES = ("label", "labels", "class", "classes", "classname", "category", "categories", "target", "tags")
SPLIT_NAMES = ("split", "subset")

ONES, ZEROS = ("1", "1.0", "true", "True"), ("0", "0.0", "false", "False")


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a table. Arrays of Arrow take half of the memory of Python's objects, and go to workers as they are.

    Attributes:
      images: `[N]` of bytes: paths of files, or the content of files.
      labels: `[N]` of class numbers, or of lists of them if an image may have several.
      class_names: by number, of the whole table.
      names: `[N]` of images that are `content`, for messages; None for paths.
      unread: rows that are left out.
      split_name: what the split is called.
      split: the same if the table has a column of splits, else ''.
      splits: all splits in that column.
    """

    images: "pa.Array"
    labels: "pa.Array"
    class_names: tuple[str, ...]
    names: "pa.Array | None" = None
    unread: tuple[Unread, ...] = ()
    split_name: str = ""
    split: str = ""
    splits: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def __getstate__(self) -> dict[str, Any]:
        """Returns what is sent to each worker process, which does not need the rows that are left out."""
        return self.__dict__ | {"unread": ()}

    @property
    def several(self) -> bool:
        """Whether an image may have several labels."""
        return self.labels.type.num_fields > 0

    def __getitem__(self, index: int) -> Example:
        label = self.labels[index].as_py()
        if self.several:
            row = np.zeros(len(self.class_names), np.uint8)
            row[label] = 1
            label = row
        if self.names is not None:
            return {"image": self.images[index].as_py(), "label": label, "name": self.names[index].as_py()}
        path = self.path(index)
        return {"image": content(path), "label": label, "name": path}

    def path(self, index: int) -> str:
        """Returns the path of an image's file."""
        return os.fsdecode(self.images[index].as_py())

    def take(self, rows: np.ndarray, **changes: Any) -> "Rows":
        """Returns some of the rows, `[K]` of their numbers from 0."""
        import pyarrow as pa

        parts = {
            name: None if (array := getattr(self, name)) is None else array.take(pa.array(rows))
            for name in ("images", "labels", "names")
        }
        return dataclasses.replace(self, **parts, **changes)

    def numbered(self) -> Labels:
        """Returns the classes of the images."""
        import pyarrow.compute as pc

        if not self.several:
            return Labels(np.arange(len(self)), self.labels.to_numpy(), self.class_names)
        owners, numbers = pc.list_parent_indices(self.labels), pc.list_flatten(self.labels)
        return Labels(owners.to_numpy(), numbers.to_numpy(), self.class_names)


def table(
    split: str,
    /,
    path: str,
    data_dir: str | None = None,
    image_column: str | None = None,
    label_column: str | Sequence[str] | None = None,
    label_separator: str | None = None,
    split_column: str | None = None,
    val_fraction: float = VAL_FRACTION,
    group_by: str | None = None,
    stratify: bool = False,
) -> Rows:
    """A table with a row for each image: CSV, TSV, Parquet or JSON lines.

    A column has the paths of the images, or in Parquet the images themselves; another has their labels. Paths are below
    `data_dir`, which is the folder of the table if it is not given, or absolute. A name without a suffix, or without
    the folders that it lies in, stands for the one image of that name below `data_dir`. Classes are numbered in the
    order of their names, as in a folder, or as a Parquet file of Hugging Face's `datasets` says. Without a column of
    splits the hash of a file's name decides, as in a folder of classes; of images in the table that have no name, the
    hash of their content does.

    Args:
      split: a value in the column of splits; without one 'train', 'val' or 'all'.
      path: of the table, which ends in .csv, .tsv, .txt, .parquet, .pq, .jsonl, .ndjson or .json.
      data_dir: the folder that paths in the table begin in; None for the table's own.
      image_column: of paths or images; None for the one called image, path, file, file_name, image_id, id or the like.
      label_column: of labels, or a list of columns of 0 and 1, which are classes; None for the one called label, class,
        category, target or the like, or else for all other columns, if they are of 0 and 1.
      label_separator: what divides the labels in a cell, if images may have several; an empty cell then has none.
      split_column: of the names of splits; None for the one called split or subset if there is one, '' for none.
      val_fraction: share of 'val', if there is no column of splits.
      group_by: what keeps images in one split: a column, as of patients, or as in a folder 'folder:1' for the folder
        that they lie in or a regular expression of their names with one group; None for no groups.
      stratify: whether 'val' has its share of each class, as near as whole groups allow, instead of all images.

    Raises:
      UserError: the table cannot be read, a column is missing or could be either of two, a row has no image or no
        label, rows contradict each other, or a split would be without images of a class.
    """
    splitting.check_rule(rule := Rule(val_fraction, group_by, stratify))
    file = open_table(path)
    directory = existing_directory(os.path.dirname(file.path) if data_dir is None else data_dir, "images")
    columns = _Columns.of(file, image_column, label_column, split_column, group_by)
    _check_options(file, columns, rule, label_separator)
    read = file.read(columns.as_text)
    whole, below = _whole(file, directory, columns, read, label_separator)
    told = {name: _cells(file, name, read[name]).to_pylist() for name in (columns.split, columns.group) if name}
    kept = _not_repeated(file, whole, told.get(columns.split))
    repeated = np.setdiff1d(np.arange(len(whole)), kept)
    unread = [Unread(f"row {row + file.first_row}", "there before") for row in repeated.tolist()]
    if columns.split:
        mine, splits = _by_column(file, columns.split, told[columns.split], split)
    else:
        keys = told[columns.group] if columns.group else splitting.keys_of(below, group_by)
        mine, splits = _by_rule(file, [keys[row] for row in kept], whole.take(kept), rule, split), ()
        mine = kept[mine]
    rows = np.intersect1d(kept, mine)
    found = whole.take(
        rows, unread=tuple(unread), split_name=split, split=canonical(split) if splits else "", splits=splits
    )
    none = np.setdiff1d(whole.numbered().classes, found.numbered().classes)
    if split == "train" and len(none):
        raise UserError(
            f"{file.path}: class {written(whole.class_names[none[0]])} has no row of split 'train'; each class needs "
            "some there."
        )
    return found if columns.content is None else dataclasses.replace(found, images=_contents(file, columns, rows))


def table_splits(
    path: str,
    image_column: str | None = None,
    label_column: str | Sequence[str] | None = None,
    split_column: str | None = None,
    group_by: str | None = None,
    **others: Any,
) -> tuple[str, ...]:
    """Returns the names of the splits in the column of splits, in their order; empty if there is no such column.

    Args:
      path, image_column, label_column, split_column, group_by: as of `table`.
      **others: its other options, which do not matter here.

    Raises:
      UserError: see `table`.
    """
    file = open_table(path)
    columns = _Columns.of(file, image_column, label_column, split_column, group_by)
    if not columns.split:
        return ()
    values = _cells(file, columns.split, file.read([columns.split])[columns.split])
    return tuple(sorted(set(map(canonical, values.unique().to_pylist()))))


# Columns -------------------------------------------------------------------------------------------


class _Columns(NamedTuple):
    """Which columns are read.

    Attributes:
      image: of paths, or of the names of images in the table; '' if these have none.
      content: of images in the table, 'COLUMN' or 'COLUMN.bytes'; None for paths.
      labels: one, or several of 0 and 1.
      several: whether `labels` are columns of 0 and 1.
      split, group: '' for none.
    """

    image: str
    content: str | None
    labels: tuple[str, ...]
    several: bool
    split: str
    group: str

    @property
    def as_text(self) -> list[str]:
        """All but the images themselves."""
        names = (self.image, *self.labels, self.split, self.group)
        return list(dict.fromkeys(name for name in names if name))

    @classmethod
    def of(
        cls,
        file: TableFile,
        image: str | None,
        label: str | Sequence[str] | None,
        split: str | None,
        group_by: str | None,
    ) -> "_Columns":
        """Finds the columns by what the user says, or by their names.

        Raises:
          UserError: there is no such column, or two could be meant.
        """
        names = file.schema.names
        given = [image, split or None, *((label,) if isinstance(label, str) else label or ())]
        for name in given:
            if name is not None and name not in names:
                raise UserError(f"{file.path} has no column {written(name)}; {suggest(name, names)}")
        group = group_by if group_by in names else ""
        split = _called(file, SPLIT_NAMES, "splits", "split_column", given) if split is None else split
        taken = {*given, split, group} - {None, ""}
        image = image or _called_image(file, taken)
        if not image:
            raise UserError(
                f"{file.path} has no column called image, path, file_name, id or the like; name it by "
                f"--config.data.image_column=NAME, one of: {_listed(names)}."
            )
        image, content = _content_of(file, image, taken)
        taken |= {image, (content or "").partition(".")[0]}
        several = label is not None and not isinstance(label, str)
        labels = () if label is None else (label,) if isinstance(label, str) else tuple(label)
        if several and not labels:
            raise UserError(f"data.label_column must name a column or more, got (); {suggest('', names)}")
        if label is None:
            found = _called(file, LABEL_NAMES, "labels", "label_column", taken)
            labels = (found,) if found else tuple(name for name in names if name not in taken)
            several = not found
            if several and not (len(labels) > 1 and _are_zeros_and_ones(file, labels)):
                raise UserError(
                    f"{file.path} has no column called label, class, category, target or the like, and its others are "
                    f"not all of 0 and 1; name it by --config.data.label_column=NAME, one of: {_listed(names)}."
                )
        return cls(image, content, labels, several, split, group)


def _check_options(file: TableFile, columns: _Columns, rule: Rule, separator: str | None) -> None:
    """Raises UserError for options that do not go with these columns."""
    if columns.split and (rule.group_by is not None or rule.stratify):
        key = "stratify" if rule.group_by is None else "group_by"
        raise UserError(
            f"{file.path} has splits in its column {written(columns.split)}; leave out data.{key}, or set "
            "data.split_column='' to split anew."
        )
    if separator is not None and (columns.several or not separator):
        got = "columns of 0 and 1" if separator else "''"
        raise UserError(f"data.label_separator divides the labels in the cells of one column, got {got}.")
    if columns.content and not columns.image and rule.group_by is not None and not columns.group:
        raise UserError(
            f"data.group_by={cut(rule.group_by)}: the images in {file.path} have no names; give a column of groups, "
            f"one of: {_listed(file.schema.names)}."
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 20:,} more" if len(names) > 20 else ""
    return cut(", ".join(map(naming.shown, names[:20]))) + more


def _called(file: TableFile, known: Sequence[str], what: str, key: str, taken: Sequence[str | None]) -> str:
    """Returns the column that has one of the known names; '' if none has."""
    plain = {name: "".join(filter(str.isalnum, name.lower())) for name in file.schema.names}
    found = [name for name in file.schema.names if plain[name] in known and name not in taken]
    if len(found) > 1:
        raise UserError(
            f"{file.path}: {' and '.join(map(written, found[:5]))} could each be the column of {what}; say which by "
            f"--config.data.{key}=NAME."
        )
    return found[0] if found else ""


def _called_image(file: TableFile, taken: set[str]) -> str:
    """Returns the column of images; one with the images themselves before those of paths."""
    texts = {field.name for field in file.schema if not _holds_content(field.type)}
    found = _called(file, IMAGE_NAMES, "images", "image_column", taken | texts)
    return found or _called(file, IMAGE_NAMES, "images", "image_column", taken)


def _holds_content(kind: "pa.DataType") -> bool:
    """Whether values are images: bytes, or Hugging Face's struct of bytes and path."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _content_of(file: TableFile, image: str, taken: set[str]) -> tuple[str, str | None]:
    """Returns the columns of names and of content, as `_Columns` has them."""
    import pyarrow as pa

    kind = file.schema.field(image).type
    if not _holds_content(kind):
        return image, None
    if pa.types.is_struct(kind):
        path = f"{image}.path" if kind.get_field_index("path") >= 0 else ""
        if path and all(group.null_count == len(group) for group in file.groups(f"{image}.bytes")):
            return path, None
        return path, f"{image}.bytes"
    return _called(file, IMAGE_NAMES, "names of images", "image_column", {*taken, image}), image


def _are_zeros_and_ones(file: TableFile, names: Sequence[str]) -> bool:
    import pyarrow as pa
    import pyarrow.compute as pc

    if any(_holds_content(file.schema.field(name).type) for name in names):
        return False
    read = file.read(names)
    known = pa.array([*ZEROS, *ONES])
    try:
        return all(pc.all(pc.is_in(_texts(read[name]), known), min_count=0).as_py() for name in names)
    except pa.ArrowException:
        return False


# Cells ---------------------------------------------------------------------------------------------


def _texts(column: "pa.ChunkedArray") -> "pa.Array":
    """Returns values as texts: without white space around them, as a CSV has after commas, and those of a whole number
    without '.0', which pandas adds where others are missing.

    Raises:
      pa.ArrowException: values of this type have no text, or a number is not whole.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_floating(column.type):
        column = column.cast(pa.int64())
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    column = column.cast(pa.large_string())
    return pc.utf8_trim_whitespace(column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column)


def _cells(file: TableFile, name: str, column: "pa.ChunkedArray") -> "pa.Array":
    """Returns the texts of a column, `[N]`, in which no cell is empty.

    Raises:
      UserError: a cell is empty or as long as no name is, or the column is of another type.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        texts = _texts(column)
    except pa.ArrowException:
        raise UserError(
            f"{file.path}: column {written(name)} has values of type {column.type}; expected texts or whole numbers."
        ) from None
    empty = pc.fill_null(pc.equal(texts, ""), True)
    if number := pc.sum(empty).as_py():
        row = pc.index(empty, True).as_py() + file.first_row
        others = f", and so have {counted(number - 1, 'other')}" if number > 1 else ""
        raise UserError(
            f"{file.path}: row {row:,} has nothing in column {written(name)}{others}. Fill it in, or remove the row."
        )
    _check_lengths(file, name, texts)
    return texts


def _check_lengths(file: TableFile, name: str, texts: "pa.Array") -> None:
    import pyarrow.compute as pc

    lengths = pc.utf8_length(texts)
    if (longest := pc.max(lengths).as_py() or 0) > MAX_TEXT:
        row = pc.index(lengths, longest).as_py() + file.first_row
        raise UserError(
            f"{file.path}: row {row:,} has {longest:,} characters in column {written(name)}, more than any name; is a "
            "quote not closed there?"
        )


def _whole(
    file: TableFile,
    directory: Path,
    columns: _Columns,
    read: "dict[str, pa.ChunkedArray]",
    separator: str | None,
) -> tuple[Rows, list[str]]:
    """Returns all rows, for now with the names of images in place of their content, and all names below `directory`."""
    import pyarrow as pa

    labels, class_names = _labels(file, columns, read, separator)
    if not len(labels):
        raise UserError(f"{file.path} has no rows; expected one for each image.")
    if columns.content is None:
        given = _cells(file, columns.image, read[columns.image]).to_pylist()
        paths = _Finder(directory).find_all(file, given)
        begin = os.path.join(directory, "")
        below = [path.removeprefix(begin).replace(os.sep, "/") for path in paths]
        return Rows(pa.array(map(os.fsencode, paths), pa.large_binary()), labels, class_names), below
    if columns.image:
        below = _cells(file, columns.image, read[columns.image]).to_pylist()
        shown = pa.array(below, pa.large_string())
    else:
        below = [
            hashlib.sha256(content.as_buffer()).hexdigest() if content.is_valid else ""
            for group in file.groups(columns.content)
            for content in group
        ]
        shown = pa.array([f"row {row + file.first_row}" for row in range(len(below))], pa.large_string())
    return Rows(shown, labels, class_names, names=shown), below


def _contents(file: TableFile, columns: _Columns, rows: np.ndarray) -> "pa.Array":
    """Returns the content of images in the table, `[K]` of bytes.

    Args:
      file: the table.
      columns: of the table.
      rows: `[K]` numbers of rows from 0, in rising order.

    Raises:
      UserError: a row has none, or they do not fit into memory.
    """
    import pyarrow as pa

    check_memory(file.path, file.num_bytes([columns.content]))
    begin, parts = 0, []
    for group in file.groups(columns.content):
        mine = rows[(rows >= begin) & (rows < begin + len(group))]
        part = group.take(pa.array(mine - begin)).cast(pa.large_binary()).combine_chunks()
        if part.null_count:
            row = mine[np.flatnonzero(part.is_null())[0]] + file.first_row
            raise UserError(f"{file.path}: row {row:,} has no image in column {written(columns.content)}.")
        parts.append(part)
        begin += len(group)
    return pa.concat_arrays([part.combine_chunks() if isinstance(part, pa.ChunkedArray) else part for part in parts])


# Images --------------------------------------------------------------------------------------------


class _Finder:
    """Finds images by what a table says of their names. Folders are listed once, not asked once an image."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, frozenset[str]] = {}  # of a folder
        self._named: dict[str, list[str]] | None = None  # canonical paths by the last part, with and without suffix
        self._paths: dict[str, str] = {}  # by canonical path

    def find_all(self, file: TableFile, names: Sequence[str]) -> list[str]:
        """Returns the absolute paths of images.

        Raises:
          UserError: an image is not there, or a name could be of several.
        """
        paths, missing = [], []
        for row, name in enumerate(names):
            try:
                path = self._find(name)
            except UserError as error:
                raise UserError(f"{file.path}: row {row + file.first_row:,}: {error}") from None
            paths.append(path)
            if path is None:
                missing.append(row)
        if missing:
            others = f", nor those of {counted(len(missing) - 1, 'other row')}" if len(missing) > 1 else ""
            raise UserError(
                f"{file.path}: row {missing[0] + file.first_row:,}: image {written(names[missing[0]])} is not in "
                f"{self._directory} or below it, with a suffix as {IMAGE_SUFFIXES[0]} or as it is{others}. Say where "
                "the images are by --config.data.data_dir=DIR, or remove these rows."
            )
        return paths

    def _find(self, name: str) -> str | None:
        path = os.path.normpath(os.path.join(self._directory, name))
        place, last = os.path.split(path)
        if place not in self._files:
            self._files[place] = _files_in(place)
        if last in self._files[place]:
            return path
        return self._find_below(canonical(name.replace("\\", "/")).removeprefix("./"))

    def _find_below(self, name: str) -> str | None:
        if self._named is None:
            self._named = {}
            for path in list_files(self._directory)[0]:
                below = canonical(path.relative_to(self._directory).as_posix())
                self._paths[below] = str(path)
                last = below.rpartition("/")[2]
                for known in (last, os.path.splitext(last)[0]):
                    self._named.setdefault(known, []).append(below)
        found = [
            path
            for path in self._named.get(name.rpartition("/")[2], ())
            if f"/{path}".endswith(f"/{name}") or f"/{os.path.splitext(path)[0]}".endswith(f"/{name}")
        ]
        exact = [path for path in found if name in (path, os.path.splitext(path)[0])]
        if len(found) > 1 and len(exact) != 1:
            raise UserError(
                f"{written(name)} could be {naming.shown(found[0])} or {naming.shown(found[1])}; write more of its "
                "path."
            )
        return self._paths[(exact or found)[0]] if found else None


def _files_in(place: str) -> frozenset[str]:
    try:
        with os.scandir(place) as entries:
            return frozenset(entry.name for entry in entries if entry.is_file())
    except OSError:
        return frozenset()


def _not_repeated(file: TableFile, whole: Rows, splits: Sequence[str] | None) -> np.ndarray:
    """Returns the numbers of the rows, from 0, without those that say again what an earlier one says.

    Raises:
      UserError: two rows of one image have different labels or splits.
    """
    if whole.names is not None:  # images in the table: `prepare check` finds those with equal bytes
        return np.arange(len(whole))
    codes = whole.images.dictionary_encode().indices.to_numpy()
    _, firsts = np.unique(codes, return_index=True)
    for row in np.setdiff1d(np.arange(len(codes)), firsts):
        first = firsts[codes[row]]
        for what, values in (("labels", whole.labels), ("splits", splits)):
            if values is not None and values[first] != values[row]:
                several = "; if an image may have several, say what divides them by --config.data.label_separator=TEXT"
                hint = several if what == "labels" else ""
                raise UserError(
                    f"{file.path}: rows {first + file.first_row:,} and {row + file.first_row:,} give "
                    f"{naming.shown(whole.path(row))} different {what}; leave one row{hint}."
                )
    return np.sort(firsts)


# Labels --------------------------------------------------------------------------------------------


def _labels(
    file: TableFile, columns: _Columns, read: "dict[str, pa.ChunkedArray]", separator: str | None
) -> tuple["pa.Array", tuple[str, ...]]:
    """Returns the number of the class of each row, `[N]`, or a list of them, and the names of classes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if columns.several:
        rows, numbers = [], []
        for number, name in enumerate(columns.labels):
            texts = _cells(file, name, read[name])
            is_one, is_zero = pc.is_in(texts, pa.array(ONES)), pc.is_in(texts, pa.array(ZEROS))
            known = pc.or_(is_one, is_zero)
            if (row := pc.index(known, False).as_py()) >= 0:
                raise UserError(
                    f"{file.path}: columns of classes must be 0 or 1, got {written(texts[row].as_py())} in row "
                    f"{row + file.first_row:,} of {written(name)}; labels as names are in one column."
                )
            mine = np.flatnonzero(is_one.to_numpy(zero_copy_only=False))
            rows.append(mine)
            numbers.append(np.full(len(mine), number))
        names = distinct(columns.labels, f"{file.path}: the columns of classes")
        return _lists(np.concatenate(rows), np.concatenate(numbers), len(texts)), names
    (name,) = columns.labels
    column = read[name]
    stated = file.class_names(name)
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if separator is None and not is_list:
        texts = _cells(file, name, column)
        numbers, names = _numbers(file, name, texts, stated, np.arange(len(texts)))
        return pa.array(numbers), names
    if is_list:
        column = column.combine_chunks()
        if column.null_count:
            row = np.flatnonzero(column.is_null())[0] + file.first_row
            raise UserError(
                f"{file.path}: row {row:,} has nothing in column {written(name)}; make it an empty list if the image "
                "has no label, or remove the row."
            )
        owners, flat, count = pc.list_parent_indices(column), pc.list_flatten(column), len(column)
    else:
        try:
            texts = pc.fill_null(_texts(column), "")
        except pa.ArrowException:
            raise UserError(
                f"{file.path}: column {written(name)} has no texts that a separator could divide."
            ) from None
        parts = pc.split_pattern(texts, separator)
        owners, flat, count = pc.list_parent_indices(parts), pc.utf8_trim_whitespace(pc.list_flatten(parts)), len(texts)
        owners = owners.filter(there := pc.not_equal(flat, ""))
        flat = flat.filter(there)
    owners = owners.to_numpy(zero_copy_only=False).astype(np.int64)
    texts = _cells(file, name, pa.chunked_array([flat]))
    numbers, names = _numbers(file, name, texts, stated, owners)
    pairs = np.unique(np.stack([owners, numbers], 1), axis=0)  # a label twice in a cell is there once
    return _lists(pairs[:, 0], pairs[:, 1], count), names


def _numbers(
    file: TableFile, name: str, texts: "pa.Array", stated: tuple[str, ...] | None, rows: np.ndarray
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns the number of each label, `[M]` int32, and the names of classes.

    Args:
      file, name: the table and the column, for messages.
      texts: `[M]` labels.
      stated: the names of classes, of which labels are the numbers; None if labels are the names.
      rows: `[M]` of the labels, from 0, for messages.
    """
    coded = texts.dictionary_encode()
    codes, labels = coded.indices.to_numpy(), coded.dictionary.to_pylist()
    if stated is not None:
        names = distinct(stated, f"{file.path}: the names of classes")
        known = {str(number): number for number in range(len(names))}
        if wrong := [label for label in labels if label not in known]:
            row = rows[np.flatnonzero(codes == labels.index(wrong[0]))[0]] + file.first_row
            raise UserError(
                f"{file.path}: row {row:,} has the label {cut(wrong[0])} in column {written(name)}, which is none of "
                f"{counted(len(names), 'class')}; remove such rows."
            )
        return np.array([known[label] for label in labels], np.int32)[codes], names
    names = sorted(set(map(composed, labels)))
    plain: dict[str, str] = {}
    for label in names:
        if (other := plain.setdefault(" ".join(label.split()), label)) != label:
            raise UserError(
                f"{file.path}: the labels {written(other)} and {written(label)} differ in white space alone; make them "
                "one."
            )
    number = {label: i for i, label in enumerate(names)}
    return np.array([number[composed(label)] for label in labels], np.int32)[codes], tuple(names)


def _lists(rows: np.ndarray, numbers: np.ndarray, count: int) -> "pa.Array":
    """Returns `[count]` lists of class numbers, from pairs of a row and a number."""
    import pyarrow as pa

    order = np.lexsort((numbers, rows))
    offsets = np.searchsorted(rows[order], np.arange(count + 1))
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(numbers[order].astype(np.int32)))


# Splits --------------------------------------------------------------------------------------------


def _by_column(file: TableFile, name: str, values: Sequence[str], split: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns the rows of a split, from 0, and the names of all splits, by a column."""
    values = [canonical(value) for value in values]
    there = tuple(dict.fromkeys(values))
    if canonical(split) not in there:
        raise UserError(
            f"{file.path} has no row of split {split!r} in column {written(name)}; {suggest(split, there)} Choose by "
            "data.train_split and data.eval_split."
        )
    return np.flatnonzero(np.array(values, object) == canonical(split)), there


def _by_rule(file: TableFile, keys: Sequence[str], whole: Rows, rule: Rule, split: str) -> np.ndarray:
    """Returns the rows of a split, from 0, as `splitting.held_out` makes it."""
    lookup(dict.fromkeys((*SPLITS, ALL)), split, "split of a table without a column of splits")
    if split == ALL:
        return np.arange(len(whole))
    labels = whole.numbered()
    if mistake := splitting.mistake(
        keys,
        labels,
        rule,
        split,
        file.path,
        lambda name: f"{file.path}: class {written(name)}",
        "add a column of splits",
    ):
        raise UserError(mistake)
    return np.flatnonzero(splitting.held_out(keys, labels, rule) == (split == "val"))
