"""What a check of a data set or a folder finds."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import ExifTags, Image

from preparing import PATH, SYNSETS, fail, run
from xception_flax import data
from xception_flax.commands import prepare
from xception_flax.data import sources
from xception_flax.export import verifying
from xception_flax.text.errors import UserError


def test_check_of_imagenet(data_dir, images, tmp_path, capsys):
    directory = data_dir / PATH
    run("check", directory, "--json", tmp_path / "report.json")
    out = capsys.readouterr().out
    assert re.search(r"images +45\n +classes +1,000, with 0 to 12 images\n +without an image +996 classes", out)
    assert re.search(r"pixels +19,200 to 19,200, median 19,200", out)
    report = json.loads((tmp_path / "report.json").read_text())
    train = report["splits"]["train"]
    assert {name: count for name, count in train["classes"].items() if count} == {
        synset: sum(name.startswith(synset) for name in images["train"]) for synset in SYNSETS
    }
    sizes = sorted(len(content) for content in images["validation"].values())
    assert report["splits"]["validation"]["bytes"] == [sizes[0], sizes[5], sizes[10]]
    assert report["repeated"] == []
    assert train["undecodable"] == []


def test_check_finds_what_is_wrong(folder, tmp_path, capsys):
    """Files that cannot be decoded, and a file that is there twice: in the folder, and in the data set made of it."""
    files = sorted(folder.rglob("*.jpg"))
    copied, cut, garbage = files[0].read_bytes(), files[1], files[2]
    cut.write_bytes(cut.read_bytes()[:2000])
    garbage.write_bytes(b"garbage")
    (folder / "n15075141" / "copy.jpg").write_bytes(copied)
    run("folder", folder, "--data-dir", tmp_path / "tfds", "--val-fraction", "0.3")
    bad = {path.relative_to(folder).as_posix() for path in (cut, garbage)}
    same = {files[0].relative_to(folder).as_posix(), "n15075141/copy.jpg"}

    def short(name):
        return re.search(r"n\d{8}/\w+\.jpg$", name)[0]

    for dataset in (folder, tmp_path / "tfds" / "my_photos" / "1.0.0"):
        capsys.readouterr()
        assert prepare.main(["check", str(dataset), "--json", str(tmp_path / "report.json")]) == 1
        out = capsys.readouterr().out
        assert "2 images cannot be read or decoded" in out
        assert "1 file is there more than once" in out
        report = json.loads((tmp_path / "report.json").read_text())
        found = {name for split in report["splits"].values() for name in split["undecodable"]}
        assert {short(name) for name in found} == bad
        (names,) = report["repeated"]
        assert {short(name) for name in names} == same


def test_check_says_what_training_refuses(tmp_path, capsys, monkeypatch):
    """Of 20 images none is of 'val' by a fraction of 0.001; a folder 'val' without images is no split."""
    for i in range(20):
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    photos = tmp_path / "photos"
    for fraction, code in (("0.3", 0), ("0.001", 1)):
        assert prepare.main(["check", str(photos), "--val-fraction", fraction]) == code
        refused = re.findall(r"\ntraining refuses it: (.*)\n", capsys.readouterr().out)
        if code == 0:
            assert refused == []
        else:
            with pytest.raises(UserError) as raised:
                sources.folder.folder("val", data_dir=str(photos), val_fraction=0.001)
            assert refused == [str(raised.value)]
    photos.rename(tmp_path / "train")
    (tmp_path / "val").mkdir()
    for command in (["check", tmp_path], ["folder", tmp_path, "--name", "x", "--data-dir", tmp_path / "tfds"]):
        message = fail(capsys, monkeypatch, *command)
        assert message == f"error: {tmp_path}/val has no folders of classes in it; expected {tmp_path}/val/CLASS/*.jpg."
    (tmp_path / "val" / "a").mkdir()
    assert re.match(rf"error: {tmp_path}/val/a has no image", fail(capsys, monkeypatch, "check", tmp_path))


def test_check_looks_at_the_splits_that_training_has(folder, tmp_path, capsys, monkeypatch):
    """It finds copies of training images among those held out, in a folder as in the data set made of it."""
    for split in ("train", "val"):
        assert (
            len(sources.folder.folder(split, data_dir=str(folder), val_fraction=0.3)) == {"train": 32, "val": 8}[split]
        )
    held_out = sources.folder.folder("val", data_dir=str(folder), val_fraction=0.3).paths[:6]
    taken = 0
    for i in range(100):  # looks for names of copies that are in split train
        (copy := Path(held_out[taken]).with_name(f"copy{i}.jpg")).write_bytes(Path(held_out[taken]).read_bytes())
        if str(copy) in sources.folder.folder("val", data_dir=str(folder), val_fraction=0.3).paths:
            copy.unlink()
        elif (taken := taken + 1) == len(held_out):
            break
    paths = sources.folder.folder("train", data_dir=str(folder), val_fraction=0.3).paths[-5:]
    (folder / "again").mkdir()
    for path in paths:
        shutil.copy(path, folder / "again")  # under their own names they are in split train too
    run("folder", folder, "--data-dir", tmp_path / "tfds", "--val-fraction", "0.3")
    dataset = tmp_path / "tfds" / "my_photos" / "1.0.0"
    for arguments in ([folder, "--val-fraction", "0.3"], [dataset]):
        capsys.readouterr()
        run("check", *arguments)
        out = capsys.readouterr().out
        assert re.findall(r"(\w+)\n +images +(\d+)", out) == [("train", "43"), ("val", "8")]
        assert "11 files are there more than once, 6 of them in more than one split" in out
        shown = re.findall(r"^  (train|val): .* = (train|val): ", out, re.MULTILINE)
        assert [len(set(splits)) for splits in shown] == [2] * 6 + [1] * 4  # those in two splits first; ten of eleven
    message = fail(capsys, monkeypatch, "check", dataset, "--val-fraction", "0.3")
    assert message == f"error: {dataset} is a data set, which has its splits; leave out --val-fraction."


def test_what_is_prepared_and_checked_are_the_splits_of_training(images, tmp_path, capsys):
    """With groups and classes: 45 photographs, three of a group, in three classes."""
    for i, content in enumerate(images["train"].values()):
        path = tmp_path / "photos" / f"c{i % 3}" / f"clip{i // 3}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    photos = tmp_path / "photos"
    options = dict(val_fraction=0.2, group_by="folder:1", stratify=True)
    given = [f"--config.data.{key}={value}" for key, value in options.items()]
    run("folder", photos, "--data-dir", tmp_path / "tfds", *given)
    for split, number in (("train", 36), ("val", 9)):
        expected = sources.folder.folder(split, data_dir=str(photos), **options)
        found = sources.tfds.tfds(split, data_dir=str(tmp_path / "tfds" / "photos" / "1.0.0"))
        names = {example["name"].split(" ")[-1] for example in map(found.__getitem__, range(len(found)))}
        assert names == {Path(path).relative_to(photos).as_posix() for path in expected.paths}
        assert len(names) == number
    capsys.readouterr()
    run("check", photos, *given)
    assert "val\n" in (out := capsys.readouterr().out)
    assert "3, with 3 images each" in out


def test_what_is_not_read_is_said(folder, tmp_path, capsys):
    for name in ("a.psd", "b.psd", "c", ".DS_Store"):
        (folder / "n01440764" / name).write_bytes(b"")
    run("folder", folder, "--data-dir", tmp_path / "tfds")
    expected = "3 of 43 files are not read: 2 .psd (n01440764/a.psd), 1 without a suffix (n01440764/c)."
    assert f"{folder}: {expected}\n" in capsys.readouterr().err
    run("check", folder, "--json", tmp_path / "report.json")
    assert capsys.readouterr().out.endswith(f"\n\n{expected}\n")
    assert json.loads((tmp_path / "report.json").read_text())["unread"] == [
        {"path": str(folder / "n01440764" / name), "why": why}
        for name, why in (("a.psd", ".psd"), ("b.psd", ".psd"), ("c", "without a suffix"))
    ]
    run("check", tmp_path / "tfds" / "my_photos" / "1.0.0", "--json", tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["unread"] == []


def test_check_says_what_is_white_in_sixteen_bits(tmp_path, capsys):
    for i in range(20):
        (path := tmp_path / "ab"[i % 2] / f"{i}.png").parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), np.full((4, 4), i * 210, np.uint16))
    run("check", tmp_path)
    out = capsys.readouterr().out
    assert re.findall(r"16 bits +(\d+) images, of values up to (\S+)\n", out) == [("17", "3,990"), ("3", "1,680")]
    assert "\nno value in the upper half of 16 bits: train by --config.data.max_value=4095\n" in out
    cv2.imwrite(str(tmp_path / "b" / "19.png"), np.full((4, 4), 40_000, np.uint16))
    run("check", tmp_path, "--json", tmp_path / "report.json")
    out = capsys.readouterr().out
    assert "max_value" not in out
    assert "\n19 of 20 images of 16 bits have no value in the upper half; is white less than 65535 there?\n" in out
    wide = {
        name: split["sixteen_bits"]
        for name, split in json.loads((tmp_path / "report.json").read_text())["splits"].items()
    }
    assert wide == {
        "train": {"images": 17, "dark": 16, "largest": 40_000},
        "val": {"images": 3, "dark": 3, "largest": 1680},
    }


def test_check_sees_images_as_training_does(tmp_path, capsys, monkeypatch):
    """A photo that lies on its side and says so is the upright one of split val; one of 12 bits has its white."""
    photo = Image.fromarray(verifying.photos()[4])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned by 90 degrees clockwise
    for split, image, more in (
        ("train", photo.transpose(Image.Transpose.ROTATE_90), {"exif": exif}),
        ("val", photo, {}),
    ):
        (path := tmp_path / "photos" / split / "a" / "photo.jpg").parent.mkdir(parents=True)
        image.save(path, quality=95, **more)
    photos, report = tmp_path / "photos", tmp_path / "report.json"
    for orientation, number in (("ignore", 0), ("apply", 1)):
        run("check", photos, "--json", report, f"--config.data.orientation={orientation}")
        assert len(json.loads(report.read_text())["alike"]) == number
    cv2.imwrite(str(photos / "val" / "a" / "dark.png"), np.full((8, 8), 5000, np.uint16))
    for white, bad in (("5000", []), ("4095", ["dark.png"])):
        assert prepare.main(["check", str(photos), "--json", str(report), f"--config.data.max_value={white}"]) == len(
            bad
        )
        undecodable = json.loads(report.read_text())["splits"]["val"]["undecodable"]
        assert [Path(name).name for name in undecodable] == bad
    message = fail(capsys, monkeypatch, "check", photos, "--config.data.orientation=turn")
    assert message.startswith("error: unknown data.orientation 'turn'; ")
    for command, key, value in [
        (("check",), "channels", 1),
        (("check",), "min_decoded_side", 9),
        (("folder", "--data-dir", tmp_path), "orientation", "apply"),
    ]:
        message = fail(capsys, monkeypatch, *command, photos, f"--config.data.{key}={value}")
        assert message == f"error: data.{key} has no effect here, only in training; leave out --config.data.{key}."


def test_check_and_training_agree_on_a_folder(folder, tmp_path, capsys):
    """With images of no class beside the splits, both read the splits and report what is left out."""
    (folder / "train").mkdir()
    for place in list(folder.iterdir()):
        if place.name != "train":
            place.rename(folder / "train" / place.name)
    (folder / "test").mkdir()
    (folder / "test" / "1.jpg").write_bytes(b"")
    assert len(sources.folder.folder("train", data_dir=str(folder))) == 40
    run("check", folder)
    assert capsys.readouterr().out.endswith("\n1 of 41 files is not read: 1 outside of a class (test/1.jpg).\n")
    shutil.copytree(folder / "train" / "n01440764", folder / "test" / "n01440764")
    assert prepare.main(["check", str(folder)]) == 1
    out = capsys.readouterr().out
    assert re.findall(r"(\w+)\n +images +(\d+)\n +classes +(\d)", out) == [("test", "10", "1"), ("train", "40", "4")]
    assert out.endswith("\nother classes than training's: split test\n")


@pytest.mark.parametrize("damage", ["a bit flipped", "cut in half", "removed"])
def test_a_damaged_data_set_is_an_error_of_its_record(folder, tmp_path, capsys, damage):
    """`check` lists the records; training names one, and does not take it for a bad image."""
    run("folder", folder, "--data-dir", tmp_path)
    dataset = tmp_path / "my_photos" / "1.0.0"
    (shard,) = dataset.glob("*train*")
    content = bytearray(shard.read_bytes())
    if damage == "removed":
        shard.unlink()
    elif damage == "cut in half":
        shard.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    capsys.readouterr()
    assert prepare.main(["check", str(dataset), "--json", str(tmp_path / "report.json")]) == 1
    assert "cannot be read or decoded" in capsys.readouterr().out
    unread = json.loads((tmp_path / "report.json").read_text())["splits"]["train"]["undecodable"]
    assert unread
    assert all(name.startswith("record ") for name in unread)

    def read(num_workers):
        options = dict(data_dir=str(dataset), on_bad_image="replace", num_workers=num_workers)
        split = data.load("tfds", **options, train=True, batch_size=8, image_size=32, eval_split="val")
        with contextlib.closing(split.batches()) as batches:
            for _ in range(2 * split.num_batches):
                next(batches)

    for num_workers in (0, 1):
        with pytest.raises(data.InputError, match=r"record \d+ cannot be read: "):
            read(num_workers)


def test_check_takes_a_folder_under_any_name(folder, tmp_path, capsys, monkeypatch):
    (folder / ".hidden").mkdir()
    for place, name in ((folder / "n01440764", ".."), (folder, "."), (tmp_path, ".my photos")):
        if place == tmp_path:
            folder.rename(tmp_path / name)
        monkeypatch.chdir(place)
        run("check", name)
        found = re.findall(r"(\w+)\n +images +(\d+)\n +classes +4, with", capsys.readouterr().out)
        assert found == [("train", "38"), ("val", "2")]


def test_check_of_images_with_several_classes(images, tmp_path, capsys):
    class Several(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = tmp_path

        def _info(self):
            label = tfds.features.Sequence(tfds.features.ClassLabel(names=["cat", "dog", "fox"]))
            features = {"image": tfds.features.Image(), "label": label}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            contents = list(images["train"].values())
            for i, classes in enumerate([["cat", "dog"], ["dog"], []]):
                yield i, {"image": io.BytesIO(contents[i]), "label": classes}

    builder = Several(data_dir=tmp_path / "tfds", file_format="array_record")
    builder.download_and_prepare()
    run("check", builder.data_dir, "--json", tmp_path / "report.json")
    train = json.loads((tmp_path / "report.json").read_text())["splits"]["train"]
    assert (train["images"], train["classes"]) == (3, {"cat": 1, "dog": 2, "fox": 0})


def test_mistakes_with_check(tmp_path, capsys, monkeypatch):
    assert "nowhere is no directory" in fail(capsys, monkeypatch, "check", tmp_path / "nowhere")
    photos = tmp_path / "photos"
    (photos / "cat").mkdir(parents=True)
    assert "has no image" in fail(capsys, monkeypatch, "check", photos)
    (photos / "cat" / "a.jpg").write_bytes(b"")
    for path, expected in (
        (tmp_path / "no" / "report.json", "No such file or directory"),
        (photos, "Is a directory"),
        ("/proc/report.json", "No such file or directory"),
    ):
        message = fail(capsys, monkeypatch, "check", photos, "--json", path)
        assert message == f"error: {path} cannot be written: {expected}; name another file."
    assert prepare.main(["check", str(photos)]) == 1  # an empty file, and not one image
