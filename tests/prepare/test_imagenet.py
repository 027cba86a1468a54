"""The two tars of ImageNet are prepared as TensorFlow Datasets prepares them."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from PIL import Image
from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder as tfds_imagenet
from tensorflow_datasets.proto import tf_example_pb2

from preparing import CMYK, PATH, PNG, SYNSETS, add, contents, fail, run, write_tars
from shell import ROOT, pause
from xception_flax.data import sources
from xception_flax.prepare import imagenet, records
from xception_flax.text.errors import UserError

# Of the first validation images, from ILSVRC's own list.
VALIDATION_LABELS = [65, 970, 230, 809, 516, 57, 334, 415, 674, 332, 109]


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
    pause(process)
    assert "is being written by another process" in fail(capsys, monkeypatch, *arguments, tmp_path / "killed")
    with pytest.raises(UserError, match="is not prepared"):
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
    with pytest.raises(UserError, match=r"a has MD5 900150983cd24fb0d6963f7d28e17f72, and 1d67.* is published"):
        imagenet.check_hash(tmp_path / "a", imagenet.TARS["train"].md5, read.append)
