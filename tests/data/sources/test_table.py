"""Tables of images: equality with a folder, what is found by itself, and what is refused."""

import contextlib
import csv
import hashlib
import io
import itertools
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import train
import workdirs
from xception_flax import data
from xception_flax.data import sources
from xception_flax.data.sources import columns
from xception_flax.data.sources.folder import Files
from xception_flax.data.sources.table import Rows
from xception_flax.runs.workdir import read_recipe
from xception_flax.text.errors import UserError

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden"

table, folder = sources.table.table, sources.folder.folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """60 images of two classes."""
    root = tmp_path_factory.mktemp("table") / "photos"
    rng = np.random.default_rng(0)
    for i in range(60):
        path = root / ("cat", "dog é")[i % 2] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (10, 10, 3), np.uint8)).save(path)
    return root


def write_csv(path: Path, names: tuple[str, ...], rows: list[tuple[str, ...]], **options: str) -> Path:
    with path.open("w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        csv.writer(file, **options).writerows([names, *rows])
    return path


@pytest.fixture(scope="module")
def as_tables(photos) -> dict[str, Path]:
    """The images of `photos`, in the order of the folder, as a table in each of the formats."""
    files = folder("all", data_dir=str(photos))
    paths = [Path(path).relative_to(photos.parent).as_posix() for path in files.paths]
    labels = [files.class_names[label] for label in files.labels]
    rows, at = list(zip(paths, labels, strict=True)), photos.parent
    contents = [(at / path).read_bytes() for path in paths]
    write_csv(at / "a.csv", ("image", "label"), rows)
    write_csv(at / "a.tsv", ("file_name", "class"), rows, delimiter="\t")
    (at / "a.jsonl").write_text("".join(json.dumps({"path": p, "category": c}) + "\n" for p, c in rows))
    pq.write_table(pa.table({"path": paths, "label": labels}), at / "paths.parquet", row_group_size=7)
    pq.write_table(
        pa.table({"path": paths, "label": labels, "image": contents}), at / "bytes.parquet", row_group_size=7
    )
    structs = [{"bytes": content, "path": path} for content, path in zip(contents, paths, strict=True)]
    pq.write_table(pa.table({"image": structs, "label": pa.array(labels).dictionary_encode()}), at / "structs.parquet")
    links = [{"bytes": None, "path": path} for path in paths]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"image": pa.array(links, kind), "label": labels}), at / "links.parquet")
    return {path.name: path for path in at.iterdir() if path.is_file()}


def batches_of(source: str, train: bool, **options: str) -> list[dict[str, np.ndarray]]:
    split = data.load(
        source=source,
        train=train,
        batch_size=8,
        image_size=8,
        eval_split="val",
        train_transforms="random_resized_crop | flip_left_right",
        **options,
    )
    with contextlib.closing(split.batches()) as batches:
        return list(itertools.islice(batches, 12 if train else None))  # of an epoch and a half


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "name", ["a.csv", "a.tsv", "a.jsonl", "paths.parquet", "bytes.parquet", "structs.parquet", "links.parquet"]
)
def test_a_table_is_the_folder_it_was_made_of(photos, as_tables, name, train):
    """The same split by the hash of names, the same classes, the same batches, bit for bit."""
    expected = batches_of("folder", train, data_dir=str(photos))
    found = batches_of("table", train, path=str(as_tables[name]))
    assert len(found) == len(expected) >= 1
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])
    split = "train" if train else "val"
    rows = table(split, path=str(as_tables[name]))
    assert rows.class_names == ("cat", "dog é")
    assert (len(rows), rows.splits, rows.unread) == (len(folder(split, data_dir=str(photos))), (), ())


def test_a_run_on_a_table_is_the_run_on_the_folder(photos, as_tables, tmp_path):
    """By the recipe for folders, through the program itself: equal weights and metrics, also with a worker process."""
    small = ["model.name=lenet", "data.image_size=16", "batch_size=8", "epochs=2", "schedule.warmup_epochs=1"]
    overrides = [
        f"--config.{text}" for text in (*small, "log_every_steps=1", "data.train_transforms=random_resized_crop")
    ]

    def run(name: str, place: Path, *more: str) -> tuple[dict[str, np.ndarray], list[dict]]:
        where = ["--config", f"{ROOT / 'configs' / 'folder.py'}:{place}", "--workdir", str(tmp_path / name)]
        assert train.main([*where, *overrides, *more]) == 0
        records = [{k: v for k, v in r.items() if "second" not in k} for r in workdirs.records(tmp_path / name)]
        return workdirs.arrays(tmp_path / name, max(r["step"] for r in records)), records

    expected, metrics = run("folder", photos)
    assert len(expected) > 20
    for name, *more in (("a.csv",), ("structs.parquet", "--config.data.num_workers=1")):
        found, records = run(name, as_tables[name], *more)
        assert found.keys() == expected.keys()
        for path, value in expected.items():
            np.testing.assert_array_equal(found[path], value, err_msg=path)
        assert records == metrics
    moved = shutil.copy(as_tables["a.csv"], as_tables["a.csv"].with_name("moved.csv"))
    run("a.csv", moved)  # the data may lie elsewhere: the run is finished
    config = read_recipe(tmp_path / "a.csv")
    assert (config.model.num_classes, config.data.source, config.data.path) == (2, "table", str(moved))


def test_a_table_goes_to_workers_as_arrays(as_tables):
    """A row takes the bytes of its path, its label and an offset, and no object of Python."""
    rows = table("all", path=str(as_tables["a.csv"]))
    paths = sum(len(rows.path(i).encode()) for i in range(60))
    assert rows.images.nbytes + rows.labels.nbytes == paths + 61 * 8 + 60 * 4
    assert len(pickle.dumps(rows)) < paths + 61 * 8 + 60 * 4 + 2000
    again = pickle.loads(pickle.dumps(rows))
    assert [again[i]["image"] for i in range(60)] == [rows[i]["image"] for i in range(60)]


def test_names_of_kaggle_are_found(tmp_path):
    """Without a suffix, without folders, with either; and numbers keep their zeros."""
    photos = tmp_path / "photos"
    for i in range(60):
        path = photos / "ab"[i % 2] / ("more" if i % 3 else "") / f"{i:03}.{('JPG', 'jpeg', 'png')[i % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    paths = folder("all", data_dir=str(photos)).paths
    below = [Path(path).relative_to(photos) for path in paths]
    for kind, ids in {
        "stem": [path.stem for path in below],
        "name": [path.name for path in below],
        "below": below,
        "below without suffix": [path.with_suffix("") for path in below],
        "end": [Path(*path.parts[-2:]) for path in below],
        "windows": [str(path).replace("/", "\\") for path in below],
        "absolute": paths,
        "dots": [f"./{path}" for path in below],
    }.items():
        path = write_csv(tmp_path / f"{kind}.csv", ("Id", "Label"), [(str(name), "x") for name in ids])
        rows = table("all", path=str(path), data_dir=str(photos))
        assert tuple(rows.path(i) for i in range(60)) == paths, kind
    by_itself = table("all", path=str(tmp_path / "stem.csv"))  # without data_dir: below the folder of the table
    assert tuple(by_itself.path(i) for i in range(60)) == paths

    twice = write_csv(tmp_path / "twice.csv", ("Id", "Label"), [("001", "x"), ("000", "x")])
    (photos / "b" / "000.jpg").touch()
    with pytest.raises(
        UserError, match=r"row 3: '000' could be photos/a/000\.JPG or photos/b/000\.jpg; write more of its"
    ):
        table("all", path=str(twice))
    write_csv(twice, ("Id", "Label"), [("001", "x"), ("a/000", "x"), ("b/000", "x")])
    rows = table("all", path=str(twice))
    assert [Path(rows.path(i)).relative_to(photos).as_posix() for i in (1, 2)] == ["a/000.JPG", "b/000.jpg"]


def test_names_in_the_other_form_of_unicode_are_found(tmp_path):
    (tmp_path / "cafe\u0301").mkdir()
    for i in range(2):
        (tmp_path / "cafe\u0301" / f"{i}.jpg").touch()
    path = write_csv(tmp_path / "a.csv", ("image", "label"), [("caf\xe9/0.jpg", "\xe9"), ("caf\xe9/1.jpg", "e\u0301")])
    rows = table("all", path=str(path))
    assert [rows[i]["image"] for i in range(2)] == [b"", b""]
    assert rows.class_names == ("\xe9",)


def test_several_labels(photos, tmp_path):
    """By a separator, as lists, and as columns of 0 and 1: the same rows of 0 and 1."""
    names = [Path(path).name for path in folder("all", data_dir=str(photos)).paths]
    tags = [("sun sea", "", "sea", "sun", "sea sea")[i % 5] for i in range(60)]
    expected = [(("sea" in tag), ("sun" in tag)) for tag in tags]
    lists = [sorted(set(tag.split())) for tag in tags]
    write_csv(tmp_path / "text.csv", ("image", "tags"), list(zip(names, tags, strict=True)))
    write_csv(
        tmp_path / "columns.csv",
        ("image", "sea", "sun"),
        [(name, int(sea), f"{sun:.1f}") for name, (sea, sun) in zip(names, expected, strict=True)],
    )
    (tmp_path / "lists.jsonl").write_text(
        "".join(json.dumps({"image": n, "labels": t}) + "\n" for n, t in zip(names, lists, strict=True))
    )
    pq.write_table(pa.table({"image": names, "labels": lists}), tmp_path / "lists.parquet")
    sea, sun = ([row[i] for row in expected] for i in range(2))
    pq.write_table(pa.table({"image": names, "x": names, "sea": sea, "sun": sun}), tmp_path / "flags.parquet")
    for name, options in {
        "text.csv": {"label_separator": " "},
        "columns.csv": {},
        "lists.jsonl": {},
        "lists.parquet": {},
        "flags.parquet": {"label_column": ("sea", "sun")},
    }.items():
        rows = table("all", path=str(tmp_path / name), data_dir=str(photos), **options)
        assert (rows.class_names, rows.several) == (("sea", "sun"), True), name
        labels = np.stack([pickle.loads(pickle.dumps(rows))[i]["label"] for i in range(60)])
        assert labels.dtype == np.uint8
        np.testing.assert_array_equal(labels, expected, name)
    (batch, *_) = batches_of("table", True, path=str(tmp_path / "columns.csv"), data_dir=str(photos))
    assert (batch["labels"].shape, batch["labels"].dtype) == ((8, 2), np.uint8)


def test_a_column_of_splits(photos, tmp_path):
    """Each has its rows in their order, and all have the classes of the whole table. Repeated rows are counted."""
    names = [Path(path).name for path in folder("all", data_dir=str(photos)).paths]
    rows = [(name, "ab"[i % 2], ("train", "train", "valid", "test")[i // 2 % 4]) for i, name in enumerate(names)]
    rows = [*rows, *rows[:3]]
    path = str(write_csv(tmp_path / "a.csv", ("image", "label", "Split"), rows))

    def read(split, **options):
        return table(split, path=path, data_dir=str(photos), **options)

    for split, count in (("train", 32), ("valid", 14), ("test", 14)):
        found = read(split)
        expected = [row for row in rows[:60] if row[2] == split]
        assert [Path(found.path(i)).name for i in range(count)] == [row[0] for row in expected]
        assert found.labels.to_pylist() == ["ab".index(row[1]) for row in expected]
        assert (len(found), found.class_names, found.split) == (count, ("a", "b"), split)
    expected = "3 of 49 rows are not read: 3 there before (row 62). Other splits there, which are not used: test."
    assert data.unread_of([read("train"), read("valid")]) == expected
    assert data.unread_of([read("valid")], whole=False) == "3 rows are not read: 3 there before (row 62)."
    with pytest.raises(
        UserError, match=r"no row of split 'val' in column 'Split'; did you mean 'valid'\?.*data\.eval_"
    ):
        read("val")
    with pytest.raises(UserError, match=r"no row of split 'all' in column 'Split'"):
        read("all")
    with pytest.raises(
        UserError, match=r"has splits in its column 'Split'; leave out data\.stratify, or set data\.spl"
    ):
        read("train", stratify=True)
    assert len(read("all", split_column="")) == 60
    contradicting = [*rows, (rows[4][0], rows[4][1], "train")]
    write_csv(tmp_path / "a.csv", ("image", "label", "Split"), contradicting)
    with pytest.raises(UserError, match=r"rows 6 and 65 give .*\.png different splits; leave one row\.$"):
        read("train")
    write_csv(tmp_path / "a.csv", ("image", "label", "Split"), [(names[0], "a", "train"), (names[1], "b", "val")])
    with pytest.raises(
        UserError, match=r"a\.csv: class 'b' has no row of split 'train'; each class needs some there\."
    ):
        read("train")


def test_a_table_of_hugging_face(tmp_path):
    """Written by their library: images in the table, and numbers of classes whose names are beside them."""
    path = str(GOLDEN / "huggingface.parquet")
    rows = table("all", path=path, label_column="label")
    assert rows.class_names == ("zebra", "cat", "dog")
    assert rows.labels.to_pylist() == [i % 3 for i in range(24)]
    assert [rows[i]["name"] for i in (0, 23)] == ["00.png", "23.png"]
    with Image.open(io.BytesIO(rows[7]["image"])) as image:
        assert (image.size, image.getpixel((0, 0))) == ((8, 8), (7, 14, 21))
    tags = table("all", path=path, label_column="tags")
    assert tags.class_names == ("red", "blue")
    assert [tags[i]["label"].tolist() for i in range(4)] == [[0, 0], [1, 0], [0, 1], [1, 1]]
    with pytest.raises(
        UserError,
        match=r"'label' and 'tags' could each be the column of labels; say which by --config\.data\.label_column=NAME",
    ):
        table("all", path=path)
    names = [f"{i:02}.png" for i in range(24)]
    held_out = [name for name in names if int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) / 2**64 < 0.3]
    val = table("val", path=path, label_column="label", val_fraction=0.3)
    assert [val[i]["name"] for i in range(len(val))] == held_out
    whole = pq.read_table(path)
    unknown = whole.set_column(1, whole.schema.field("label"), pa.array([-1] + 23 * [0]))
    pq.write_table(unknown, tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match=r"row 1 has the label -1 in column 'label', which is none of 3 classes; remove"
    ):
        table("all", path=str(tmp_path / "a.parquet"), label_column="label")


def test_images_without_names_are_split_by_their_content(as_tables, tmp_path):
    """So their order does not matter."""
    whole = pq.read_table(as_tables["bytes.parquet"], columns=["image", "label"])
    digests = [hashlib.sha256(hashlib.sha256(x).hexdigest().encode()).hexdigest() for x in whole["image"].to_pylist()]
    expected = {i for i, digest in enumerate(digests) if int(digest[:16], 16) / 2**64 < 0.2}
    order = np.random.default_rng(0).permutation(60)
    for places in (np.arange(60), order):
        pq.write_table(whole.take(places), tmp_path / "a.parquet", row_group_size=9)
        val = table("val", path=str(tmp_path / "a.parquet"), val_fraction=0.2)
        assert val.names.to_pylist() == [f"row {n}" for n, i in enumerate(places, start=1) if i in expected]
        assert val.images.to_pylist() == [whole["image"][int(i)].as_py() for i in places if i in expected]


def test_images_in_a_table_must_fit_into_memory(as_tables, monkeypatch):
    monkeypatch.setattr("xception_flax.host.allocator.free_memory_bytes", lambda: 10_000)
    with pytest.raises(
        UserError, match=r"bytes\.parquet holds 0\.0 GiB by its header, but 0\.0 GiB of memory are free"
    ):
        table("all", path=str(as_tables["bytes.parquet"]))


# What is in no order -------------------------------------------------------------------------------


def test_texts_of_excel_are_read(photos, tmp_path):
    """A mark in front, semicolons or tabs, quotes, ends of lines as on Windows or in a field, an index of pandas."""
    names = [Path(path).name for path in folder("all", data_dir=str(photos)).paths][:3]
    texts = {
        "mark.csv": "\ufeffimage,label\r\n" + "".join(f"{name},é\r\n" for name in names),
        "semicolon.csv": "image;label\r\n" + "".join(f"{name};é\r\n" for name in names),
        "tabs.txt": "image\tlabel\n" + "".join(f"{name}\té\n" for name in names),
        "quotes.csv": '\n"image","a, b; c","label"\n' + "".join(f'"{name}","x\ny","é"\n' for name in names),
        "pandas.csv": ",image,label\n" + "".join(f"{i},{name},é\n" for i, name in enumerate(names)),
        "empty columns.csv": "image,label,,\n" + "".join(f"{name},é,,\n" for name in names),
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
        rows = table("all", path=str(tmp_path / name), data_dir=str(photos))
        assert [Path(rows.path(i)).name for i in range(len(rows))] == names, name
        assert rows.class_names == ("é",)


@pytest.mark.parametrize("separator", [None, "|"])
def test_blanks_around_a_value_are_none_of_it(photos, tmp_path, separator):
    """A person writes `, ` between fields: names of columns, images, labels, groups and splits are without blanks."""
    names = [Path(path).name for path in folder("all", data_dir=str(photos)).paths][:8]
    rows = [(name, "dog"[: 2 + i % 2], "ab"[i // 4], ("train", "val")[i // 4]) for i, name in enumerate(names)]
    found = {}
    for mark in (",", ", ", " , "):
        text = "".join(mark.join(row) + "\n" for row in [("image", "label", "patient", "split"), *rows])
        (tmp_path / "a.csv").write_text(text)
        given = dict(path=str(tmp_path / "a.csv"), data_dir=str(photos), label_separator=separator)
        assert sources.table.table_splits(given["path"]) == ("train", "val")
        groups = dict(split_column="", label_column="label", group_by="patient", val_fraction=0.5)
        found[mark] = [
            (split.class_names, [Path(split.path(i)).name for i in range(len(split))], split.labels.to_pylist())
            for split in (table("train", **given), table("val", **given), table("val", **given, **groups))
        ]
    assert found[","][0][:2] == (("do", "dog"), names[:4])
    assert found[", "] == found[" , "] == found[","]


def test_numbers_are_texts(photos, tmp_path):
    """In CSV as they are written; in Parquet without the '.0' of pandas. Order is that of texts, as of folders."""
    names = [Path(path).name for path in folder("all", data_dir=str(photos)).paths][:4]
    path = write_csv(tmp_path / "a.csv", ("image", "label"), list(zip(names, ("10", "007", "9", "7"), strict=True)))
    assert table("all", path=str(path), data_dir=str(photos)).class_names == ("007", "10", "7", "9")
    for kind in (pa.int8(), pa.float64(), pa.string()):
        pq.write_table(pa.table({"image": names, "label": pa.array([10, 1, 9, 9]).cast(kind)}), tmp_path / "a.parquet")
        rows = table("all", path=str(tmp_path / "a.parquet"), data_dir=str(photos))
        assert (rows.class_names, rows.labels.to_pylist()) == (("1", "10", "9"), [1, 0, 2, 2])
    (tmp_path / "a.jsonl").write_text(
        "".join(f'{{"image": "{name}", "label": "2020-01-0{i + 1}"}}\n' for i, name in enumerate(names))
    )
    assert table("all", path=str(tmp_path / "a.jsonl"), data_dir=str(photos)).class_names[1] == "2020-01-02"


MISTAKES = {
    "no image": ("image,label\n001.png,a\nx.png,a\ny.png,b\n", r"row 3: image 'x\.png' is not in .* or below.*nor t"),
    "no label": ("image,label\n001.png,\n002.png,a\n003.png, \n", r"row 2 has nothing in column 'label', and so have"),
    "no name": ("image,label\n001.png,a\n,b\n", r"row 3 has nothing in column 'image'\. Fill it in, or remove"),
    "no rows": ("image,label\n", r"has no rows; expected one for each image"),
    "no end of the first line": ("image,label", r"has no rows; expected one for each image"),
    "nothing": ("", r"is empty; expected the names of the columns in its first line"),
    "no names": ("001.png,cat\n002.png,dog\n", r"no column called image, path.*data\.image_column.*: 001\.png, cat"),
    "no labels": ("image,breed,age\n001.png,pug,3\n", r"no column called label.*label_column.*: image, breed, age"),
    "two of labels": ("image,label,class\n001.png,a,b\n", r"'label' and 'class' could each be the column of labels"),
    "two of images": ("id,file_name,label\n1,001.png,a\n", r"'id' and 'file_name' could each be the column of images"),
    "two of a name": ("image,label,label\n001.png,a,b\n", r"has two columns called label; each needs its own name"),
    "contradiction": (
        "image,label\n001.png,a\n002.png,b\n001.png,b\n",
        r"rows 2 and 4 give .*001\.png different labels; leave one row; if an image may have several.*label_separator",
    ),
    "white space": ("image,label\n001.png,a b\n002.png,a  b\n", r"labels 'a  b' and 'a b' differ in white space alone"),
    "a row too long": ("image,label\n001.png,a\n002.png,a,b\n", r"cannot be read as a table: CSV parse error.*Exp"),
    "a quote": ('image,label\n"001.png,a\n002.png,b\n' + 3000 * "003.png,c\n", r"cannot be read as a table: CSV parse"),
    "a huge field": (f"image,label\n001.png,{'x' * 5000}\n", r"row 2 has 5,000 characters in column 'label', more"),
    "a huger field": (f"image,label\n001.png,{'x' * 2**21}\n", r"a row has more than 1,048,576 bytes, as if a quote"),
    "a huge name": (f"image,{'x' * 200_000}\n001.png,a\n", r"names of the columns, cannot be read \(field larger than"),
}  # fmt: skip


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_in_a_csv_are_a_line(photos, tmp_path, what):
    content, message = MISTAKES[what]
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        table("train", path=str(tmp_path / "a.csv"), data_dir=str(photos))
    assert str(raised.value).startswith(str(tmp_path / "a.csv"))
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600


def test_files_that_are_no_tables_are_refused(photos, as_tables, tmp_path):
    png = next(photos.rglob("*.png")).read_bytes()
    parquet = as_tables["a.csv"].with_name("paths.parquet").read_bytes()
    for name, content, message in [
        ("a.csv", "image,label\ncafé.png,a\n".encode("latin-1"), r"no text in UTF-8: byte 0xe9 in line 2\. Save it as"),
        ("a.csv", "image,label\n".encode("utf-16"), r"is text in UTF-16; save it as UTF-8"),
        ("a.csv", b"image,label\n\0", r"is no text: it has a byte 0"),
        ("a.csv", png, r"is no text"),
        ("a.csv", b"PK\3\4...", r"is an archive or a spreadsheet, not a text; export it"),
        ("a.xlsx", b"PK\3\4...", r"a\.xlsx is no table; expected \.csv, .*A spreadsheet is exported as 'CSV UTF-8'"),
        ("a.npz", b"", r"a\.npz is no table; expected \.csv, \.tsv, \.parquet or \.jsonl\.$"),
        ("a.parquet", png, r"cannot be read as a table: .*magic bytes"),
        ("a.parquet", b"", r"cannot be read as a table: .*size is 0 bytes"),
        ("a.parquet", parquet[:400] + bytes(200) + parquet[600:], r"cannot be read as a table: "),
        ("a.jsonl", b'[{"image": "a"}]', r'is no JSON lines; expected an object in each line: \{"image"'),
        ("a.jsonl", b'{"image": "a"\n', r"cannot be read as a table: JSON parse error"),
        ("a.jsonl", b'{"image": "a", "label": 1}\n{"image": "a", "label": "x"}', r"JSON parse error.*changed from"),
        ("a.jsonl", b'{"image": {"a": 1}, "label": "x"}', r"column 'image' has values of type struct.*expected texts"),
    ]:  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message) as raised:
            table("train", path=str(tmp_path / name), data_dir=str(photos))
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"^data\.path: \S+ is no file; expected a table: \.csv"):
        table("train", path=str(tmp_path / "no.csv"))
    with pytest.raises(UserError, match=r"^data\.path: \S+ is no file; expected a table"):
        table("train", path=str(tmp_path))


def test_options_that_do_not_fit_the_table_are_refused(photos, as_tables, tmp_path):
    path = str(as_tables["a.csv"])
    for options, message in [
        ({"label_column": "lable"}, r"has no column 'lable'; did you mean 'label'\? There are: image, label"),
        ({"image_column": "x"}, r"has no column 'x'; there are: image, label"),
        ({"split_column": "x"}, r"has no column 'x'; there are: image, label"),
        ({"label_column": ()}, r"data\.label_column must name a column or more, got \(\)"),
        ({"label_column": ("label",)}, r"columns of classes must be 0 or 1, got 'cat' in row 2 of 'label'; labels as"),
        ({"label_separator": ""}, r"data\.label_separator divides the labels .* got ''"),
        ({"label_column": ("label",), "label_separator": "|"}, r"data\.label_separator .* got columns of 0 and 1"),
        ({"data_dir": "/nowhere"}, r"^data\.data_dir: /nowhere is no directory; expected images there"),
        ({"val_fraction": 1.0}, r"data\.val_fraction must be in \(0, 1\), got 1\.0"),
        ({"val_fraction": 1e-9}, r"a\.csv: no image is of split 'val' by .*; take 0\.\d+, or add a column of splits\."),
        ({"group_by": "image("}, r"data\.group_by must be folder:N, .* of a table the name of a column, got 'image\('"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            table("val", path=path, **options)
    with pytest.raises(
        UserError, match=r"unknown split of a table without a column of splits 'test'; there are: all, t"
    ):
        table("test", path=path)
    pq.write_table(pa.table({"image": [b"", None], "label": ["a", "b"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: row 2 has no image in column 'image'\."):
        table("all", path=str(tmp_path / "a.parquet"))
    with pytest.raises(
        UserError, match=r"data\.group_by=folder:1: the images in \S+ have no names; give a column of gro"
    ):
        table("all", path=str(tmp_path / "a.parquet"), group_by="folder:1")


def test_a_large_table_takes_seconds(tmp_path):
    """100,000 rows of two folders: their folders are listed, and not each file asked for."""
    for place in "ab":
        (tmp_path / place).mkdir()
    for i in range(2000):
        (tmp_path / "ab"[i % 2] / f"{i}.jpg").touch()
    names = [f"{'ab'[i % 2]}/{i % 2000}.jpg" for i in range(100_000)]
    path = write_csv(tmp_path / "a.csv", ("image", "label"), [(name, name[0]) for name in names])
    calls = []
    real = os.scandir
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", lambda place: calls.append(place) or real(place))
        rows = table("train", path=str(path))
    assert [Path(place).name for place in calls] == ["a", "b"]
    assert len(rows) + len(table("val", path=str(path))) == 2000
    assert len(rows.unread) == 98_000


def test_what_a_user_names_is_a_folder_or_a_table(photos, as_tables, tmp_path):
    (tmp_path / "photos.csv").mkdir()
    for path, source in [
        (photos, Files),
        (as_tables["a.csv"], Rows),
        (as_tables["structs.parquet"], Rows),
    ]:
        keys = data.source_at(str(path))
        assert isinstance(data.SOURCES[keys.pop("source")]("all", **keys), source)
    assert data.source_at(str(tmp_path / "photos.csv"))["source"] == "folder"
    assert data.source_at(str(tmp_path / "no.csv"))["source"] == "table"
    assert data.source_at(str(tmp_path / "no"))["source"] == "folder"
    assert re.search(r"\.csv", " ".join(columns.SUFFIXES))
