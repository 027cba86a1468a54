"""Files of other libraries as they are, damaged, and made to hurt: what is read, what is said, what ends a reader."""

import importlib
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import h5py
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from xception_flax.text.errors import UserError
from xception_flax.weights import reading
from xception_flax.weights.reader.room import Contents, Room

BFLOAT16 = np.dtype(jnp.bfloat16)
VALUES = np.array([[1.5, -2.25, 3], [1e-3, 0, 7]])
PLACE = "layers/conv2d/vars"  # of Keras 3


def refused(message: str):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def unreadable(path: Path, form: str, reason: str):
    """What the caller of a reader is told."""
    message = f"{path} cannot be read as {reading.FORMATS[form]}: {reason}."
    return pytest.raises(UserError, match=f"^{re.escape(message)}$")


def read_here(path: Path, form: str, max_bytes: int = 10**6) -> Contents:
    """What the reader does, in this process: a process each would take longer than all else here."""
    return importlib.import_module(f"xception_flax.weights.reader.{form}").read(path, Room(max_bytes))


def write(path: Path, array: np.ndarray) -> Path:
    """A file with one array, 'a', of the format of its suffix."""
    if path.suffix == ".npz":
        np.savez(path, a=array)
    elif path.suffix == ".safetensors":
        safetensors.numpy.save_file({"a": array}, path)
    else:
        with h5py.File(path, "w") as file:
            file.create_group(PLACE).attrs["name"] = "a"
            if array.dtype == BFLOAT16:  # as Keras 3.14 has it under the policy 'bfloat16': two bytes of no type
                file[f"{PLACE}/0"] = array.view("V2")
                file[f"{PLACE}/0"].attrs["dtype"] = "bfloat16"
            else:
                file[f"{PLACE}/0"] = array
    return path


def write_npy(path: Path, shape: str, descr: str = "'<f4'", data: bytes = bytes(16), names: tuple = ("a.npy",)) -> Path:
    """An .npz whose header says what it is told."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data)
    return path


# What is read --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".h5", ".npz", ".safetensors"])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f2", ">f4", ">f8", BFLOAT16], ids=str)
def test_numbers_of_every_width_and_order(tmp_path, suffix, dtype):
    if suffix == ".safetensors" and np.dtype(dtype).byteorder == ">":
        dtype = np.dtype(dtype).newbyteorder("<")  # it has no other
    array = VALUES.astype(dtype)
    path = write(tmp_path / f"a{suffix}", array)
    ((name, (found,)),), config = read_here(path, reading.recognize(path))
    assert config == {}
    assert (name, found.dtype.str) == ("a", "<f8" if array.dtype.itemsize == 8 else "<f4")
    np.testing.assert_array_equal(found, array.astype(np.float64))


def test_the_process_hands_back_what_it_reads(tmp_path):
    """Through the pipe: a scalar, an empty array, one of 20 MB and one in Fortran's order, compressed."""
    large = np.random.default_rng(0).normal(size=(10, 3, 83_000))
    arrays = {
        "scalar": np.float32(3),
        "empty": np.zeros((0, 4), np.float32),
        "large": large,
        "fortran": np.asfortranarray(VALUES),
    }
    np.savez_compressed(tmp_path / "a.npz", **arrays, num_batches_tracked=np.int64(7))
    found, _ = reading.read(tmp_path / "a.npz", "npz")
    assert [name for name, _ in found] == list(arrays)
    for name, (array,) in found:
        np.testing.assert_array_equal(array, arrays[name], strict=True)


# What is refused -----------------------------------------------------------------------------------

REFUSED = {
    "int8": np.ones(3, np.int8),
    "int64": np.ones(3, np.int64),
    "bool": np.ones(3, bool),
    "complex64": np.ones(3, np.complex64),
    "|S2": np.array([b"ab"]),
    "float128": np.ones(3, np.longdouble),
    "[('a', '<f4')]": np.ones(3, [("a", "<f4")]),
    "|V4": np.ones(3, "V4"),
    "datetime64[s]": np.ones(3, "datetime64[s]"),
    "object": np.array(["text"], object),
}


@pytest.mark.parametrize("dtype", REFUSED)
def test_what_is_no_weight_is_refused_by_name(tmp_path, dtype):
    message = f"has the type {dtype}; expected floating-point numbers of 16, 32 or 64 bits"
    with refused(f"a {message}"):
        read_here(write(tmp_path / "a.npz", REFUSED[dtype]), "npz")
    if not dtype.startswith("datetime"):  # HDF5 has none
        array = REFUSED[dtype].astype(h5py.string_dtype()) if dtype == "object" else REFUSED[dtype]
        with refused(f"/{PLACE}/0 {message}"):
            read_here(write(tmp_path / "a.h5", array), "hdf5")
    if dtype == "int8":
        path = write(tmp_path / "a.safetensors", REFUSED[dtype])
        with refused("a has the type I8; expected F16, F32, F64, BF16"):
            read_here(path, "safetensors")


def hostile(kind: str, folder: Path) -> Path:
    """A file of HDF5 that has its numbers elsewhere, or not at all, or itself in itself."""
    (folder / "other.bin").write_bytes(np.arange(10, dtype="<f4").tobytes())
    with h5py.File(folder / "other.h5", "w") as file:
        file["layers/conv2d/vars/0"] = np.ones(10, np.float32)
    with h5py.File(folder / "a.h5", "w") as file:
        group = file.create_group(PLACE)
        group.attrs["name"] = "a"
        match kind:
            case "external link":
                group["0"] = h5py.ExternalLink("other.h5", f"/{PLACE}/0")
            case "external link to a group":
                file["model_weights"] = h5py.ExternalLink("other.h5", "/layers")
            case "soft link":
                group["0"] = h5py.SoftLink("/else")
            case "external storage":
                group.create_dataset("0", (10,), "<f4", external=[(str(folder / "other.bin"), 0, 40)])
            case "virtual":
                layout = h5py.VirtualLayout((10,), "<f4")
                layout[:] = h5py.VirtualSource(folder / "other.h5", f"{PLACE}/0", (10,))
                group.create_virtual_dataset("0", layout)
            case "never written":
                group.create_dataset("0", (10,), "<f4")
            case "partly written":
                group.create_dataset("0", (10,), "<f4", chunks=(5,))[:5] = 1
            case "large":
                group.create_dataset("0", (2**32,), "<f4", chunks=(2**20,), compression="gzip")
            case "another exponent":
                kind = h5py.h5t.IEEE_F32LE.copy()
                kind.set_ebias(99)
                h5py.h5d.create(group.id, b"0", kind, h5py.h5s.create_simple((10,))).write(
                    h5py.h5s.ALL, h5py.h5s.ALL, np.ones(10, np.float32)
                )
            case "no array":
                group.create_group("0")
            case "empty":
                group["0"] = h5py.Empty("<f4")
            case "a group in itself":
                file["layers/again"] = file["layers"]
            case "a name that writes on the terminal":
                group.attrs["name"] = "\x1b[2J"
            case "a name that is a number":
                group.attrs["name"] = 7
            case "names outside":
                file.attrs["layer_names"] = [b"../a"]
    return folder / "a.h5"


@pytest.mark.parametrize(
    ("kind", "message"),
    {
        "external link": f"/{PLACE}/0 is a link to another place; expected the thing itself",
        "external link to a group": "/model_weights is a link to another place; expected the thing itself",
        "soft link": f"/{PLACE}/0 is a link to another place; expected the thing itself",
        "external storage": f"/{PLACE}/0 has its numbers in another file or array; expected them here",
        "virtual": f"/{PLACE}/0 has its numbers in another file or array; expected them here",
        "never written": f"/{PLACE}/0 has not all of its numbers in the file",
        "partly written": f"/{PLACE}/0 has not all of its numbers in the file",
        "large": f"with /{PLACE}/0, of shape (4294967296,), its arrays take more than 1,000,000 bytes; expected less",
        "another exponent": f"/{PLACE}/0 has numbers of a type of its own; expected those of IEEE 754",
        "no array": f"/{PLACE}/0 is no array",
        "empty": f"/{PLACE}/0 has the shape None; expected an array",
        "a group in itself": "/layers/again is in it twice",
        "a name that writes on the terminal": "a name in it is '\\x1b[2J'; expected text that can be printed",
        "a name that is a number": "a name in it is np.int64(7); expected text that can be printed",
        "names outside": "there is no ../a in /",
    }.items(),
)
def test_hdf5_that_leads_elsewhere_or_nowhere(tmp_path, kind, message):
    with refused(message):
        read_here(hostile(kind, tmp_path), "hdf5")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(shape="(4294967296,)"),  # 16 GiB
            "with a, of shape (4294967296,), its arrays take more than 1,000,000 bytes; expected less",
        ),
        (dict(shape="(5,)"), "a has another number of bytes than its shape (5,) needs"),
        (dict(shape="(3,)"), "a has another number of bytes than its shape (3,) needs"),
        (dict(shape="(-2, -2)"), "a has the shape (-2, -2); expected an array"),
        (dict(shape="(4,)", names=("a.npy", "a")), "a is in it twice"),
        (dict(shape="(4,)", names=("\x1b.npy",)), "a name in it is '\\x1b.npy'; expected text that can be printed"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value),
)
def test_npz_that_says_what_is_not(tmp_path, options, message):
    with refused(message):
        read_here(write_npy(tmp_path / "a.npz", **options), "npz")


def test_a_flipped_bit_of_npz_is_found(tmp_path):
    """By the archive's checksum: what is read is read to its end."""
    path = write(tmp_path / "a.npz", VALUES.astype(np.float32))
    data = bytearray(path.read_bytes())
    data[data.index(np.float32(-2.25).tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(zipfile.BadZipFile, match=r"Bad CRC-32 for file 'a\.npy'"):
        read_here(path, "npz")


# What a reader is ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", reading.FORMATS)
def test_a_reader_imports_numpy_and_one_library(form):
    """With nothing else to import it starts in 0.1 s, and there is less in it that a damaged file could reach."""
    program = (
        f"import sys, xception_flax.weights.reader.__main__, xception_flax.weights.reader.{form}; print(*sys.modules)"
    )
    folder = Path(reading.__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True).stdout
    libraries = {"numpy", "h5py", "safetensors", "jax", "flax", "torch", "keras", "ml_dtypes", "xception_flax"}
    expected = {"hdf5": {"h5py"}, "keras": {"h5py"}, "safetensors": {"safetensors"}}.get(form, set())
    assert libraries & set(out.split()) == {"numpy", "xception_flax"} | expected
    assert {name for name in out.split() if name.startswith("xception_flax.")} <= {
        "xception_flax.weights",
        "xception_flax.weights.reader",
        *(
            f"xception_flax.weights.reader.{name}"
            for name in ("__main__", "room", "archives", "pickles", "hdf5", "crc32c", form)
        ),
    }


def test_a_reader_is_found_from_anywhere(tmp_path, monkeypatch):
    """With neither the current folder nor the environment leading to this package, or with both to another."""
    path = write(tmp_path / "a.h5", VALUES)
    (tmp_path / "xception_flax").mkdir()
    (tmp_path / "xception_flax" / "__init__.py").write_text("raise ImportError")
    (tmp_path / "h5py.py").write_text("raise ImportError")
    monkeypatch.chdir(tmp_path)
    assert reading.read(path, "hdf5").entries[0][0] == "a"
    (tmp_path / "h5py.py").unlink()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert reading.read(path, "hdf5").entries[0][0] == "a"


# How a reader ends ---------------------------------------------------------------------------------


def test_any_exception_of_a_library_is_a_sentence(tmp_path):
    path = write(tmp_path / "a.npz", VALUES)
    whole = path.read_bytes()
    path.write_bytes(whole[:20] + whole[20:].replace(b"a.npy", b"b.npy", 1))
    with unreadable(path, "npz", "BadZipFile: File name in directory 'a.npy' and header b'b.npy' differ"):
        reading.read(path, "npz")
    path.write_bytes(whole[:-9])
    with unreadable(
        path, "npz", "it has not the end of an archive (zip), so it may be incomplete; copy it or fetch it again"
    ):
        reading.read(path, "npz")


def test_a_reader_that_does_not_end_is_ended(tmp_path, monkeypatch):
    """By the kernel: of a pipe that nobody writes to, native code waits for ever."""
    os.mkfifo(tmp_path / "a.h5")
    monkeypatch.setattr(reading, "SECONDS", 1)
    with unreadable(tmp_path / "a.h5", "hdf5", "its reader was not done after 1 s"):
        reading.read(tmp_path / "a.h5", "hdf5")


CRASHED = "the library that reads it crashed (SIGSEGV); the file is damaged"


@pytest.mark.parametrize(
    ("ends", "message"),
    {
        "kill -SEGV $$": CRASHED,
        """echo '{"entries": [["a", [["<f4", [9]]]]]}'; kill -SEGV $$""": CRASHED,
        "kill -XCPU $$": "its reader was not done after 20 s",
        "kill -KILL $$": "its reader was ended from outside (SIGKILL)",
        "exit 3": "its reader ended with code 3",
    }.items(),
)
def test_every_other_end_is_a_sentence(tmp_path, monkeypatch, ends, message):
    script = tmp_path / "reader"
    script.write_text(f"#!/bin/sh\n{ends}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with unreadable(tmp_path / "a.h5", "hdf5", message):
        reading.read(tmp_path / "a.h5", "hdf5")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=str)
def test_a_reader_ends_with_its_caller(tmp_path, number):
    """Ctrl-C handled as commands do, by `os._exit`, and SIGKILL; from a terminal that is closed, too."""
    os.mkfifo(tmp_path / "a.h5")
    program = (
        "import os, signal, pathlib; from xception_flax.host import signals\n"
        "from xception_flax.weights import reading\n"
        "signal.signal(signal.SIGINT, signals.stop_at_once)\n"
        "os.close(0)\n"
        f"reading.read(pathlib.Path({str(tmp_path / 'a.h5')!r}), 'hdf5')"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=Path(reading.__file__).parents[2]) as caller:
        children = Path(f"/proc/{caller.pid}/task/{caller.pid}/children")
        deadline = time.monotonic() + 60
        # It sets its limits, and then imports h5py.
        while not (found := children.read_text().split()) or "h5py" not in Path(f"/proc/{found[0]}/maps").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        status = Path(f"/proc/{found[0]}/status")
        caller.send_signal(number)
        caller.wait()
        while status.exists() and "State:\tZ" not in status.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)


# What a file is ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "model.ckpt",
            b"x" * 99 + reading.TABLE_MAGIC,
            "a table of TensorFlow; of its checkpoints those are read that",
        ),
        (
            "model.ckpt.data-00000-of-00001",
            b"abc",
            "part of a checkpoint of TensorFlow; its .index belongs beside",
        ),
        (
            "model.ckpt",
            b"\x80\x02\x8a\nl",
            "a pickle that torch.save did not write; with torch, torch.save(model.state_",
        ),
        ("model.h5", b"\x80\x04\x95", "a pickle that torch.save did not write; with torch, torch.save(model.state_"),
        ("model.weights.json", b"{}", "the index of weights that Keras wrote into several files; load it into the"),
        ("pytorch_model.bin.index.json", b"{}", "the index of weights in several files; write them into one."),
        ("model.h5", b"\n<!DOCTYPE html>", "a page of the web; the download went wrong; get it again."),
        ("model.safetensors", b"version https://git-lfs.github.com", "a pointer of Git LFS; `git lfs pull` gets what"),
        ("model.npz", b"\x93NUMPY\x01", "a single array of NumPy; np.savez(FILE, **arrays) writes all of them"),
        ("model.h5", b"", "empty; it was never written, or its download went wrong."),
        ("model.h5.gz", b"\x1f\x8b\x08", "compressed; unpack it first."),
        ("saved_model.pb", b"\x08\x01", "a graph of TensorFlow; load it into the model with Keras, and write model."),
        ("model.onnx", b"\x08\x07", "a network of ONNX; take the weights it was made from."),
        ("model.msgpack", b"\x81\xa6", "something else; other formats are not read."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_read_is_named_by_its_content(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    formats = ".h5 or .keras (Keras), .pth, .safetensors or .npz (timm, torch), .index (DeepLab), or a workdir"
    said = f"{path} must be {formats}; this is {message}"
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        reading.recognize(path)


@pytest.mark.parametrize(
    ("member", "name", "form"),
    [
        ("a.npy", "model.ckpt", "npz"),
        ("archive/data.pkl", "model.ckpt", "torch"),
        ("model/.format_version", "model.tar", "torch"),
        ("data.pkl", "model", "torch"),
        ("metadata.json", "model.zip", "keras"),
        ("readme.txt", "model.keras", "keras"),
        ("readme.txt", "model.npz", "npz"),
        ("readme.txt", "model.bin", "torch"),
        ("readme.txt", "model.h5", ""),
        ("readme.txt", "model.zip", ""),
    ],
)
def test_an_archive_is_known_by_its_first_member_or_its_name(tmp_path, member, name, form):
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr(member, b"")
    if form:
        assert reading.recognize(tmp_path / name) == form
    else:
        with pytest.raises(UserError, match=r"; this is a zip archive; unpack it first\.$"):
            reading.recognize(tmp_path / name)


@pytest.mark.parametrize("suffix", [".h5", ".npz", ".safetensors"])
def test_a_good_file_is_read_whatever_its_name(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", VALUES).rename(tmp_path / "a.bin")
    assert reading.recognize(path) == {".h5": "hdf5"}.get(suffix, suffix[1:])
