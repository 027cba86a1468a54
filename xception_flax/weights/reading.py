"""Reads arrays from files of other libraries, in a separate process.

A file of weights may come from anywhere. Damaged files have crashed libhdf5, or kept it busy for ever in native code,
where Python handles no signals. And HDF5 can read other files of this machine as data. So this file also runs as a
script, the reader. It has limited time and memory, and sends back either arrays of numbers or an error message through
a pipe. However it ends, the caller goes on. It imports NumPy and the one library that it needs, but not this package.
"""

import contextlib
import ctypes
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

Layers = list[tuple[str, list[np.ndarray]]]  # name, arrays

MAX_BYTES = 2**32  # default limit of all arrays together

# Limits of a reader.
CPU_SECONDS = 20  # the largest network takes a hundredth
SECONDS = 600  # the disk may be slow
MAX_ANSWER = 2**24  # bytes of the line that describes the arrays

# How files begin. HDF5 and NumPy files have the name of their format, a zip archive the name of its first member.
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
TABLE_MAGIC = bytes.fromhex("57fb808b247547db")  # at the end of TensorFlow's and LevelDB's tables
REWRITE_KERAS = "load it into the model with Keras, and write model.save_weights('model.weights.h5')"
_REWRITE_TORCH = "torch, which alone reads this, writes one by safetensors.torch.save_file(model.state_dict(), FILE)"
_BEGINNINGS = {
    rb"\x80[\x02-\x05]": ("a pickle of torch or Python", _REWRITE_TORCH),
    rb"\x93NUMPY": ("a single array of NumPy", "np.savez(FILE, **arrays) writes all of them by timm's names"),
    rb"\s*<(!doctype|html|\?xml)": ("a page of the web", "the download went wrong; get it again"),
    rb"version https://git-lfs": ("a pointer of Git LFS", "`git lfs pull` gets what it stands for"),
    rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd": ("compressed", "unpack it first"),
    rb".{4}TFL3": ("a network of TensorFlow Lite", "take the weights it was made from"),
    rb"GGUF": ("GGUF, of quantized weights", "take the weights it was made from"),
}
_ENDINGS = {
    r"\.(data-\d+-of-\d+|index)": ("part of a checkpoint of TensorFlow", REWRITE_KERAS),
    r"\.pb": ("a graph of TensorFlow", REWRITE_KERAS),
    r"\.onnx": ("a network of ONNX", "take the weights it was made from"),
    r"\.(pth|pt|bin)": ("no file that torch writes today", _REWRITE_TORCH),
    r"\.keras": ("no archive of Keras", "Keras writes one by model.save_weights('model.weights.h5')"),
}


# The caller's side ---------------------------------------------------------------------------------


def recognize(path: Path) -> str:
    """Returns the format of a file, 'hdf5', 'safetensors' or 'npz', by its content or else by its name.

    Raises:
      ValueError: the format is another one; the message says which, and how to get weights from it.
      OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        head, size = file.read(4096), file.seek(0, os.SEEK_END)
        file.seek(max(0, size - len(TABLE_MAGIC)))
        tail = file.read(len(TABLE_MAGIC))
    if head.startswith(HDF5_SIGNATURE):
        return "hdf5"
    if head.startswith(b"PK\x03\x04"):
        first = head[30 : 30 + int.from_bytes(head[26:28], "little")]
        if first.endswith(b".npy") or path.suffix == ".npz":
            return "npz"
        if first in (b"metadata.json", b"config.json", b"model.weights.h5"):
            load = "Keras writes one by keras.models.load_model(FILE).save_weights('model.weights.h5')"
            what, advice = "an archive of Keras", load
        elif re.search(rb"(^|/)(data\.pkl|\.format_version|\.data/|code/|version|byteorder)", first):
            what, advice = "an archive of torch", _REWRITE_TORCH
        else:
            what, advice = "a zip archive", "unpack it first"
    elif head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= size - 8:
        return "safetensors"
    elif tail == TABLE_MAGIC:
        what, advice = "a checkpoint of TensorFlow", REWRITE_KERAS
    elif not size:
        what, advice = "empty", "it was never written, or its download went wrong"
    else:
        begun = (found for start, found in _BEGINNINGS.items() if re.match(start, head, re.IGNORECASE | re.DOTALL))
        ended = (found for end, found in _ENDINGS.items() if re.fullmatch(f".*{end}", path.name, re.DOTALL))
        what, advice = next(begun, None) or next(ended, ("something else", "other formats are not read"))
        formats = {".h5": "hdf5", ".hdf5": "hdf5", ".safetensors": "safetensors", ".npz": "npz"}
        if what == "something else" and path.suffix in formats:
            return formats[path.suffix]  # damaged: its reader says how
    raise ValueError(
        f"{path} must be .h5 (Keras), .safetensors or .npz (timm), or a workdir; this is {what}; {advice}."
    )


def read(path: Path, form: str, max_bytes: int = MAX_BYTES) -> Layers:
    """Returns the name and the arrays of each entry of a file: a Keras layer for 'hdf5', otherwise a single array.

    Arrays are float32 or float64. Arrays of other types, such as integers, are not weights and raise an error, except
    for the counters of Keras and torch, which are skipped.

    Args:
      path: of the file.
      form: from `recognize`.
      max_bytes: limit of all arrays together, by the sizes that the file declares.

    Raises:
      ValueError: the file cannot be read; the message is the reason.
    """
    # -P keeps the folder of this file off the import path, where `keras` and `timm` are modules of this package.
    command = [sys.executable, "-P", __file__, form, path, str(max_bytes), str(SECONDS), str(CPU_SECONDS)]
    # One thread is enough, and HDF5 must not load plugins that a file names.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "HDF5_PLUGIN_PRELOAD": "::"}
    try:
        reader = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
    except OSError as error:
        raise ValueError(f"its reader cannot be started: {error.strerror}") from None
    with reader:
        try:
            layers = _received(reader.stdout)
        except BaseException:
            reader.kill()
            raise
    if layers is None:
        raise ValueError(_end(reader.returncode))
    return layers


def _received(pipe: IO[bytes]) -> Layers | None:
    """Returns the reader's arrays, or None if it ended before it had sent them all."""
    line = pipe.readline(MAX_ANSWER)
    if not line.endswith(b"\n"):
        return None
    answer = json.loads(line)
    if "error" in answer:
        raise ValueError(answer["error"])
    layers = []
    for name, described in answer["layers"]:
        arrays = []
        for dtype, shape in described:
            data = pipe.read(math.prod(shape) * np.dtype(dtype).itemsize)
            if len(data) < math.prod(shape) * np.dtype(dtype).itemsize:
                return None
            arrays.append(np.frombuffer(data, dtype).reshape(shape))
        layers.append((name, arrays))
    return layers


def _end(code: int) -> str:
    if code >= 0:
        return f"its reader ended with code {code}"
    name = signal.Signals(-code).name
    if -code in (signal.SIGALRM, signal.SIGXCPU):
        return f"its reader was not done after {CPU_SECONDS if -code == signal.SIGXCPU else SECONDS} s"
    if -code in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        return f"its reader was ended from outside ({name})"
    return f"the library that reads it crashed ({name}); the file is damaged"


# The reader's side ---------------------------------------------------------------------------------


class Room(NamedTuple):
    """How much may be read. Each array is checked by its header, before it is read."""

    max_bytes: int
    taken: list[int]

    def check(self, name: str, dtype: np.dtype, shape: tuple[int, ...] | None) -> int:
        """Returns the size in bytes of an array that may be read.

        Raises:
          ValueError: it is not an array of real floating-point numbers, or there is no room for it.
        """
        bfloat16 = dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None and dtype.subdtype is None
        if not bfloat16 and not (dtype.kind == "f" and dtype.itemsize in (2, 4, 8)):
            raise ValueError(f"{name} has the type {dtype}; expected floating-point numbers of 16, 32 or 64 bits")
        if shape is None or any(n < 0 for n in shape):
            raise ValueError(f"{name} has the shape {shape}; expected an array")
        self.taken.append(math.prod(shape) * dtype.itemsize)
        if sum(self.taken) > self.max_bytes:
            raise ValueError(
                f"with {name}, of shape {shape}, its arrays take more than {self.max_bytes:,} bytes; expected less"
            )
        return self.taken[-1]


def _native(array: np.ndarray) -> np.ndarray:
    """Returns the same values as little-endian float32 or float64."""
    if array.dtype.kind == "V":  # bfloat16, as written by ml_dtypes and Keras: the upper half of a float32
        return (array.view("<u2").astype("<u4") << 16).view("<f4")
    return array.astype("<f8" if array.dtype.itemsize == 8 else "<f4")


def _child(group: Any, name: str) -> Any:
    """Returns the object in an HDF5 group at `name`, which may be a path. Links to other places are refused."""
    import h5py

    for part in name.split("/"):
        if not isinstance(group, h5py.Group) or part not in group:
            raise ValueError(f"there is no {name} in {getattr(group, 'name', group)}")
        if not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise ValueError(f"{group.name.rstrip('/')}/{part} is a link to another place; expected the thing itself")
        group = group[part]
    return group


def _dataset(group: Any, name: str, room: Room) -> np.ndarray:
    import h5py

    dataset = _child(group, name)
    if not isinstance(dataset, h5py.Dataset):
        raise ValueError(f"{dataset.name} is no array")
    if dataset.external or dataset.is_virtual:
        raise ValueError(f"{dataset.name} has its numbers in another file or array; expected them here")
    room.check(dataset.name, dataset.dtype, dataset.shape)
    if dataset.dtype.kind == "f" and dataset.id.get_type() != h5py.h5t.py_create(dataset.dtype):
        raise ValueError(f"{dataset.name} has numbers of a type of its own; expected those of IEEE 754")
    if dataset.size and not _is_whole(dataset):  # missing parts would be read as zeros
        raise ValueError(f"{dataset.name} has not all of its numbers in the file")
    return _native(dataset[()])


def _is_whole(dataset: Any) -> bool:
    if not dataset.chunks:
        return dataset.id.get_storage_size() >= dataset.nbytes
    chunks = math.prod(-(-n // chunk) for n, chunk in zip(dataset.shape, dataset.chunks, strict=True))
    return dataset.id.get_num_chunks() >= chunks


def _vars(group: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Yields the groups named 'vars', one for each layer of Keras 3, with their places."""
    import h5py

    # HDF5 allows a group to be in several groups, and in itself.
    address = h5py.h5o.get_info(group.id).addr
    if address in seen:
        raise ValueError(f"{group.name} is in it twice")
    seen.add(address)
    for name in group:
        # Skip the optimizer's variables and the states of random number generators.
        if (group.name == "/" and name == "optimizer") or name == "seed_generator":
            continue
        item = _child(group, name)
        if isinstance(item, h5py.Group) and name == "vars":
            yield group.name, item
        elif isinstance(item, h5py.Group):
            yield from _vars(item, seen)


def _read_hdf5(path: Path, room: Room) -> Layers:
    """Returns layers that Keras wrote. A layer without a name gets its place in the file, which begins with '/'."""
    import h5py

    with h5py.File(path, "r") as file:
        top = _child(file, "model_weights") if "model_weights" in file else file
        if "layer_names" not in top.attrs:  # Keras 3
            groups = [
                (group.attrs.get("name", place), group, map(str, range(len(group))))
                for place, group in _vars(file, set())
            ]
        else:  # Keras 1 and 2
            groups = [(name, _child(top, _text(name)), None) for name in top.attrs["layer_names"]]
            groups = [(name, group, map(_text, group.attrs["weight_names"])) for name, group, _ in groups]
        return [(_text(name), [_dataset(group, w, room) for w in names]) for name, group, names in groups]


def _text(name: Any) -> str:
    """Returns a name from a file as a string. It must be printable, since it may get into a message."""
    text = name.decode() if isinstance(name, bytes) else name
    if not isinstance(text, str) or not text.isprintable():
        raise ValueError(f"a name in it is {text!r:.80}; expected text that can be printed")
    return str(text)


def _is_counter(name: str) -> bool:
    """Whether an array of torch counts the batches behind the moving statistics; nothing here uses it."""
    return name.endswith("num_batches_tracked")


def _read_npz(path: Path, room: Room) -> Layers:
    import zipfile

    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    found: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = _text(member.filename.removesuffix(".npy"))
            if _is_counter(name):
                continue
            if name in found:
                raise ValueError(f"{name} is in it twice")
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                if version not in headers:
                    raise ValueError(f"{name} is in version {version} of NumPy's format; expected 1.0 or 2.0")
                shape, fortran_order, dtype = headers[version](file)
                if room.check(name, dtype, shape) != member.file_size - file.tell():
                    raise ValueError(f"{name} has another number of bytes than its shape {shape} needs")
                data = file.read()  # to the end, so that zipfile compares the checksum
            found[name] = _native(np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C"))
    return [(name, [array]) for name, array in found.items()]


def _read_safetensors(path: Path, room: Room) -> Layers:
    import safetensors

    if path.stat().st_size > room.max_bytes:
        raise ValueError(f"it has more than {room.max_bytes:,} bytes; expected less")
    types = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "BF16": np.dtype("V2")}
    layers = []
    for name, entry in safetensors.deserialize(path.read_bytes()):
        if _is_counter(name):
            continue
        if entry["dtype"] not in types:
            raise ValueError(f"{name} has the type {entry['dtype']}; expected {', '.join(types)}")
        dtype, shape = types[entry["dtype"]], tuple(entry["shape"])
        room.check(name, dtype, shape)
        layers.append((_text(name), [_native(np.frombuffer(entry["data"], dtype).reshape(shape))]))
    return layers


READERS: dict[str, Callable[[Path, Room], Layers]] = {
    "hdf5": _read_hdf5,
    "npz": _read_npz,
    "safetensors": _read_safetensors,
}


def _bound(seconds: int, cpu_seconds: int, max_bytes: int) -> None:
    """Makes the kernel end this process after a time, with its caller and at Ctrl-C, even in native code."""
    import resource

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.alarm(seconds)
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    # Memory: what the libraries themselves take, and a few copies of the arrays.
    limits = {"RLIMIT_CORE": 0, "RLIMIT_CPU": cpu_seconds, "RLIMIT_AS": 2**32 + 4 * max_bytes}
    for name, value in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        with contextlib.suppress(ValueError, OSError):  # macOS does not support RLIMIT_AS
            resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _main(form: str, path: str, max_bytes: str, seconds: str, cpu_seconds: str) -> None:
    _bound(int(seconds), int(cpu_seconds), int(max_bytes))
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keep what a library prints out of the answer
    try:
        layers = READERS[form](Path(path), Room(int(max_bytes), []))
    except BaseException as error:  # h5py, zipfile, NumPy and Rust raise all kinds of exceptions
        reason = f"{error}" if type(error) is ValueError else f"{type(error).__name__}: {error}"
        line = "".join(c if c.isprintable() else "?" for c in " ".join(reason.split())[:300].rstrip("."))
        answer.write(json.dumps({"error": line}).encode() + b"\n")
    else:
        described = [[name, [(array.dtype.str, array.shape) for array in arrays]] for name, arrays in layers]
        line = json.dumps({"layers": described})
        if len(line) >= MAX_ANSWER:
            layers, line = [], json.dumps({"error": "it has more arrays than any network"})
        answer.write(line.encode() + b"\n")
        for _, arrays in layers:
            for array in arrays:
                answer.write(array.tobytes())
    answer.close()


if __name__ == "__main__":
    _main(*sys.argv[1:])
