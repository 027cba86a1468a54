"""Data sets: tables, folders, arrays, IDX files, and records as `prepare` writes them."""

import contextlib
import gzip
import io
import json
import random
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from array_record.python import array_record_module
from pyarrow import parquet

from tests.fuzz import images, mutation
from tests.fuzz.kinds import Files, Kind, WrongError
from xception_flax.commands import prepare
from xception_flax.data import decoding, sources

sys.path.append(str(Path(__file__).parents[1]))  # as pytest has it; `python -m tests.fuzz` does not

from preparing import PATH, SYNSETS, write_tars

CLASSES = ("cat", "dog")
VERSION = "1.0.0"


def _image(number: int) -> bytes:
    form = ("jpeg", "png", "bmp")[number % 3]
    return images.originals()[form][0]


def _everything(source: Any) -> Iterable[Any]:
    """Reads all examples as training does; a bad image or record is one of the errors that it reports."""
    for i in range(len(source)):
        example = source[i]
        label = np.asarray(example["label"])
        whole = label.ndim == 1 or 0 <= int(label) < len(source.class_names)
        if not whole or (label.ndim == 1 and label.shape != (len(source.class_names),)):
            raise WrongError(f"the label of example {i} is {label} of {len(source.class_names)} classes")
        with contextlib.suppress(decoding.BadImageError):
            decoding.decode(example["image"], 3)
        yield example


# Tables --------------------------------------------------------------------------------------------

ROWS = [
    (f"{CLASSES[i % 2]}/{i}.img", CLASSES[i % 2], "val" if i % 4 == 3 else "train", f"p{i // 2}") for i in range(12)
]


@cache
def _photos() -> dict[str, bytes]:
    return {name: _image(i) for i, (name, *_) in enumerate(ROWS)} | {"labels.txt": b"not an image"}


def _csv(divider: str = ",") -> str:
    return "\n".join(divider.join(row) for row in [("image", "label", "split", "patient"), *ROWS]) + "\n"


def _json_lines() -> list[dict[str, Any]]:
    return [{"image": name, "label": label, "split": split, "n": i} for i, (name, label, split, _) in enumerate(ROWS)]


TABLE_OPTIONS: list[dict[str, Any]] = [
    {},
    {},
    {"split_column": ""},
    {"split_column": "", "group_by": "patient"},
    {"split_column": "", "stratify": True},
    {"label_separator": ";"},
    {"image_column": "image", "label_column": "label"},
    {"split_column": "", "group_by": "(.*)/"},
]


def _make_csv(draw: random.Random) -> Files:
    text = _csv(draw.choice((",", ";", "\t")))
    if draw.random() < 0.3:
        text = text.replace("dog", draw.choice(('"do\ng"', "cat;dog", '"cat ""x"""', "0", "1.0")))
    if draw.random() < 0.6:
        table = mutation.encoded(mutation.changed_text(draw, text))
    else:
        table = mutation.changed_bytes(draw, text.encode())
    return _table(draw, "labels.csv", table)


def _make_json(draw: random.Random) -> Files:
    rows = _json_lines()
    row = draw.randrange(len(rows))
    lines = [json.dumps(row).encode() for row in rows]
    if draw.random() < 0.7:
        lines[row] = mutation.json_bytes(draw, rows[row]).replace(b"\n", b" ")
        if draw.random() < 0.3:  # all rows alike
            key, hostile = draw.choice(list(rows[0])), mutation.value(draw)
            lines = [json.dumps(r | {key: hostile}).encode() for r in rows]
        return _table(draw, "labels.jsonl", b"\n".join(lines) + b"\n")
    return _table(draw, "labels.jsonl", mutation.changed_bytes(draw, b"\n".join(lines) + b"\n"))


def _table(draw: random.Random, name: str, content: bytes) -> Files:
    options = {"split": draw.choice(("train", "train", "val")), **draw.choice(TABLE_OPTIONS)}
    return {name: content, "options.json": json.dumps(options).encode()} | _photos()


@cache
def _parquet(hugging_face: bool, content: bool) -> bytes:
    columns: dict[str, Any] = {"label": pa.array([i % 2 for i in range(12)])}
    data = [_image(i) for i in range(12)]
    if hugging_face:
        columns["image"] = pa.array([{"bytes": d, "path": f"{i}.png"} for i, d in enumerate(data)])
    else:
        columns["image"] = pa.array(data if content else [row[0] for row in ROWS])
    table = pa.table(columns)
    if hugging_face:
        feature = {"names": list(CLASSES), "_type": "ClassLabel"}
        said = {"info": {"features": {"label": feature, "image": {"_type": "Image"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(said)})
    return _as_parquet(table)


def _as_parquet(table: pa.Table) -> bytes:
    file = io.BytesIO()
    parquet.write_table(table, file, row_group_size=5)
    return file.getvalue()


def _make_parquet(draw: random.Random) -> Files:
    whole = _parquet(draw.random() < 0.5, draw.random() < 0.5)
    if draw.random() < 0.5:
        return _table(draw, "labels.parquet", mutation.changed_bytes(draw, whole))
    table = parquet.read_table(io.BytesIO(whole))
    match draw.randrange(3):
        case 0 if table.schema.metadata:
            said = json.loads(table.schema.metadata[b"huggingface"])
            changed = mutation.json_bytes(draw, said)
            if draw.random() < 0.1:
                changed = b"[" * 3000
            table = table.replace_schema_metadata({"huggingface": changed})
        case _:
            place = draw.randrange(table.num_columns)
            table = table.set_column(place, table.column_names[place], hostile_column(draw, table.num_rows))
    return _table(draw, "labels.parquet", _as_parquet(table))


def hostile_column(draw: random.Random, count: int) -> pa.Array:
    """A column of a type, or of values, that nobody expects."""
    kinds = [
        pa.array([2**62, -1, None] * 4),
        pa.array([float("nan"), 1e300, 0.5] * 4),
        pa.array([None] * 12),
        pa.array([[], ["cat"], None] * 4),
        pa.array([["cat", "cat"], ["dog"], [""]] * 4),
        pa.array([[[1]], [[2, 3]], []] * 4),
        pa.array([True, False, None] * 4),
        pa.array(["a" * 5000, "", "é"] * 4),
        pa.array([b"", b"\xff", b"x"] * 4),
        pa.array([{"bytes": None, "path": "a.png"}, {"bytes": b"x", "path": None}, None] * 4),
        pa.array([{"bytes": "text"}] * 12),
        pa.array([{"other": 1}] * 12),
        pa.array([0, 1, 2] * 4, pa.date32()),
        pa.array([0, 1, 2] * 4, pa.duration("s")),
        pa.array(["cat", "dog", None] * 4).dictionary_encode(),
        pa.nulls(12, pa.binary(4)),
        pa.array([2**64 - 1] * 12, pa.uint64()),
        pa.array([1, 10, 100] * 4).cast(pa.decimal128(30, 2)),
    ]
    return draw.choice(kinds)[:count]


def read_table(folder: Path) -> None:
    """A table as training reads it."""
    options = json.loads((folder / "options.json").read_text())
    (path,) = (path for path in folder.iterdir() if path.stem == "labels" and path.suffix != ".txt")
    _finish(sources.table.table(options.pop("split"), path=str(path), **options))


def _finish(source: Any) -> None:
    for _ in _everything(source):
        pass


# Arrays --------------------------------------------------------------------------------------------


@cache
def _arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "train_images": rng.integers(0, 256, (6, 8, 8, 3), np.uint8),
        "train_labels": np.arange(6) % 3,
        "class_names": np.array(["cat", "dog", "é"]),
    }


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue())
    return file.getvalue()


def _make_arrays(draw: random.Random) -> Files:
    arrays = dict(_arrays())
    if draw.random() < 0.5:
        return {"data.npz": mutation.changed_bytes(draw, _npz(arrays))}
    name = draw.choice(list(arrays))
    if draw.random() < 0.5:
        hostile = [
            np.zeros((0,)), np.zeros((6, 0, 8, 3), np.uint8), np.zeros((6, 8, 8, 3)), np.array(5),
            np.array([0, 1, 2, 3, 4, 2**40]), np.array([0.5] * 6), np.array([np.nan] * 6), np.array([-1] * 6),
            np.array(["a"] * 6), np.array([b"\xff", b"a"]), np.array([1e308] * 6), np.ones((6, 1), bool),
            np.array([2**64 - 1] * 6, np.uint64), np.array([""] * 3), np.array(["a", "a", "a"]), np.array([1j] * 6),
            np.array(["2020-01-01"] * 6, "M8[D]"), np.zeros(6, [("a", "u1")]), np.array([65504.0] * 6, np.float16),
            np.array(["a", "b"]), np.zeros((6, 70000), np.uint8), np.array([np.inf] * 6, np.float32),
        ]  # fmt: skip
        arrays[name] = draw.choice(hostile)
        return {"data.npz": _npz(arrays)}
    member = io.BytesIO()
    np.save(member, arrays[name])
    content = member.getvalue()
    end = 10 + int.from_bytes(content[8:10], "little")
    header = mutation.changed_text(draw, content[10:end].decode("latin-1").rstrip()).encode("utf-8", "replace")[:60000]
    packed = content[:8] + (len(header) + 1).to_bytes(2, "little") + header + b"\n" + content[end:]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for other in arrays:
            held = io.BytesIO()
            np.save(held, arrays[other])
            archive.writestr(zipfile.ZipInfo(f"{other}.npy"), packed if other == name else held.getvalue())
    return {"data.npz": file.getvalue()}


def read_arrays(folder: Path) -> None:
    """Arrays as training reads them. Their archive has checksums, so that what differs from NumPy's is wrong."""
    path = folder / "data.npz"
    source = sources.arrays.arrays("train", path=str(path))
    with np.load(path, allow_pickle=False) as file:
        if not np.array_equal(file["train_images"], source.images):
            raise WrongError("images differ from NumPy's")
        labels = file["train_labels"]
        if not np.array_equal(labels.reshape(source.labels.shape), source.labels):
            raise WrongError("labels differ from NumPy's")
    _finish(source)


def _make_idx(draw: random.Random) -> Files:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 28, 28), np.uint8)
    files = {}
    for prefix, rows in (("train", pixels), ("t10k", pixels[:4])):
        files[f"{prefix}-images-idx3-ubyte"] = (
            b"\0\0\x08\3" + b"".join(n.to_bytes(4) for n in rows.shape) + rows.tobytes()
        )
        files[f"{prefix}-labels-idx1-ubyte"] = (
            b"\0\0\x08\1" + len(rows).to_bytes(4) + bytes(i % 10 for i in range(len(rows)))
        )
    name = draw.choice(list(files))
    if draw.random() < 0.5:
        packed = gzip.compress(files.pop(name), mtime=0)
        return files | {f"{name}.gz": mutation.changed_bytes(draw, packed)}
    return files | {name: mutation.changed_bytes(draw, files[name])}


def read_idx(folder: Path) -> None:
    """Fashion-MNIST as training reads it."""
    _finish(sources.fashion_mnist.fashion_mnist("train+validation+test", data_dir=str(folder)))


# Folders -------------------------------------------------------------------------------------------


def _make_folder(draw: random.Random) -> Files:
    names = [
        *CLASSES,
        *(text for text in mutation.HOSTILE_TEXTS if 0 < len(text) < 200 and not set(text) & set("/\0\ud800")),
    ]
    files = {}
    for i in range(draw.randrange(1, 12)):
        below, end = draw.choice(("", "", "train/", "val/", "a/b/")), draw.choice((".jpg", ".png", ".PNG", ".txt", ""))
        name = f"{draw.choice(names)}/{draw.choice(names)[:40]}{i}{end}"
        files[f"photos/{below}{name}"] = _image(i) if draw.random() < 0.7 else mutation.changed_bytes(draw, _image(i))
    options = {"split": draw.choice(("train", "val", "all"))} | draw.choice(
        [{}, {}, {"stratify": True}, {"group_by": "folder:1"}, {"group_by": "(.*)_"}, {"val_fraction": 0.5}]
    )
    return files | {"options.json": json.dumps(options).encode()}


def read_folder(folder: Path) -> None:
    """A folder as training reads it."""
    options = json.loads((folder / "options.json").read_text())
    _finish(sources.folder.folder(options.pop("split"), data_dir=str(folder / "photos"), **options))


# Records -------------------------------------------------------------------------------------------


@cache
def _prepared() -> dict[str, bytes]:
    """What `prepare folder` writes of a few images."""
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, *_) in enumerate(ROWS):
            path = Path(folder) / "photos" / Path(name).with_suffix(".jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_image(i))
        assert (
            prepare.main(["folder", f"{folder}/photos", "--data-dir", f"{folder}/data", "--val-fraction", "0.4"]) == 0
        )
        (there,) = Path(folder).glob(f"data/*/{VERSION}")
        # Training does not read `prepared.json`, which has the time of the images.
        return {file.name: file.read_bytes() for file in sorted(there.iterdir()) if file.name != "prepared.json"}


@cache
def _records(name: str) -> tuple[bytes, ...]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(_prepared()[name])
        reader = array_record_module.ArrayRecordReader(str(path))
        found = tuple(reader.read_all())
        reader.close()
        return found


def _as_records(records: Iterable[bytes]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/x.array_record"
        writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
        return Path(path).read_bytes()


def _make_records(draw: random.Random) -> Files:
    files = dict(_prepared())
    shards = [name for name in files if "array_record" in name]
    if draw.random() < 0.4:  # right checksums, other records
        name = draw.choice(shards)
        records = list(_records(name))
        for place in range(len(records)) if draw.random() < 0.3 else [draw.randrange(len(records))]:
            records[place] = mutation.changed_bytes(draw, records[place])
        if draw.random() < 0.2:
            records = records[: draw.randrange(len(records) + 1)]
        return files | {name: _as_records(records), "signed": b""}
    name = draw.choice([*files, *shards])
    if name.endswith(".json") and draw.random() < 0.7:
        return files | {name: mutation.json_bytes(draw, json.loads(files[name]))}
    if name.endswith(".txt") and draw.random() < 0.7:
        return files | {name: mutation.encoded(mutation.changed_text(draw, files[name].decode()))}
    return files | {name: mutation.changed_bytes(draw, files[name])}


def read_records(folder: Path) -> None:
    """A data set as training reads it: each record is the one that was written, or an error."""
    signed = (folder / "signed").exists()
    source = sources.tfds.tfds("train", data_dir=str(folder))
    written = {_image(i) for i in range(3)}
    for example in _everything(source):
        if not signed and example["image"] not in written:
            raise WrongError("an image is another one than was written")


# ImageNet's tars ----------------------------------------------------------------------------------


@cache
def _tars() -> dict[str, bytes]:
    train = {f"{synset}_{i}.JPEG": _image(0) for i in range(2) for synset in SYNSETS}
    with tempfile.TemporaryDirectory() as folder:
        write_tars(Path(folder), train, {f"ILSVRC2012_val_{i:08}.JPEG": _image(0) for i in range(1, 4)})
        return {f"tars/{file.name}": file.read_bytes() for file in Path(folder).iterdir()}


def _make_tars(draw: random.Random) -> Files:
    files = dict(_tars())
    name = draw.choice(sorted(files))
    return files | {name: mutation.changed_bytes(draw, files[name], [files[other] for other in sorted(files)])}


def read_tars(folder: Path) -> None:
    """ImageNet as `prepare imagenet` makes records of it, and these as training reads them."""
    assert prepare.main(["imagenet", "--tars", f"{folder}/tars", "--data-dir", f"{folder}/data", "--subset"]) == 0
    _finish(sources.tfds.tfds("train", data_dir=f"{folder}/data/{PATH}"))


KINDS = {
    "tars": Kind(_make_tars, read_tars, share=0.2),
    "csv": Kind(_make_csv, read_table, share=1.5),
    "jsonl": Kind(_make_json, read_table),
    "parquet": Kind(_make_parquet, read_table, share=1.5),
    "arrays": Kind(_make_arrays, read_arrays),
    "idx": Kind(_make_idx, read_idx, share=0.5),
    "folder": Kind(_make_folder, read_folder),
    "records": Kind(_make_records, read_records),
}
