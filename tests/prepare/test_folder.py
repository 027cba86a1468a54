"""A folder of images becomes a data set with the same splits, and training reads it."""

import errno
import fcntl
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python import array_record_module

from preparing import SYNSETS, contents, fail, run
from xception_flax.commands import prepare
from xception_flax.data import sources
from xception_flax.prepare import folder as prepared
from xception_flax.prepare import records
from xception_flax.text.errors import UserError


def read_all(data_dir: Path, split: str) -> dict[str, tuple[int, bytes]]:
    source = sources.tfds.tfds(split, data_dir=str(data_dir / "my_photos" / "1.0.0"))
    return {
        example["name"].split(" ")[-1]: (example["label"], example["image"])
        for example in map(source.__getitem__, range(len(source)))
    }


def test_a_folder_has_the_splits_that_training_on_it_has(folder, tmp_path):
    """The same images, labels, classes and splits as our source 'folder', which a hash of the names decides."""
    run("folder", folder, "--data-dir", tmp_path, "--val-fraction", "0.3")
    for split in ("train", "val"):
        expected = sources.folder.folder(split, data_dir=str(folder), val_fraction=0.3)
        found = read_all(tmp_path, split)
        assert found == {
            Path(example["name"]).relative_to(folder).as_posix(): (example["label"], example["image"])
            for example in map(expected.__getitem__, range(len(expected)))
        }
        assert len(found) == {"train": 32, "val": 8}[split]
        prepared = sources.tfds.tfds(split, name="my_photos", data_dir=str(tmp_path))
        assert prepared.class_names == expected.class_names == tuple(sorted(SYNSETS))


def test_a_folder_that_is_split_stays_so(folder, tmp_path):
    for split, count in (("train", 5), ("val", 3), ("test", 2)):
        for synset in SYNSETS:
            (folder / split / synset).mkdir(parents=True)
            for path in sorted((folder / synset).iterdir())[:count]:
                path.rename(folder / split / synset / path.name)
    for synset in SYNSETS:
        (folder / synset).rmdir()
    run("folder", folder, "--data-dir", tmp_path)
    for split, count in (("train", 20), ("val", 12), ("test", 8)):
        files = [path.relative_to(folder).as_posix() for path in (folder / split).rglob("*.jpg")]
        assert len(files) == count
        assert read_all(tmp_path, split).keys() == set(files)


def test_mistakes_with_a_folder(folder, tmp_path, capsys, monkeypatch):
    def message(*arguments):
        return fail(capsys, monkeypatch, "folder", *arguments, "--data-dir", tmp_path / "out")

    assert "nowhere is no directory; expected the folders CLASS/*.jpg" in message(tmp_path / "nowhere")
    assert "--name must be of small letters" in message(folder, "--name", "My Photos")
    assert "--val-fraction: must be between 0 and 1, got '2'" in message(folder, "--val-fraction", "2")
    assert "no image is of split 'val' by the hash of its name" in message(folder, "--val-fraction", "1e-9")
    assert "no_command" in fail(capsys, monkeypatch, "no_command")
    (folder / "n01440764" / "thumbs").mkdir()
    for command in (["folder", folder, "--data-dir", tmp_path / "out"], ["check", folder]):
        expected = r"images in n01440764, n01739381, n02105855, n15075141, and a folder in n01440764 \(thumbs\)"
        assert re.search(expected, fail(capsys, monkeypatch, *command))
    (folder / "n01440764" / "thumbs").rmdir()
    broken = folder / "n01440764" / "z.jpg"
    broken.symlink_to("nothing")
    for command in (["folder", folder, "--data-dir", tmp_path / "out"], ["check", folder]):
        assert "z.jpg is a link to nothing, which is not there" in fail(capsys, monkeypatch, *command)
    broken.unlink()
    for name in ("cat ", "c\rat"):
        (folder / "n01440764").rename(folder / name)
        assert f"TFDS reads no class {name!r}; rename the folder, without white space" in message(folder)
        (folder / name).rename(folder / "n01440764")
    large = folder / "n01440764" / "large.jpg"  # a sparse file
    large.touch()
    os.truncate(large, 2**29 + 1)
    assert "large.jpg has 536,870,913 bytes; that is no image" in message(folder)
    os.truncate(large, 2**29)
    # Twice the free space and 32 GB: too much even if another process makes room meanwhile.
    holes = [large, *(large.with_name(f"{i}.jpg") for i in range(shutil.disk_usage(tmp_path).free // 2**28 + 64))]
    for hole in holes[1:]:
        hole.touch()
        os.truncate(hole, 2**29)
    assert re.search(r"has room for [\d.,]+ GB, and [\d.,]+ GB are needed; make room", message(folder))
    for hole in holes:
        hole.unlink()
    (folder / "n01440764" / os.fsdecode(b"\xff.jpg")).write_bytes(b"")
    assert re.search(r"error: .*\\xff\.jpg: TFDS takes no file name that is not UTF-8; rename it", message(folder))
    (folder / "n01440764" / os.fsdecode(b"\xff.jpg")).unlink()

    # The images changed after it was begun.
    (tmp_path / "out" / "my_photos" / "1.0.0.incomplete" / records.PREPARED).write_text("{}")
    assert "was begun with other images, or they have changed since; remove it" in message(folder)
    photo = next((folder / "n01440764").iterdir()).read_bytes()
    for split in ("train", "val"):
        (tmp_path / "split" / split / f"only_{split}").mkdir(parents=True)
        (tmp_path / "split" / split / f"only_{split}" / "a.jpg").write_bytes(photo)
    (tmp_path / "nested" / "cat" / "more").mkdir(parents=True)
    (tmp_path / "nested" / "cat" / "more" / "a.jpg").write_bytes(photo)
    for command in (["folder", tmp_path / "nested", "--data-dir", tmp_path / "out"], ["check", tmp_path / "nested"]):
        assert "there are folders in cat, none of which is called train" in fail(capsys, monkeypatch, *command)
    (tmp_path / "one" / "cat").mkdir(parents=True)
    for i in range(40):
        (tmp_path / "one" / "cat" / f"{i}.jpg").write_bytes(photo)
    assert "one has one class only, 'cat'; expected two or more" in message(tmp_path / "one")
    expected = "train and val must have the same classes; only in one: only_train, only_val"
    assert expected in message(tmp_path / "split")
    assert expected in fail(capsys, monkeypatch, "check", tmp_path / "split")
    assert "leave out --val-fraction" in message(tmp_path / "split", "--val-fraction", "0.5")
    for name in ("my val", "all"):
        (tmp_path / "split" / "val").rename(tmp_path / "split" / name)
        assert f"TFDS reads no split '{name}'; rename the folder" in message(tmp_path / "split")
        (tmp_path / "split" / name).rename(tmp_path / "split" / "val")


@pytest.mark.parametrize("name", ["my_photos", "food101"])
def test_training_reads_it_by_the_name_that_is_printed(folder, tmp_path, capsys, name):
    """Also if TFDS has a data set of that name itself, which it takes if no version is given."""
    run("folder", folder, "--data-dir", tmp_path / "tfds", "--name", name)
    options = dict(re.findall(r"--config\.data\.(\w+)=(\S+)", capsys.readouterr().out))
    assert options == {"source": "tfds", "name": f"{name}:1.0.0", "data_dir": str(tmp_path / "tfds")}
    del options["source"]
    assert sum(len(sources.tfds.tfds(split, **options)) for split in ("train", "val")) == 40
    assert sources.tfds.tfds("train+val", **options).class_names == tuple(sorted(SYNSETS))


def test_without_locks_it_is_prepared_too(folder, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    run("folder", folder, "--data-dir", tmp_path)
    assert len(read_all(tmp_path, "train")) + len(read_all(tmp_path, "val")) == 40


def test_names_are_prepared_in_one_form(folder, tmp_path):
    """A copy made by macOS gives the same records. A name in both of Unicode's forms is refused as there twice."""
    (folder / "n01440764").rename(folder / "caf\xe9")
    shutil.copytree(folder, copy := tmp_path / "copy")
    (copy / "caf\xe9").rename(copy / "cafe\u0301")
    run("folder", folder, "--data-dir", tmp_path / "a", "--name", "same")
    run("folder", copy, "--data-dir", tmp_path / "b", "--name", "same")
    one, other = (contents(tmp_path / place / "same" / "1.0.0") for place in "ab")
    assert {name for name in one if one[name] != other[name]} == {records.PREPARED}
    for name in ("\xe4.jpg", "a\u0308.jpg"):
        (folder / "caf\xe9" / name).write_bytes(b"")
    with pytest.raises(
        UserError, match=r"caf\xe9/\xe4\.jpg is there twice in split '(train|val)'; each image needs its own"
    ):
        prepare.main(["folder", str(folder), "--data-dir", str(tmp_path / "c")])


def as_table(folder: Path, *, content: bool) -> Path:
    """The folder's images in its order as Parquet, by their paths or with them in it."""
    files = sources.folder.folder("all", data_dir=str(folder))
    names = [Path(path).relative_to(folder).as_posix() for path in files.paths]
    columns = {"path": names, "label": [files.class_names[label] for label in files.labels]}
    if content:
        columns["image"] = [Path(path).read_bytes() for path in files.paths]
    pq.write_table(pa.table(columns), folder / "my_photos.parquet", row_group_size=11)
    return folder / "my_photos.parquet"


@pytest.mark.parametrize("content", [False, True])
def test_a_table_becomes_the_records_of_its_folder(folder, tmp_path, content, capsys):
    """Byte for byte; only what they were made from differs."""
    run("folder", folder, "--data-dir", tmp_path / "a", "--val-fraction", "0.3")
    path = as_table(folder, content=content)
    run("folder", path, "--data-dir", tmp_path / "b", "--config.data.val_fraction=0.3")
    one, other = (contents(tmp_path / place / "my_photos" / "1.0.0") for place in "ab")
    assert {name for name in one | other if one.get(name) != other.get(name)} == {records.PREPARED}
    capsys.readouterr()
    run("folder", path, "--data-dir", tmp_path / "b", "--config.data.val_fraction=0.3")
    assert "is prepared; nothing to do" in capsys.readouterr().out


def test_a_table_with_splits_and_several_labels(folder, tmp_path, capsys, monkeypatch):
    """The lengths that were computed are those of the records, also of images of no class and of one above 127."""
    names = [
        Path(path).relative_to(folder).as_posix() for path in sources.folder.folder("all", data_dir=str(folder)).paths
    ]
    tags = [" ".join(f"t{n:03}" for n in ((), (0,), (200, 1), tuple(range(120, 140)))[i % 4]) for i in range(40)]
    tags[0] = " ".join(f"t{n:03}" for n in range(201))  # every class
    rows = [
        f"{name},{tag},{('train', 'test')[i % 5 == 4]}" for i, (name, tag) in enumerate(zip(names, tags, strict=True))
    ]
    table = tmp_path / "Labels.csv"
    table.write_text("\n".join(["image,tags,split", *rows]))
    options = ["--config.data.label_separator=' '", f"--config.data.data_dir={folder}"]
    run("folder", table, "--data-dir", tmp_path / "tfds", *options)
    assert re.search(r"test +8 images\n +train +32 images\n +classes +201", capsys.readouterr().out)
    expected = sources.table.table("train", path=str(table), data_dir=str(folder), label_separator=" ")
    found = sources.tfds.tfds("train", data_dir=str(tmp_path / "tfds" / "labels" / "1.0.0"))
    assert found.class_names == expected.class_names == tuple(f"t{n:03}" for n in range(201))
    by_name = {example["name"]: example for example in map(expected.__getitem__, range(32))}
    for example in map(found.__getitem__, range(32)):
        other = by_name[str(folder / example["name"].split(" ")[-1])]
        assert example["image"] == other["image"]
        np.testing.assert_array_equal(example["label"], other["label"])
    images = prepared.list_images(table, {"train": expected}, str(folder))["train"]
    reader = array_record_module.ArrayRecordReader(str(next((tmp_path / "tfds" / "labels" / "1.0.0").glob("*train*"))))
    assert sorted(len(record) for record in reader.read_all()) == sorted(image.num_bytes for image in images)
    run("check", tmp_path / "tfds" / "labels" / "1.0.0")
    for arguments, message in [
        (["--val-fraction", "0.2"], r"has a column of splits \(test, train\) already; leave out --val-fraction"),
        (["--config.data.path=x"], r"given twice, by \S+Labels\.csv and by --config\.data\.path; give one"),
        (["--config.data.val_split=x"], r"unknown recipe key 'data\.val_split'"),
        (["--config.model.name=lenet"], r"--config\.model\.name cannot be changed here; only keys of: data"),
        (["--data"], r"unknown (argument|option) '--data'"),
    ]:
        for command in (["folder", "--data-dir", tmp_path / "x"], ["check"]):
            assert re.search(message, fail(capsys, monkeypatch, command[0], table, *command[1:], *options, *arguments))
    assert "--x; --help shows" in fail(
        capsys, monkeypatch, "imagenet", "--tars", tmp_path, "--data-dir", tmp_path, "--x"
    )
