"""Files that Keras wrote (golden/make_keras.py), and archives made to hurt."""

import io
import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from golden.archives import unpacked
from xception_flax.text.errors import UserError
from xception_flax.weights import reading
from xception_flax.weights.reader import hdf5, keras
from xception_flax.weights.reader.room import MAX_CONFIG, MAX_DEPTH, Contents, Room

SHAPES = {"conv": [(2, 2, 3, 2), (2,)], "bn": [(2,)] * 4}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return unpacked("keras_files.tar.xz", tmp_path_factory.mktemp("keras"))


def values(*shape: int) -> np.ndarray:
    """As golden/make_keras.py has them."""
    n = int(np.prod(shape))
    return ((np.arange(n) - n // 2) / 8).reshape(shape)


def read_here(path: Path, max_bytes: int = 10**6) -> Contents:
    return {"keras": keras, "hdf5": hdf5}[reading.recognize(path)].read(path, Room(max_bytes))


def rewritten(path: Path, to: Path, change: Callable[[str, bytes], tuple[str, bytes] | None], **options) -> Path:
    """An archive with the members that `change` returns."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w", **options) as new:
        for member in old.infolist():
            if changed := change(member.filename, old.read(member)):
                new.writestr(*changed)
    return to


# What is read --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("suffix", [".keras", ".h5", ".weights.h5"])
def test_every_format_and_type(files, dtype, suffix):
    """With the state of Adam in the files of whole models; their configuration has everything."""
    entries, config = read_here(files / f"{dtype}{suffix}")
    found = {name: arrays for name, arrays in entries if arrays}
    assert {name: [array.shape for array in arrays] for name, arrays in found.items()} == SHAPES
    for arrays in found.values():
        for array in arrays:
            np.testing.assert_array_equal(array, values(*array.shape).astype(np.float32), strict=True)
    if suffix == ".weights.h5":
        assert config == {}
        return
    assert config["metadata"]["keras_version"] == "3.15.1"
    layers = config["config"]["config"]["layers"]
    assert [layer["config"]["name"] for layer in layers if layer["class_name"] != "InputLayer"] == ["conv", "bn"]


def test_a_whole_model_comes_through_the_process(files):
    path = files / "float32.keras"
    here, there = read_here(path), reading.read(path, "keras")
    assert there.config == here.config
    assert [name for name, _ in there.entries] == [name for name, _ in here.entries]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_that_was_packed_again(files, tmp_path, compression):
    """By another program, in another order and compressed: its name says what it is."""
    with zipfile.ZipFile(files / "float32.keras") as old:
        members = {name: old.read(name) for name in reversed(old.namelist())}
    with zipfile.ZipFile(tmp_path / "again.keras", "w", compression) as new:
        new.writestr("assets/words.txt", b"")
        for name, content in members.items():
            new.writestr(name, content)
    again, first = read_here(tmp_path / "again.keras"), read_here(files / "float32.keras")
    assert str(again) == str(first)


# What is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../a", "a/../../b", "/etc/a", "C:/a", "..\\a", "\\a"])
def test_members_that_leave_the_archive(files, tmp_path, name):
    path = rewritten(files / "float32.keras", tmp_path / "a.keras", lambda *member: member)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(zipfile.ZipInfo(name), b"")
    with pytest.raises(ValueError, match=rf"^{re.escape(name)} would be outside the archive; expected files in it$"):
        read_here(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name(files, tmp_path):
    path = shutil.copy(files / "float32.keras", tmp_path / "a.keras")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model.weights.h5", b"others")
    with pytest.raises(ValueError, match=r"^model\.weights\.h5 is in it twice$"):
        read_here(path)


@pytest.mark.parametrize(
    ("has", "message"),
    [
        (["config.json"], "it has no model.weights.h5"),
        (["model.weights.h5"], "it has no config.json"),
        (
            ["config.json", "model.weights.npz"],
            "it has no model.weights.h5; it has model.weights.npz, which is not read",
        ),
        (
            ["config.json", "model.weights.json", "model_00000.weights.h5"],
            "it has no model.weights.h5; it has model.weights.json, model_00000.weights.h5, which is not read",
        ),
    ],
    ids=str,
)
def test_archives_without_what_is_read(tmp_path, has, message):
    with zipfile.ZipFile(tmp_path / "a.keras", "w") as archive:
        for name in has:
            archive.writestr(name, b"{}")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        read_here(tmp_path / "a.keras")


def test_weights_in_parts_are_named(files):
    with pytest.raises(UserError, match=r"this is the index of weights that Keras wrote into several files; load it"):
        reading.recognize(files / "parts.weights.json")


def test_a_bomb_is_not_unpacked(files, tmp_path):
    """100 MB of zeros in 100 kB, as it says, and then as it does not."""

    def bomb(name: str, content: bytes) -> tuple[str, bytes]:
        return name, bytes(10**8) if name == "model.weights.h5" else content

    path = rewritten(files / "float32.keras", tmp_path / "a.keras", bomb, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2 * 10**5
    with pytest.raises(ValueError, match=r"^model\.weights\.h5 has more than 4,000,000 bytes; expected less$"):
        read_here(path)
    content = path.read_bytes().replace((10**8).to_bytes(4, "little"), (1000).to_bytes(4, "little"))
    path.write_bytes(content)
    with pytest.raises(zipfile.BadZipFile, match="Bad CRC-32"):
        read_here(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressions_without_bounds(files, tmp_path, compression):
    path = rewritten(files / "float32.keras", tmp_path / "a.keras", lambda *member: member, compression=compression)
    with pytest.raises(ValueError, match=rf"has the compression {compression}; expected none, or deflate$"):
        read_here(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON: "),
        ("[]", "is a list; expected an object of JSON"),
        (f'{{"a": "{"x" * MAX_CONFIG}"}}', f"has more than {MAX_CONFIG:,} bytes; expected less"),
        (
            '{"a": ' + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1) + "}",
            f"has more than {MAX_DEPTH} levels; expected less",
        ),
        ('{"a": ' + "[" * 10**5 + "]" * 10**5 + "}", f"has more than {MAX_DEPTH} levels; expected less"),
    ],
    ids=["cut off", "list", "long", "deep", "deeper"],
)
def test_configurations_that_are_none(files, tmp_path, text, message):
    """In an archive, and as the attribute of a whole model in HDF5."""
    path = rewritten(
        files / "float32.keras", tmp_path / "a.keras", lambda name, old: (name, text if name == "config.json" else old)
    )
    with pytest.raises(ValueError, match=rf"^config\.json {re.escape(message)}"):
        read_here(path)
    path = shutil.copy(files / "float32.h5", tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        file.attrs["model_config"] = text
    with pytest.raises(ValueError, match=rf"^model_config {re.escape(message)}"):
        read_here(path)


def test_a_text_of_any_characters_is_handed_on(files, tmp_path):
    """Only names of layers get into messages by themselves."""
    with h5py.File(shutil.copy(files / "float32.h5", tmp_path / "a.h5"), "r+") as file:
        file.attrs["model_config"] = json.dumps({"config": {"name": "\x1b[2J\u00e9"}}, ensure_ascii=False)
    assert reading.read(tmp_path / "a.h5", "hdf5").config["config"] == {"config": {"name": "\x1b[2J\u00e9"}}


def test_links_in_an_archive_lead_nowhere(files, tmp_path):
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        file.create_group("layers/conv2d/vars")["0"] = h5py.ExternalLink("other.h5", "/a")
    path = rewritten(
        files / "float32.keras",
        tmp_path / "a.keras",
        lambda name, old: (name, content.getvalue() if name == "model.weights.h5" else old),
    )
    with pytest.raises(ValueError, match=r"^/layers/conv2d/vars/0 is a link to another place; expected the thing"):
        read_here(path)
