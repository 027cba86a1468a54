"""Files of weights: the true arrays where the format has checksums, else arrays of the shapes that it declares.

Numbers in zip archives (.npz, .keras, torch) have CRC-32, those of TensorFlow CRC-32C: there a change is refused. In
safetensors, HDF5 and files of torch before 1.6 a changed number is a number: nobody can know.
"""

import contextlib
import hashlib
import importlib
import io
import json
import lzma
import os
import pickle
import random
import struct
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import h5py
import jax
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.fuzz import mutation
from tests.fuzz.kinds import Files, Kind, WrongError, write
from tests.weights.test_reading_tensorflow import table
from xception_flax.training import sharding
from xception_flax.weights import reading, source, writing
from xception_flax.weights.pretrained import Pretrained
from xception_flax.weights.reader import tensorflow
from xception_flax.weights.reader.room import Contents
from xception_flax.weights.shapes import shapes_of

GOLDEN = Path(__file__).parents[1] / "golden"
PLANTED = "planted"  # the file that a pickle would write if anything in it ran


@cache
def _golden(archive: str) -> dict[str, bytes]:
    with tarfile.open(GOLDEN / f"{archive}.tar.xz") as files:
        return {member.name: files.extractfile(member).read() for member in files if member.isfile()}


@cache
def lenet() -> Pretrained:
    """A small network with all that a file can say of it."""
    model = {"name": "lenet", "num_classes": 3, "width": 0.25}
    rng, shapes = np.random.default_rng(0), flatten_dict(shapes_of(model, 3))
    values = {place: rng.normal(size=leaf.shape).astype(np.float32) for place, leaf in shapes.items()}
    return Pretrained(
        framework="xception_flax",
        model=model,
        variables=unflatten_dict(values),
        channels=3,
        class_names=("cat", "dog", "n\u00e9"),
        image_size=32,
        transforms="center_crop(fraction=0.9)",
        normalize={"mean": (127.5,), "std": (127.5, 1.0, 2.0)},
        measured={"top1": 0.5, "count": 10, "source": "folder", "split": "val", "step": 3, "weights": "raw"},
    )


@cache
def _written(suffix: str) -> dict[str, bytes]:
    """The files of that network as this program writes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = writing.write(lenet(), Path(folder) / f"network{suffix}").path
        files = path.rglob("*") if path.is_dir() else [path]
        return {file.name: _in_order(file.read_bytes(), file.suffix) for file in files if file.is_file()}


def _in_order(content: bytes, suffix: str) -> bytes:
    """The library of safetensors writes its metadata in an order that is another in each process."""
    if suffix != ".safetensors":
        return content
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length]), sort_keys=True).encode().ljust(length)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


@cache
def originals() -> dict[str, tuple[dict[str, bytes], ...]]:
    """Good files of each format: small ones that its library wrote, and whole networks of our own."""
    arrays = {"conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2), "conv.bias": np.ones(2, np.float32)}
    keras, torch = _golden("keras_files"), _golden("torch_files")
    packed, saved = io.BytesIO(), safetensors.numpy.save(arrays, {"format": "np"})
    np.savez_compressed(packed, **arrays)
    return {
        "hdf5": ({"a.weights.h5": keras["float32.weights.h5"]}, {"a.h5": keras["float32.h5"]}),
        "keras": ({"a.keras": keras["float32.keras"]}, {"a.keras": _keras_xception()}),
        "npz": (_written(".npz"), {"a.npz": _same_dates(packed.getvalue())}),
        "safetensors": (_written(".safetensors"), {"a.safetensors": _in_order(saved, ".safetensors")}),
        "torch": tuple({"a.pth": torch[f"{name}.pth"]} for name in ("float32", "views", "checkpoint", "protocol4")),
        "torch_older": tuple({"a.pth": torch[f"older_{name}.pth"]} for name in ("float32", "views", "checkpoint")),
        "tensorflow": ({f"model.ckpt{end}": _golden("deeplab")[f"xception_41/model.ckpt{end}"]
                        for end in (".index", ".data-00000-of-00001")},),
    }  # fmt: skip


def _same_dates(archive: bytes) -> bytes:
    """An archive without the time at which it was written, so that an input is always the same."""
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        return _zip({info.filename: file.read(info) for info in file.infolist()})


def _zip(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return file.getvalue()


def _members(archive: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        return {info.filename: file.read(info) for info in file.infolist()}


@cache
def _keras_xception() -> bytes:
    """A whole Xception as Keras 2 described it, in Keras' archive: most of what is recognized is in its config."""
    golden, file = json.loads(lzma.decompress((GOLDEN / "keras_2.json.xz").read_bytes())), io.BytesIO()
    rng = np.random.default_rng(0)
    with h5py.File(file, "w", track_order=True) as weights:
        for place, (name, shapes) in enumerate(golden["shapes"]):
            group = weights.create_group(f"layers/{place}/vars")
            group.attrs["name"] = name
            for i, shape in enumerate(shapes):
                group[str(i)] = rng.normal(size=shape).astype(np.float32)
    metadata = json.dumps({"keras_version": golden["keras_version"]}).encode()
    config = json.dumps(golden["config"]).encode()
    return _zip({"metadata.json": metadata, "config.json": config, "model.weights.h5": file.getvalue()})


# Inputs --------------------------------------------------------------------------------------------


def _make(form: str, hostile: Callable[[random.Random, dict[str, bytes]], Files] | None = None) -> Any:
    def make(draw: random.Random) -> Files:
        number = draw.randrange(len(originals()[form]))
        files = dict(originals()[form][number])
        said = {"original.json": json.dumps({"form": form, "number": number}).encode()}
        if hostile is not None and draw.random() < 0.5:
            return hostile(draw, files) | said
        name = draw.choice(list(files))
        others = [content for original in originals()[form] for content in original.values()]
        return files | {name: mutation.changed_bytes(draw, files[name], others)} | said

    return make


def _hostile_zip(draw: random.Random, files: dict[str, bytes]) -> Files:
    """A member changed, with a right checksum; so what is read may be other numbers."""
    ((name, content),) = files.items()
    members = _members(content)
    member = draw.choice(_favoured(members))
    if member.endswith(".json"):
        members[member] = mutation.json_bytes(draw, json.loads(members[member]))
    elif draw.random() < 0.15:
        held = members.pop(member)
        members[draw.choice(["../x", "/tmp/x", "x" * 3000, "\n", f"{member}/"])] = held
    else:
        members[member] = mutation.changed_bytes(draw, members[member])
    return {name: _zip(members), "signed": b""}


def _favoured(members: dict[str, bytes]) -> list[str]:
    """Members by name; what describes the others more often."""
    return [name for name in members for _ in range(4 if name.endswith((".json", ".pkl")) else 1)]


def _hostile_npz(draw: random.Random, files: dict[str, bytes]) -> Files:
    """A header of another array, or our description with other values."""
    ((name, content),) = files.items()
    members = _members(content)
    member = draw.choice(list(members))
    data = members[member]
    if data.startswith(b"\x93NUMPY"):
        end = 10 + int.from_bytes(data[8:10], "little")
        header = mutation.changed_text(draw, data[10:end].decode("latin-1").rstrip())
        packed = header.encode("utf-8", "surrogatepass")[:60000] + b"\n"
        members[member] = data[:8] + struct.pack("<H", len(packed)) + packed + data[end:]
    else:
        members[member] = mutation.json_bytes(draw, json.loads(data))
    return {name: _zip(members), "signed": b""}


def _hostile_safetensors(draw: random.Random, files: dict[str, bytes]) -> Files:
    """A header with other values, and often our description in it."""
    ((name, content),) = files.items()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    metadata = header.get("__metadata__", {})
    if "xception_flax" in metadata and draw.random() < 0.7:
        changed = mutation.json_bytes(draw, json.loads(metadata["xception_flax"])).decode("utf-8", "replace")
        packed = json.dumps(header | {"__metadata__": metadata | {"xception_flax": changed}}).encode()
    else:
        packed = mutation.json_bytes(draw, header)
    return {name: len(packed).to_bytes(8, "little") + packed + content[8 + length :], "signed": b""}


class _Runs:
    """An object whose pickle calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def _hostile_pickle(draw: random.Random, files: dict[str, bytes]) -> Files:
    """A pickle that would write a file beside itself, alone or within a dict of tensors; or with other operations."""
    ((name, content),) = files.items()
    members = _members(content)
    (pickled,) = (member for member in members if member.endswith("data.pkl"))
    if draw.random() < 0.6:
        code = f"open({PLANTED!r}, 'w').close()"
        calls = [
            _Runs(exec, code),
            _Runs(eval, f"open({PLANTED!r}, 'w')"),
            _Runs(open, PLANTED, "w"),
            _Runs(os.system, f"touch {PLANTED}"),
            _Runs(subprocess.check_call, ["touch", PLANTED]),
            _Runs(Path.write_text, Path(PLANTED), "x"),
            _Runs(getattr, _Runs(importlib.import_module, "os"), "system"),
        ]
        call = draw.choice(calls)
        value = draw.choice([call, {"state_dict": call}, {"conv1.weight": [call]}])
        members[pickled] = pickle.dumps(value, draw.choice((0, 1, 2, 3, 4, 5)))
        if draw.random() < 0.3:  # our own storages remain, so that it looks like a file of weights
            members[pickled] = members[pickled][:-1] + b"0" + _members(content)[pickled][2:]
    else:
        members[pickled] = mutation.changed_bytes(draw, members[pickled], [pickle.dumps(_Runs(exec, "1"))])
    return {name: _zip(members), "signed": b""}


def _hostile_table(draw: random.Random, files: dict[str, bytes]) -> Files:
    """An index of TensorFlow with a changed message, and right checksums."""
    (index,) = (name for name in files if name.endswith(".index"))
    entries = list(tensorflow._entries(files[index]))
    place = draw.randrange(len(entries))
    entries[place] = entries[place][0], mutation.changed_bytes(draw, entries[place][1])
    return files | {index: table(*entries), "signed": b""}


def _make_hub(draw: random.Random) -> Files:
    """A folder in the hub's layout, with another description."""
    files = dict(_written(""))
    said = {"original.json": json.dumps({"form": "hub", "number": 0}).encode()}
    name = "config.json" if draw.random() < 0.8 else "model.safetensors"
    if name == "config.json" and draw.random() < 0.8:
        return files | {name: mutation.json_bytes(draw, json.loads(files[name])), "signed": b""} | said
    return files | {name: mutation.changed_bytes(draw, files[name])} | said


# What reads them -----------------------------------------------------------------------------------


def read(folder: Path) -> None:
    """Opens the network as every command does, and compares the arrays that were read on the way."""
    said = json.loads((folder / "original.json").read_text())
    signed = (folder / "signed").exists()
    found: list[tuple[Path, str, Contents]] = []
    really_read = reading.read

    def noted(path: Path, form: str, max_bytes: int) -> Contents:
        contents = really_read(path, form, max_bytes)
        found.append((path, form, contents))
        return contents

    files = {path.name for path in folder.iterdir()} - {"original.json", "signed"}
    place = folder if "config.json" in files else folder / next(name for name in files if ".data-" not in name)
    try:
        with contextlib.chdir(folder), mock.patch.object(reading, "read", noted):  # where a pickle would leave its file
            network = source.open_source(str(place), _mesh())
    finally:
        if (folder / PLANTED).exists():
            raise WrongError("something in a pickle ran")
        if found:
            _compare(*found[0], said, signed=signed)
    shapes = {place: leaf.shape for place, leaf in flatten_dict(shapes_of(network.model, network.channels)).items()}
    if {place: leaf.shape for place, leaf in flatten_dict(network.variables).items()} != shapes:
        raise WrongError("the network has arrays of other shapes than its model")


@cache
def _mesh() -> Any:
    return sharding.create_mesh(devices=jax.devices()[:1])


def _compare(path: Path, form: str, contents: Contents, said: dict[str, Any], *, signed: bool) -> None:
    """Raises WrongError where arrays are not those of the original, or of the format's own library."""
    if form == "safetensors":
        theirs = safetensors.numpy.load(path.read_bytes())
    elif form == "npz":
        with np.load(path, allow_pickle=False) as file:
            theirs = {name.removesuffix(".npy"): file[name] for name in file.files}
    else:
        theirs = None
    for name, arrays in contents.entries:
        if theirs is not None and not np.array_equal(theirs[name].astype(arrays[0].dtype), arrays[0], equal_nan=True):
            raise WrongError(f"{name} has other numbers than its library reads")
    checked = form in ("keras", "npz", "torch", "tensorflow") and said["form"] == form and not signed
    if checked and _digest(contents) not in _original_digests(form):
        raise WrongError("a format with checksums gives other arrays than the originals")


def _digest(contents: Contents) -> str:
    digest = hashlib.sha256()
    for name, arrays in contents.entries:
        for array in arrays:
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


@cache
def _original_digests(form: str) -> set[str]:
    """Of all originals: a part over another may make one of another."""
    found = set()
    for files in originals()[form]:
        with tempfile.TemporaryDirectory() as folder:
            write(files, Path(folder))
            found.add(_digest(reading.read(Path(folder) / next(name for name in files if ".data-" not in name), form)))
    return found


KINDS = {
    "hdf5": Kind(_make("hdf5"), read, share=0.6),
    "keras": Kind(_make("keras", _hostile_zip), read, share=0.5),
    "npz": Kind(_make("npz", _hostile_npz), read, share=0.6),
    "safetensors": Kind(_make("safetensors", _hostile_safetensors), read, share=0.6),
    "torch": Kind(_make("torch", _hostile_pickle), read),
    "torch_older": Kind(_make("torch_older"), read, share=0.5),
    "tensorflow": Kind(_make("tensorflow", _hostile_table), read, share=0.2),
    "hub": Kind(_make_hub, read, share=0.6),
}
