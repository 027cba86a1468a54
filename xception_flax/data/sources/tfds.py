"""Data sets in the format of TensorFlow Datasets (TFDS)."""

import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from xception_flax.data.sources.source import (
    Example,
    InputError,
    Source,
    check_num_classes,
    distinct,
    existing_directory,
)
from xception_flax.text import naming
from xception_flax.text.counting import counted
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import cut, suggest, written

REENCODED = "reencoded"  # the key of a `Reencoding` in a data set's metadata.json, and in what a run records


class Reencoding(NamedTuple):
    """How `prepare` made the images of a data set smaller.

    Attributes:
      max_side: larger images were scaled down to this many pixels of their longer side.
      quality: of the JPEGs that they became, 1 to 100.
    """

    max_side: int
    quality: int

    def __str__(self) -> str:
        return f"at most {self.max_side:,} pixels a side, JPEG quality {self.quality}"


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """A TFDS random-access source. Images stay encoded; labels become integers or multi-hot rows.

    Reading an example raises InputError if its record is damaged or missing, or a label is not one of the classes.
    `reencoding` is what `prepare` did to the images; None for originals, and for data sets that do not say it.
    """

    records: Sequence[Example]
    class_names: tuple[str, ...]
    image_key: str
    label_key: str
    multi_label: bool
    reencoding: Reencoding | None = None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        try:
            record = self.records[index]
        except MemoryError:
            raise
        except Exception as error:  # array_record, protobuf and TFDS raise any exception for what is no example
            raise InputError(f"record {index} cannot be read: {_first_line(error)}.") from None
        if record.get(self.image_key) is None or record.get(self.label_key) is None:
            raise InputError(f"record {index} cannot be read: it is not there.")
        label, num_classes = record[self.label_key], len(self.class_names)
        for number in np.atleast_1d(label).tolist():
            if not 0 <= number < num_classes:
                raise InputError(
                    f"record {index} has the label {number}, which is none of {counted(num_classes, 'class')}."
                )
        if self.multi_label:
            row = np.zeros(num_classes, np.uint8)
            row[np.asarray(label, np.int64)] = 1
            label = row
        file_name = record.get("file_name", b"")
        file_name = file_name.decode(errors="replace") if isinstance(file_name, bytes) else file_name
        return {"image": record[self.image_key], "label": label, "name": f"record {index} {file_name}".rstrip()}


def tfds(
    split: str,
    /,
    name: str | None = None,
    data_dir: str | None = None,
    image_key: str = "image",
    label_key: str = "label",
) -> TfdsSource:
    """Any TFDS image classification set that was prepared with `file_format='array_record'`.

    It does not need TensorFlow. Splits are as in TFDS: 'train', 'validation', 'train[:10%]', ... The label feature is
    a `ClassLabel`, or a sequence of them if images have several labels.

    Args:
      split: TFDS split.
      name: of the data set, such as 'imagenet2012' or 'cifar10:3.0.2'; None if `data_dir` is the directory of one
        version of one data set, with its dataset_info.json.
      data_dir: with `name`, the directory of all data sets (None for TFDS' default); else that of this one.
      image_key: feature with the image.
      label_key: feature with the label or labels.

    Raises:
      UserError: the data set is unknown, is not prepared, has a format without random access, or lacks a feature.
    """
    import tensorflow_datasets as library  # here, since it takes half a second that other sources do not need

    builder = _tfds_builder(library, name, data_dir)
    where, features, file_format = builder.data_dir, builder.info.features, builder.info.file_format
    if not builder.info.splits:
        raise UserError(
            f"TFDS data set {builder.name!r} is not prepared in {where}; say where it is by "
            "--config.data.data_dir=DATA, or prepare it: imagenet2012 by `xception-flax prepare`, "
            "others by TFDS with file_format='array_record' (see docs/data.md)."
        )
    if file_format is None or file_format.value != "array_record":
        found = None if file_format is None else file_format.value
        raise UserError(
            f"{where} holds file format {found!r}, which has no random access; prepare the data set again "
            "with file_format='array_record'."
        )
    for key in (image_key, label_key):
        if key not in features:
            raise UserError(f"TFDS data set {builder.name!r} has no feature {key!r}; {suggest(key, features)}")
    label = features[label_key]
    multi_label = not isinstance(label, library.features.ClassLabel)
    class_label = getattr(label, "feature", None) if multi_label else label
    if not isinstance(class_label, library.features.ClassLabel):
        raise UserError(
            f"TFDS data set {builder.name!r}: feature {label_key!r} must be a ClassLabel or a sequence of "
            f"them, got {type(label).__name__}."
        )
    try:
        records = builder.as_data_source(split, decoders={image_key: library.decode.SkipDecoding()})
    except (ValueError, KeyError) as error:
        raise UserError(
            f"TFDS data set {builder.name!r} has no split {split!r} ({error}); "
            f"there are: {', '.join(sorted(builder.info.splits))}."
        ) from None
    what = f"TFDS data set {builder.name!r}: feature {label_key!r}"
    if not class_label.num_classes:
        raise UserError(f"{what} says nothing of its classes; expected their number, or their names.")
    check_num_classes(class_label.num_classes, len(records), what)
    names = distinct(class_label.names, f"TFDS data set {builder.name!r}: the names of classes")
    return TfdsSource(records, names, image_key, label_key, multi_label, _reencoding(builder))


def reencoding_of(source: Source) -> Reencoding | None:
    """Returns what `prepare` did to the images of a source; None for originals."""
    return getattr(getattr(source, "source", source), "reencoding", None)  # of `Renumbered`


def _reencoding(builder: Any) -> Reencoding | None:
    try:
        said = (builder.info.metadata or {}).get(REENCODED)  # TFDS reads the file here
        return None if said is None else Reencoding(**{key: _whole(number) for key, number in said.items()})
    except Exception as error:  # of JSON and TFDS, and of what is no `Reencoding`
        raise UserError(f"{builder.data_dir}: metadata.json is damaged: {_first_line(error)}.") from None


def _whole(number: object) -> int:
    if type(number) is not int:
        raise ValueError(f"expected a whole number, got {written(number)}")
    return number


def _tfds_builder(library: Any, name: str | None, data_dir: str | None) -> Any:
    if data_dir is not None and not naming.is_unicode(data_dir):
        raise UserError(
            f"data.data_dir: {naming.shown(data_dir)}: TFDS takes no name of a folder that is not UTF-8; rename it, or "
            "make a link to it."
        )
    if name is None:
        if data_dir is None:
            raise UserError(
                "source 'tfds' needs data.name, data.data_dir or both: "
                "--config.data.name=imagenet2012 --config.data.data_dir=DATA, say."
            )
        directory = _bucket(library, data_dir) if "://" in data_dir else existing_directory(data_dir, "a TFDS data set")
        if not (directory / "dataset_info.json").exists():
            raise UserError(
                f"{directory} has no dataset_info.json; give NAME/VERSION of a prepared data set by "
                "--config.data.data_dir=DIR, or --config.data.name=NAME too."
            )
        try:
            return library.builder_from_directory(directory)
        except Exception as error:  # of JSON, protobuf and TFDS
            raise UserError(f"{directory}: what describes the data set is damaged: {_first_line(error)}.") from None
    if data_dir is not None:
        data_dir = str(
            _bucket(library, data_dir) if "://" in data_dir else existing_directory(data_dir, "TFDS data sets")
        )
    try:
        return library.builder(name, data_dir=data_dir)
    except library.core.DatasetNotFoundError:
        known = library.list_builders(with_community_datasets=False)
        raise UserError(
            f"no TFDS data set {name!r}, neither TFDS' own nor prepared in data.data_dir={data_dir}; "
            f"{suggest(name, known)}"
        ) from None
    except (ValueError, AssertionError) as error:
        raise UserError(f"TFDS data set {name!r}: {_first_line(error)}.") from None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return cut(lines[0].rstrip("."))


def _bucket(library: Any, url: str) -> Any:
    """Returns a directory in a bucket. TFDS reads it through fsspec, array_record by its own code."""
    scheme = url.partition("://")[0]
    if scheme != "gs":
        raise UserError(f"data.data_dir: {url}: of buckets only gs:// is read; mount others, and give the path.")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"data.data_dir: to read {url}, pip install gcsfs; or mount the bucket and give the path.")
    return library.core.Path(url)
