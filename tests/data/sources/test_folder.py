"""Folders of images: their layouts, their splits, and what in them is not read."""

import dataclasses
import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import PIL.Image
import pytest

from xception_flax import data
from xception_flax.data import decoding, sources
from xception_flax.text.errors import UserError


def test_mistakes_in_a_folder_are_refused(prepared, tmp_path):
    root = prepared["folder"]["data_dir"]
    with pytest.raises(UserError, match=r"no folder for split 'val'; there are: test, train"):
        sources.folder.folder("val", data_dir=root)
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=r"has no folders of classes in it; expected .*train/CLASS"):
        sources.folder.folder("train", data_dir=str(tmp_path))
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(UserError, match="cat has no image"):
        sources.folder.folder("train", data_dir=str(tmp_path))


def test_a_folder_of_classes_alone_is_split_by_names(tmp_path):
    """By SHA-256 of the file's name. Other files, the class and the folder do not matter."""

    def split(root, name, **options):
        files = sources.folder.folder(name, data_dir=str(root), **options)
        assert files.class_names == ("cat", "dog")
        return [(Path(path).name, label) for path, label in zip(files.paths, files.labels, strict=True)]

    for i in range(40):
        path = tmp_path / "a" / ("cat", "dog")[i % 2] / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "a" / ".hidden").mkdir()
    (tmp_path / "a" / "cat" / ".hidden.jpg").touch()
    train, val = split(tmp_path / "a", "train"), split(tmp_path / "a", "val")
    below = [f"{i:02}.jpg" for i in range(40) if hashlib.sha256(f"{i:02}.jpg".encode()).hexdigest() < "19" + 62 * "9"]
    assert sorted(val) == sorted((name, int(name[:2]) % 2) for name in below)  # 0x19.99... of 0x100 is a tenth
    assert 0 < len(val) < 10
    assert sorted(train + val) == [(f"{i:02}.jpg", i % 2) for i in range(40)]
    half = split(tmp_path / "a", "val", val_fraction=0.5)
    assert set(val) < set(half)
    assert 12 <= len(half) <= 28

    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "cat" / "00.jpg").rename(tmp_path / "b" / "dog" / "00.jpg")
    (tmp_path / "b" / "cat" / "new.jpg").touch()
    old = {name for name, _ in split(tmp_path / "b", "val")} - {"new.jpg"}
    assert old == {name for name, _ in val}


def test_all_images_of_a_folder_of_classes(tmp_path):
    """Both splits together, those below too; not of a folder of splits."""
    for name in ("cat/a.jpg", "cat/more/b.jpg", "dog/c.jpg"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).touch()
    found = sources.folder.folder("all", data_dir=str(tmp_path / "photos"))
    assert [Path(path).name for path in found.paths] == ["a.jpg", "b.jpg", "c.jpg"]
    assert (found.labels, found.class_names) == ((0, 0, 1), ("cat", "dog"))
    (tmp_path / "photos").rename(tmp_path / "train")
    with pytest.raises(UserError, match="has folders of splits, train; expected the folders CLASS"):
        sources.folder.folder("all", data_dir=str(tmp_path))
    (tmp_path / "train").rename(tmp_path / "all")
    assert sources.folder.folder("all", data_dir=str(tmp_path)).split == "all"  # a folder of this name is that split


def test_mistakes_in_a_folder_of_classes_are_refused(tmp_path):
    for path in ("cat/a.jpg", "dog/b.jpg"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).touch()

    def load(split, **options):
        sources.folder.folder(split, data_dir=str(tmp_path), **options)

    with pytest.raises(UserError, match=r"unknown split of a folder of classes 'test'; there are: all, train, val"):
        load("test")
    with pytest.raises(UserError, match=r"data\.val_fraction must be in \(0, 1\), got 1\.0\."):
        load("train", val_fraction=1.0)
    with pytest.raises(
        UserError, match=r"cat: by its name the only image is of split 'val' \(data\.val_fraction=0\.999\); no fraction"
    ):
        load("train", val_fraction=0.999)
    with pytest.raises(UserError, match=r"no image is of split 'val' by the hash of its name.*folders train/CLASS and"):
        load("val", val_fraction=0.001)
    (tmp_path / "cat" / "c.jpg").touch()
    least = min(hashlib.sha256(name.encode()).hexdigest() for name in ("a.jpg", "b.jpg", "c.jpg"))
    fraction = (int(least[:8], 16) * 1000 // 2**32 + 1) / 1000  # the next thousandth: one image is of 'val'
    with pytest.raises(
        UserError, match=rf"\(data\.val_fraction=0\.001\); take {fraction}, or make folders train/CLASS"
    ):
        load("val", val_fraction=0.001)
    for split in ("train", "val"):
        load(split, val_fraction=fraction)
    (tmp_path / "bird").mkdir()
    with pytest.raises(UserError, match=r"bird has no image"):
        load("train")
    (tmp_path / "bird" / "more").mkdir()  # neither one layout nor the other
    for split in ("cat", "dog", "train"):
        with pytest.raises(
            UserError, match=r"images in cat, dog, and a folder in bird \(more\); expected either CLASS"
        ):
            load(split)


def test_a_folder_in_a_class_is_named(tmp_path):
    for path in ("cat/a.jpg", "dog/b.jpg", "cat/c.jpg/d.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    for call in (sources.folder.folder_splits, lambda data_dir: sources.folder.folder("train", data_dir=data_dir)):
        with pytest.raises(UserError, match=r"images in cat, dog, and a folder in cat \(c\.jpg\); expected either"):
            call(str(tmp_path))
    for i in range(9):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}" / "a.jpg").touch()
    with pytest.raises(UserError, match=r"images in 0, 1, 2, 3, 4 and 6 more, and a folder in cat"):
        sources.folder.folder_splits(str(tmp_path))


def test_links_to_images_are_followed_and_broken_ones_named(tmp_path):
    for path in ("train/cat/a.jpg", "elsewhere"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "train" / "cat" / "b.jpg").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "cat" / ".#a.jpg").symlink_to("an editor's lock")
    (tmp_path / "train" / "cat" / "d.jpg").mkdir()
    paths = sources.folder.folder("train", data_dir=str(tmp_path)).paths
    assert [Path(path).name for path in paths] == ["a.jpg", "b.jpg"]
    (tmp_path / "elsewhere").unlink()
    with pytest.raises(UserError, match=r"cat/b\.jpg is a link to .*elsewhere, which is not there; remove or mend it"):
        sources.folder.folder("train", data_dir=str(tmp_path))


def touch(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).touch()
    return directory


def test_every_suffix_of_what_decodes_is_read(tmp_path):
    """Pillow's own list for these formats, also in capitals, except .pfm, which has 32 bits."""
    PIL.Image.init()
    formats = {"JPEG", *decoding.FORMATS}
    suffixes = {suffix for suffix, form in PIL.Image.registered_extensions().items() if form in formats} - {".pfm"}
    assert {".jpe", ".jfif", ".ppm", ".apng"} <= suffixes <= set(sources.folder.IMAGE_SUFFIXES)
    touch(tmp_path, *(f"train/cat/{i}{s}" for i, s in enumerate([*suffixes, *map(str.upper, suffixes)])))
    files = sources.folder.folder("train", data_dir=str(tmp_path))
    assert (len(files), files.unread) == (2 * len(suffixes), ())


def test_what_is_not_read_is_counted_and_named(tmp_path):
    touch(tmp_path, *(f"{name}/{i}.jpg" for name in ("cat", "dog") for i in range(20)))
    touch(tmp_path, *(f"cat/{i}.psd" for i in range(9)), "dog/a.XCF", "dog/b.xcf", "dog/label", "about.txt")
    touch(tmp_path, "stray.png", "cat/.b.jpg", ".cache/cat/c.png")
    touch(tmp_path, ".DS_Store", "cat/._0.jpg", "cat/Thumbs.db", ".git/config", "dog/desktop.ini")  # not reported
    touch(tmp_path, "__MACOSX/cat/._0.jpg", "lost+found/0")
    (tmp_path / "cat" / ".all").symlink_to(tmp_path / "dog")
    os.mkfifo(tmp_path / "cat" / "pipe.jpg")
    train, val = (sources.folder.folder(split, data_dir=str(tmp_path), val_fraction=0.5) for split in ("train", "val"))
    assert len(train) + len(val) == 40
    assert train.unread == val.unread
    expected = (
        "17 of 57 files are not read: 9 .psd (cat/0.psd), 2 hidden (cat/.b.jpg), 2 .xcf (dog/a.XCF), 1 no regular "
        f"file (cat/pipe.jpg), 1 without a suffix (dog/label), 1 .txt ({tmp_path.name}/about.txt), 1 outside of a "
        f"class ({tmp_path.name}/stray.png)."
    )
    assert data.unread_of([train, val]) == data.unread_of([val, train]) == expected
    assert data.unread_of([sources.digits.digits("train")]) == ""
    of_one = "17 files are not read: 9 .psd (cat/0.psd), 2 hidden"  # one split does not know the total
    assert data.unread_of([val], whole=False).startswith(of_one)
    assert sources.folder.describe_unread(train.unread[:1], None) == "1 file is not read: 1 hidden (cat/.b.jpg)."
    assert pickle.loads(pickle.dumps(train)) == dataclasses.replace(train, unread=())  # as workers get it
    touch(tmp_path, "cat/@eaDir/0.jpg/small.jpg")  # a NAS of Synology
    assert "3 hidden" in data.unread_of([sources.folder.folder("train", data_dir=str(tmp_path))])
    shutil.rmtree(tmp_path / "cat" / "@eaDir")
    touch(tmp_path, *(f"cat/a.{kind}" for kind in ("b", "c", "d")))
    assert data.unread_of([sources.folder.folder("train", data_dir=str(tmp_path)), val]).endswith(", 2 of other kinds.")

    for name in ("cat", "dog"):
        for path in (tmp_path / name).glob("*.jpg"):
            path.unlink()
    with pytest.raises(
        UserError, match=r"neither CLASS/\*\.jpg nor train/.* \.pnm.*\. 18 of 18 files are not .*9 \.psd"
    ):
        sources.folder.folder("train", data_dir=str(tmp_path))
    touch(tmp_path, "dog/0.jpg")
    with pytest.raises(UserError, match=r"cat has no image .*its folder must go\. 12 of 12 files are not .*9 \.psd"):
        sources.folder.folder("train", data_dir=str(tmp_path))


def test_names_that_break_lines_are_spelled():
    unread = [
        sources.folder.Unread("cat/a\n.jpg\n", ".jpg\n"),
        sources.folder.Unread(os.fsdecode(b"cat/\xe9.txt"), ".txt"),
    ]
    expected = r"2 of 5 files are not read: 1 .jpg\n (cat/a\n.jpg\n), 1 .txt (cat/\xe9.txt)."
    assert sources.folder.describe_unread(unread, 3) == expected


def test_an_example_is_made_of_shown_kinds_only(monkeypatch):
    """With a million other files beside the images, this would take seconds at each start."""
    taken = []
    monkeypatch.setattr(sources.folder, "Path", lambda path: taken.append(path) or Path(path))
    unread = [sources.folder.Unread(f"cat/{i}.{i % 20}", f".{i % 20}") for i in range(2000)]
    assert sources.folder.describe_unread(unread, 0).endswith("100 .7 (cat/7.7), 1,200 of other kinds.")
    assert taken == [f"cat/{i}.{i}" for i in range(8)]


def test_splits_that_are_not_used_are_named(tmp_path):
    """They are folders of images that look like splits, but may be something else."""
    touch(tmp_path, *(f"{split}/{c}/{c}.jpg" for split in ("train", "val", "test") for c in ("cat", "dog")))
    touch(tmp_path, "docs/img/fig.png", "unlabelled/part1/a.jpg", "notes/1/a.md")
    splits = [sources.folder.folder(split, data_dir=str(tmp_path)) for split in ("train", "val")]
    others = "Other splits there, which are not used: docs, test, unlabelled."
    assert data.unread_of(splits) == f"1 of 5 files is not read: 1 .md (1/a.md). {others}"
    assert data.unread_of(splits[1:], whole=False) == "1 file is not read: 1 .md (1/a.md)."
    (tmp_path / "notes" / "1" / "a.md").unlink()
    assert (
        data.unread_of([sources.folder.folder(split, data_dir=str(tmp_path)) for split in ("train", "val")]) == others
    )
    every = [
        sources.folder.folder(split, data_dir=str(tmp_path)) for split in sources.folder.folder_splits(str(tmp_path))
    ]
    assert data.unread_of(every) == ""
    touch(tmp_path, *(f"{i}/a/a.jpg" for i in range(9)))
    said = data.unread_of([sources.folder.folder("train", data_dir=str(tmp_path))])
    assert said == "Other splits there, which are not used: 0, 1, 2, 3, 4, 5, 6, 7 and 5 more."


def test_a_folder_without_classes_beside_splits_is_not_read(tmp_path):
    """Such as test images without labels, as in competitions, and any other files."""
    touch(tmp_path, "train/cat/a.jpg", "train/dog/b.jpg", "val/cat/c.jpg", "val/dog/d.jpg")
    touch(tmp_path, "test/e.jpg", "test/f.jpg", "notes/1/g.xml", "val/h.jpg")
    assert sources.folder.folder_splits(str(tmp_path)) == ("train", "val")
    splits = [sources.folder.folder(split, data_dir=str(tmp_path)) for split in ("train", "val")]
    assert [len(split) for split in splits] == [2, 2]
    expected = "4 of 8 files are not read: 3 outside of a class (test/e.jpg), 1 .xml (1/g.xml)."
    assert data.unread_of(splits) == expected
    with pytest.raises(UserError, match=r"test has images, and no folders that say of which class they are; expected"):
        sources.folder.folder("test", data_dir=str(tmp_path))
    touch(tmp_path, "train/i.jpg")  # a class called train, with a folder in it?
    for call in (sources.folder.folder_splits, lambda data_dir: sources.folder.folder("val", data_dir=data_dir)):
        with pytest.raises(UserError, match=r"images in train, and a folder in train \(cat\); expected either"):
            call(str(tmp_path))


def test_other_names_of_splits_are_read_where_they_are_asked_for(tmp_path):
    touch(tmp_path, "training/cat/a.jpg", "testing/cat/b.jpg")
    assert [len(sources.folder.folder(split, data_dir=str(tmp_path))) for split in ("training", "testing")] == [1, 1]
    with pytest.raises(UserError, match="folders in testing, training, none of which is called train"):
        sources.folder.folder("train", data_dir=str(tmp_path))


def test_a_copy_with_decomposed_names_is_the_same_data(tmp_path):
    """macOS and some archives write such names. Splits, order and classes are the same, and the files are opened."""
    for form in ("NFC", "NFD"):
        for name in ("café", "cafz", "zürich"):  # 'café' sorts before 'cafz' if decomposed, after it if composed
            names = [unicodedata.normalize(form, f"{name}/{'éa'[i % 2]}ö{i}.jpg") for i in range(30)]
            touch(tmp_path / form, *names)
    read = {form: sources.folder.folder("train", data_dir=str(tmp_path / form)) for form in ("NFC", "NFD")}
    assert read["NFC"].class_names == read["NFD"].class_names == ("cafz", "caf\xe9", "z\xfcrich")
    names = {form: [os.path.relpath(path, tmp_path / form) for path in files.paths] for form, files in read.items()}
    assert names["NFC"] != names["NFD"]
    assert names["NFC"] == [unicodedata.normalize("NFC", name) for name in names["NFD"]]
    assert 60 < len(read["NFC"]) < 90
    assert read["NFC"].labels == read["NFD"].labels
    assert read["NFD"][0]["image"] == b""
    composed = [int(hashlib.sha256(f"\xe9\xf6{i}.jpg".encode()).hexdigest()[:16], 16) / 2**64 for i in range(0, 30, 2)]
    of_cafz = [name for name in names["NFC"] if name.startswith("cafz/\xe9")]
    assert len(of_cafz) == sum(value >= 0.1 for value in composed)

    # The same under a locale in which Python reads the bytes of these names as surrogates.
    ascii_only = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONIOENCODING": "utf-8"}
    program = (
        "import os, sys\nfrom xception_flax.text import naming\nfrom xception_flax.data import sources\n"
        "assert sys.getfilesystemencoding() == 'ascii'\n"
        "for form in ('NFC', 'NFD'):\n"
        "    files = sources.folder.folder('train', data_dir=os.path.join(sys.argv[1], form))\n"
        "    print(files.class_names, [naming.canonical(os.path.relpath(p, files.paths[0])) for p in files.paths])\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    result = subprocess.run(command, env=os.environ | ascii_only, check=True, capture_output=True, encoding="utf-8")
    first = read["NFC"].paths[0]
    expected = f"{read['NFC'].class_names} {[os.path.relpath(path, first) for path in read['NFC'].paths]}"
    assert result.stdout.splitlines() == [expected, expected]

    touch(tmp_path / "split", "entrai\u0302nement/cat/a.jpg")
    assert len(sources.folder.folder("entra\xeenement", data_dir=str(tmp_path / "split"))) == 1
    assert sources.folder.folder_splits(str(tmp_path / "split"), "entra\xeenement") == ("entra\xeenement",)
    touch(tmp_path / "NFC", "cafe\u0301/a.jpg")
    with pytest.raises(UserError, match=r"two folders of the name caf\xe9, written 'cafe\\u0301' and 'caf\\xe9'; make"):
        sources.folder.folder("train", data_dir=str(tmp_path / "NFC"))


def test_linked_folders_are_read_and_none_twice(tmp_path):
    for path in ("photos/a/1.jpg", "photos/a/more/2.jpg", "photos/b/3.jpg", "elsewhere/deep/4.jpg"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "photos" / "a" / "more" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "photos" / "a")
    files = sources.folder.classes_in(tmp_path / "photos")
    found = [str(Path(path).relative_to(tmp_path / "photos")) for path in files.paths]
    assert found == ["a/1.jpg", "a/more/2.jpg", "a/more/linked/deep/4.jpg", "b/3.jpg"]
    assert files.labels == (0, 0, 0, 1)
