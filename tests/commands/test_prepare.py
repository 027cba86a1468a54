"""Preparing data: the two tars of ImageNet, folders, what a check finds; training on prepared data."""

import contextlib
import errno
import fcntl
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from PIL import Image
from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder as tfds_imagenet
from tensorflow_datasets.proto import tf_example_pb2

import shell
import workdirs
from benchmarks import photos
from shell import ROOT, finish, wait_until
from xception_flax import data
from xception_flax.commands import evaluate, prepare
from xception_flax.data import sources
from xception_flax.prepare import imagenet, records

# Class numbers are the usual ones, by sorted synsets: tench, vine snake, Shetland sheepdog, toilet tissue. Those of the
# first validation images are from ILSVRC's own list.
SYNSETS = {"n15075141": 999, "n01440764": 0, "n02105855": 230, "n01739381": 59}
VALIDATION_LABELS = [65, 970, 230, 809, 516, 57, 334, 415, 674, 332, 109]
PATH = "imagenet2012/5.1.0"
CMYK, PNG = "n01739381_1309.JPEG", "n02105855_2933.JPEG"


def cmyk(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).convert("CMYK").save(file, "JPEG", quality=95)
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_tars(directory: Path, train: dict[str, bytes], validation: dict[str, bytes]) -> Path:
    """Writes tars in the published layout: a tar with one tar per synset, and a flat tar."""
    with tarfile.open(directory / "ILSVRC2012_img_train.tar", "w") as outer:
        for synset in dict.fromkeys(name.partition("_")[0] for name in train):
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode="w") as inner:
                for name in train:
                    if name.startswith(synset):
                        add(inner, name, train[name])
            add(outer, f"{synset}.tar", file.getvalue())
    with tarfile.open(directory / "ILSVRC2012_img_val.tar", "w") as tar:
        for name in reversed(validation):  # not in the order of the names
            add(tar, name, validation[name])
    return directory


@pytest.fixture(scope="module")
def images() -> dict[str, dict[str, bytes]]:
    """45 images for training, two of them a CMYK and a PNG under the names known for that; 11 for validation."""
    encoded = photos.jpegs(54, width=160, height=120, quality=90)
    names = [f"{synset}_{100 * i + 26}.JPEG" for i in range(11) for synset in SYNSETS]
    train = dict(zip(names[:43], encoded, strict=False))
    photo = photos.photo("chelsea.png")[:120, :160]
    train[CMYK] = cmyk(photo)
    train[PNG] = cv2.imencode(".png", cv2.cvtColor(photo, cv2.COLOR_RGB2BGR))[1].tobytes()
    numbered = enumerate(encoded[43:], start=1)
    return {"train": train, "validation": {f"ILSVRC2012_val_{i:08}.JPEG": image for i, image in numbered}}


@pytest.fixture(scope="module")
def tars(images, tmp_path_factory) -> Path:
    return write_tars(tmp_path_factory.mktemp("tars"), **images)


def run(*arguments: str | Path) -> None:
    assert prepare.main([*map(str, arguments)]) == 0


@pytest.fixture(scope="module")
def data_dir(tars, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tfds")
    run("imagenet", "--tars", tars, "--data-dir", directory, "--subset")
    return directory


def fail(capsys, monkeypatch, *arguments: str | Path) -> str:
    """The message of a command that ends with code 2."""
    code, _, err = shell.call(monkeypatch, capsys, prepare.main, *arguments)
    assert code == 2, err
    return err.splitlines()[-1]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# ImageNet ------------------------------------------------------------------------------------------


def label(name: str) -> int:
    number = re.fullmatch(r"ILSVRC2012_val_(\d+)\.JPEG", name)
    return VALIDATION_LABELS[int(number[1]) - 1] if number else SYNSETS[name.partition("_")[0]]


def test_tfds_reads_imagenet_byte_for_byte(data_dir, images):
    """By name, by directory, and by our own source, with only the two known files changed."""
    directory = data_dir / PATH
    skip = {"image": tfds.decode.SkipDecoding()}
    for split, expected in images.items():
        by_name = tfds.data_source("imagenet2012", data_dir=data_dir, split=split, decoders=skip, download=False)
        by_directory = tfds.builder_from_directory(directory).as_data_source(split, decoders=skip)
        ours = sources.tfds.tfds(split, name="imagenet2012", data_dir=str(data_dir))
        assert len(ours.class_names) == 1000
        assert len(by_name) == len(by_directory) == len(ours) == len(expected)
        found = {}
        for i in range(len(ours)):
            name = by_name[i]["file_name"].decode()
            found[name] = by_name[i]["image"]
            assert by_name[i]["label"] == label(name)
            assert by_directory[i] == by_name[i]
            assert ours[i] == {"image": found[name], "label": label(name), "name": f"record {i} {name}"}
        assert found.keys() == expected.keys()
        assert {name for name in found if found[name] != expected[name]} == ({CMYK, PNG} if split == "train" else set())


def test_the_known_files_become_rgb_jpegs(data_dir, images):
    """A JPEG of quality 100 keeps the PNG's pixels nearly, and those of the CMYK as RGB."""
    source = sources.tfds.tfds("train", name="imagenet2012", data_dir=str(data_dir))
    found = {
        example["name"].split(" ")[-1]: example["image"] for example in map(source.__getitem__, range(len(source)))
    }
    for name in (CMYK, PNG):
        repaired = Image.open(io.BytesIO(found[name]))
        assert (repaired.format, repaired.mode) == ("JPEG", "RGB")
        pixels = np.asarray(Image.open(io.BytesIO(images["train"][name])).convert("RGB"), float)
        assert np.abs(np.asarray(repaired, float) - pixels).mean() < 1.5
    assert len(tfds_imagenet.CMYK_IMAGES) == 22
    assert len(tfds_imagenet.PNG_IMAGES) == 1


def test_it_is_what_tfds_itself_writes(data_dir, tmp_path):
    """TFDS' own writer makes of the same images the same shards, with equal records in the same order.

    TFDS writes the fields of a record in any order, so records are compared and not their bytes.
    """

    class Imagenet2012(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("5.1.0")
        pkg_dir_path = tmp_path

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=imagenet.create_info(tmp_path).features)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in ("train", "validation")}

        def _generate_examples(self, split):
            source = sources.tfds.tfds(split, name="imagenet2012", data_dir=str(data_dir))
            for example in sorted((source[i] for i in range(len(source))), key=lambda example: example["name"]):
                image, name = io.BytesIO(example["image"]), example["name"].split(" ")[-1]
                yield name, {"image": image, "label": example["label"], "file_name": name}

    builder = Imagenet2012(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    ours, theirs = contents(data_dir / PATH), contents(Path(builder.data_dir))
    assert ours.keys() == theirs.keys() | {records.PREPARED}
    for name in ("features.json", "label.labels.txt"):
        assert ours[name] == theirs[name]
    shards = [name for name in ours if "array_record" in name]
    assert len(shards) == 2
    for name in shards:
        files = [ArrayRecordDataSource(str(Path(root) / name)) for root in (builder.data_dir, data_dir / PATH)]
        parsed = [[tf_example_pb2.Example.FromString(file[i]) for i in range(len(file))] for file in files]
        assert parsed[0] == parsed[1]
    described = [json.loads(files["dataset_info.json"]) for files in (ours, theirs)]
    assert described[0]["splits"] == described[1]["splits"]
    assert described[0]["fileFormat"] == "array_record"


@pytest.fixture(scope="module")
def large_tars(images, tmp_path_factory) -> Path:
    """Enough for five shards: photographs with 9 MB of zeros after their end, which decoders ignore."""
    names = list(images["train"])[:32]
    train = {name: images["train"][name] + bytes(9_000_000) for name in names}
    return write_tars(tmp_path_factory.mktemp("large"), train, images["validation"])


def test_killed_it_goes_on_and_ends_with_the_same_bytes(large_tars, tmp_path, capsys, monkeypatch):
    arguments = ["imagenet", "--tars", large_tars, "--subset", "--data-dir"]
    run(*arguments, tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    assert sum(".array_record-" in name for name in whole) == 5

    command = [sys.executable, "-m", "xception_flax", "prepare", *map(str, arguments), str(tmp_path / "killed")]
    process = subprocess.Popen([*command, "--num-threads", "1"], cwd=ROOT, stderr=subprocess.PIPE)
    incomplete = tmp_path / "killed" / "imagenet2012" / "5.1.0.incomplete"
    while not (shards := list(incomplete.glob("*-of-?????"))):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    # While it is stopped, another process is kept out, and nothing looks finished.
    process.send_signal(signal.SIGSTOP)
    assert "is being written by another process" in fail(capsys, monkeypatch, *arguments, tmp_path / "killed")
    with pytest.raises(ValueError, match="is not prepared"):
        sources.tfds.tfds("train", name="imagenet2012", data_dir=str(tmp_path / "killed"))
    process.kill()
    process.communicate()
    assert len(list(incomplete.glob("*-of-?????"))) < 5
    written = {path: path.stat().st_mtime_ns for path in shards}

    capsys.readouterr()
    run(*arguments, tmp_path / "killed", "--num-threads", "3")
    assert re.search(r"going on from shard [1-4] of 5", capsys.readouterr().err)
    assert contents(tmp_path / "killed") == whole
    for path, modified in written.items():  # not written again
        assert (incomplete.with_name("5.1.0") / path.name).stat().st_mtime_ns == modified
    run(*arguments, tmp_path / "killed")
    assert "is prepared; nothing to do" in capsys.readouterr().out


def test_a_write_that_fails_is_a_line(large_tars, tmp_path):
    """A limit on the size of files stands for a full disk: the kernel refuses to write the rest of a shard."""
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "from xception_flax.commands import cli, prepare; cli.run(prepare.main)"
    )
    arguments = ["imagenet", "--tars", large_tars, "--subset", "--data-dir", tmp_path]
    command = [sys.executable, "-c", program, *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    last = result.stderr.splitlines()[-1]
    assert re.match(r"error: .*5\.1\.0\.incomplete: .*File too large.*the same command goes on from there", last)
    assert not (tmp_path / "imagenet2012" / "5.1.0").exists()


def test_mistakes_with_imagenet(tars, images, data_dir, tmp_path, capsys, monkeypatch):
    def message(directory, *flags, to=tmp_path / "out"):
        return fail(capsys, monkeypatch, "imagenet", "--tars", directory, "--data-dir", to, *flags)

    (tmp_path / "none").mkdir()
    assert re.search(
        r"none has no ILSVRC2012_img_train\.tar and no ILSVRC2012_img_val\.tar", message(tmp_path / "none")
    )
    assert re.search(r"has [\d,]+ bytes, and 147,897,477,120 are published: .*--subset", message(tars))
    assert "--subset: not allowed with argument --hashes" in message(tars, "--hashes", "--subset")

    published = tmp_path / "published"  # sparse files of the published sizes
    published.mkdir()
    for tar in imagenet.TARS.values():
        (published / tar.name).touch()
        os.truncate(published / tar.name, tar.num_bytes)
    assert "ILSVRC2012_img_train.tar is damaged at byte 0, where neither a member" in message(published)
    for tar in imagenet.TARS.values():
        with tarfile.open(published / tar.name, "w"):
            pass
    assert "there is no image for split 'train'" in message(published, "--subset")

    other = write_tars(tmp_path, **images)
    train, validation = (other / tar.name for tar in imagenet.TARS.values())
    whole = validation.read_bytes()
    with tarfile.open(validation) as tar:
        third = tar.getmembers()[2].offset
    flipped = bytearray(whole)
    flipped[third + 20] ^= 1
    for content, expected in [
        (b"<html>sign in</html>" * 100, "is not a whole tar .*download it anew"),
        (b"", "is not a whole tar"),
        (whole[: len(whole) // 2], "is not a whole tar"),
        (bytes(flipped), rf"is damaged at byte {third:,}, where neither a member nor the end of a tar is; download"),
        (whole[:third], rf"is damaged at byte {third:,}"),
        (whole[:third] + bytes(512) + whole[third + 512 :], rf"is damaged at byte {third:,}"),
        (whole[:third] + bytes(2**20 + 512), rf"is damaged at byte {third:,}"),
    ]:
        validation.write_bytes(content)
        assert re.search(rf"ILSVRC2012_img_val\.tar {expected}", message(other, "--subset"))
    one = next(iter(images["train"].values()))
    for names, expected in [
        (["n01440764_1.JPEG", "n01440764_1.JPEG"], "n01440764_1.JPEG is there twice in split 'train'"),
        (["n00000000_1.JPEG"], r"n00000000\.tar is none of the 1000 synsets"),
        (["n01440764_1.jpg"], r"n01440764_1\.jpg is not expected there"),
    ]:
        validation.write_bytes(whole)
        with tarfile.open(train, "w") as outer:
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode="w") as inner:
                for name in names:
                    add(inner, name, one)
            add(outer, f"{names[0][:9]}.tar", file.getvalue())
        assert re.search(expected, message(other, "--subset"))
    write_tars(tmp_path, **images)
    content = bytearray(train.read_bytes())
    second = content.index(b"n01440764_", content.index(b"n01440764_") + 1)  # in the tar of a synset
    content[second + 150] ^= 1
    train.write_bytes(content)
    assert f"ILSVRC2012_img_train.tar is damaged at byte {second:,}" in message(other, "--subset")
    with tarfile.open(train, "w") as outer:
        add(outer, "n01440764/n01440764_1.JPEG", one)
    assert re.search("n01440764/n01440764_1.JPEG is not expected there; names must match", message(other, "--subset"))
    assert not (tmp_path / "out").exists()

    write_tars(tmp_path, **images)  # the same images, but other files
    assert "is there already; move it away" in message(other, "--subset", to=data_dir)
    assert re.search("cannot be written: .*another --data-dir", message(tars, "--subset", to="/proc/nothing"))


def test_hashes(tmp_path):
    """MD5 of 'abc': RFC 1321, appendix A.5."""
    (tmp_path / "a").write_bytes(b"abc")
    read = []
    imagenet.check_hash(tmp_path / "a", "900150983cd24fb0d6963f7d28e17f72", read.append)
    assert read == [3]
    with pytest.raises(ValueError, match=r"a has MD5 900150983cd24fb0d6963f7d28e17f72, and 1d67.* is published"):
        imagenet.check_hash(tmp_path / "a", imagenet.TARS["train"].md5, read.append)


# Folders -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(images, tmp_path) -> Path:
    """40 photographs of four classes."""
    directory = tmp_path / "My Photos"
    for name, content in list(images["train"].items())[:40]:
        path = directory / name.partition("_")[0] / name.replace("JPEG", "jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return directory


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


# Checking ------------------------------------------------------------------------------------------


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
        assert "1 files are there more than once" in out
        report = json.loads((tmp_path / "report.json").read_text())
        found = {name for split in report["splits"].values() for name in split["undecodable"]}
        assert {short(name) for name in found} == bad
        (names,) = report["repeated"]
        assert {short(name) for name in names} == same


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


def test_what_is_not_read_is_said(folder, tmp_path, capsys):
    for name in ("a.heic", "b.heic", "c", ".DS_Store"):
        (folder / "n01440764" / name).write_bytes(b"")
    run("folder", folder, "--data-dir", tmp_path / "tfds")
    expected = "3 of 43 files are not read: 2 .heic (n01440764/a.heic), 1 without a suffix (n01440764/c)."
    assert f"{folder}: {expected}\n" in capsys.readouterr().err
    run("check", folder, "--json", tmp_path / "report.json")
    assert capsys.readouterr().out.endswith(f"\n\n{expected}\n")
    assert json.loads((tmp_path / "report.json").read_text())["unread"] == [
        {"path": str(folder / "n01440764" / name), "why": why}
        for name, why in (("a.heic", ".heic"), ("b.heic", ".heic"), ("c", "without a suffix"))
    ]
    run("check", tmp_path / "tfds" / "my_photos" / "1.0.0", "--json", tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["unread"] == []


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
        ValueError, match=r"caf\xe9/\xe4\.jpg is there twice in split '(train|val)'; each image needs its own"
    ):
        prepare.main(["folder", str(folder), "--data-dir", str(tmp_path / "c")])


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


def test_help_is_worth_reading(capsys):
    with pytest.raises(SystemExit):
        prepare.main(["--help"])
    out = capsys.readouterr().out
    for word in ("imagenet", "folder", "check", "examples:"):
        assert word in out


# Training ------------------------------------------------------------------------------------------

# The paper's recipe, made small: 6 steps of 8 of the 45 images, then an evaluation on 11 images in two batches.
SMALL = [
    "--config.model.width=0.02",
    "--config.model.middle_repeats=0",
    "--config.model.dtype=float32",
    "--config.batch_size=8",
    "--config.epochs=1",
    "--config.log_every_steps=1",
    "--config.checkpoint_every_epochs=0.17",  # about every step
    "--config.checkpoint.keep_latest=6",
]


def start(workdir: Path, data_dir: Path, *arguments: str) -> subprocess.Popen:
    where = ["--workdir", workdir, f"--config.data.data_dir={data_dir}"]
    return shell.start("train.py", "--config", "configs/imagenet.py", *where, *SMALL, *arguments)


def test_an_epoch_of_the_papers_recipe(data_dir, tmp_path, capsys):
    """At 299 pixels on eight devices: a copy of the workdir in mid-epoch is resumed with two worker processes.

    It ends bit for bit as the run that went on, and the evaluation counts each of the 11 images once.
    """
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    process = start(whole, data_dir)
    wait_until(lambda: any(record["step"] == 3 for record in workdirs.records(whole)), process)
    process.send_signal(signal.SIGSTOP)
    shutil.copytree(whole, stopped)  # as if it had been killed here
    process.send_signal(signal.SIGCONT)
    code, _, err = finish(process)
    assert code == 0, err

    code, _, err = finish(start(stopped, data_dir, "--config.data.num_workers=2"))
    assert code == 0, err
    step = int(re.search(r"going on from the checkpoint of step (\d+)", err)[1])
    assert 1 <= step < 6

    expected, result = workdirs.arrays(whole, 6), workdirs.arrays(stopped, 6)
    assert expected.keys() == result.keys()
    assert len(expected) > 200
    for path, value in expected.items():
        np.testing.assert_array_equal(result[path], value, err_msg=path)
    metrics = [
        [{k: v for k, v in r.items() if "seconds" not in k and "per_second" not in k} for r in workdirs.records(w)]
        for w in (whole, stopped)
    ]
    losses = [{r["step"]: r["train/loss"] for r in of_run if "train/loss" in r} for of_run in metrics]
    assert losses[0].keys() == set(range(1, 7))
    assert losses[0] == losses[1]
    (evaluation,) = (record for record in metrics[0] if "eval/loss" in record)
    assert evaluation in metrics[1]
    assert evaluation["eval/count"] == 11

    assert evaluate.main(["--workdir", str(stopped)]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["count"], last["split"], last["step"]) == (11, "validation", 6)
    assert last["top1"] == evaluation["eval/top1"]
    assert last["loss"] == pytest.approx(evaluation["eval/loss"], rel=1e-5)


@pytest.mark.parametrize("train", [True, False])
def test_two_hosts_see_the_batches_of_one(data_dir, train):
    options = dict(source="tfds", name="imagenet2012", data_dir=str(data_dir), image_size=299, eval_split="validation")
    options |= dict(train_transforms="random_resized_crop(min_area=0.08) | flip_left_right", train=train, batch_size=8)

    def batches(**host):
        with contextlib.closing(data.load(**options, **host).batches()) as all_batches:
            return [{k: np.array(v) for k, v in batch.items()} for batch in itertools.islice(all_batches, 3)]

    one, two = batches(), [batches(process_index=i, process_count=2) for i in range(2)]
    assert len(one) == (3 if train else 2)
    for step, batch in enumerate(one):
        for key, value in batch.items():
            np.testing.assert_array_equal(np.concatenate([host[step][key] for host in two]), value)
    if not train:
        assert sum(batch["mask"].sum() for batch in one) == 11
