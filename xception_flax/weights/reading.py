"""Reads arrays from files of other libraries: recognizes the format, and has a process of its own read it.

Why a process: see `weights.reader`, which is that.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import numpy as np

from xception_flax.text.errors import UserError
from xception_flax.weights.reader.room import MAX_ANSWER, Contents

MAX_BYTES = 2**32  # default limit of all arrays together

# Limits of a reader.
CPU_SECONDS = 20  # the largest network takes a hundredth
SECONDS = 600  # the disk may be slow

# The reader's program. It finds this very package first, and then everything where its caller's Python does; -P keeps
# the current folder out of that.
_PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv[1]); import xception_flax; del sys.path[0]; "
    "from xception_flax.weights.reader.__main__ import main; main(*sys.argv[2:])"
)

FORMATS = {  # the modules of `weights.reader`
    "hdf5": "weights of Keras",
    "keras": "a Keras archive",
    "npz": "an .npz archive of arrays",
    "safetensors": "a safetensors file",
    "tensorflow": "a checkpoint of TensorFlow",
    "torch": "a file of torch.save",
}

_SUFFIXES = {
    **{".h5": "hdf5", ".hdf5": "hdf5", ".keras": "keras", ".npz": "npz", ".safetensors": "safetensors"},
    **dict.fromkeys((".pth", ".pt", ".bin", ".ckpt"), "torch"),
    ".index": "tensorflow",
}

_NO_ZIP = (".h5", ".hdf5", ".safetensors", ".index")  # whatever begins like a zip archive is not theirs

# How files begin. HDF5 and NumPy files have the name of their format, a zip archive the name of its first member.
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
TABLE_MAGIC = bytes.fromhex("57fb808b247547db")  # at the end of TensorFlow's and LevelDB's tables
REWRITE_KERAS = "load it into the model with Keras, and write model.save_weights('model.weights.h5')"
_SAVE_STATE = "with torch, torch.save(model.state_dict(), FILE) writes what is read"
_TORCH_STREAM = rb"\x80[\x02-\x05].{0,9}\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19\."  # before torch 1.6: begins with a constant
_BEGINNINGS = {
    rb"\x80[\x02-\x05]": ("a pickle that torch.save did not write", _SAVE_STATE),
    rb"\x93NUMPY": ("a single array of NumPy", "np.savez(FILE, **arrays) writes all of them by timm's names"),
    rb"\s*<(!doctype|html|\?xml)": ("a page of the web", "the download went wrong; get it again"),
    rb"version https://git-lfs": ("a pointer of Git LFS", "`git lfs pull` gets what it stands for"),
    rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd": ("compressed", "unpack it first"),
    rb".{4}TFL3": ("a network of TensorFlow Lite", "take the weights it was made from"),
    rb"GGUF": ("GGUF, of quantized weights", "take the weights it was made from"),
}
_ENDINGS = {
    r"\.data-\d+-of-\d+": ("part of a checkpoint of TensorFlow", "its .index belongs beside it, and is not there"),
    r"\.pb": ("a graph of TensorFlow", REWRITE_KERAS),
    r"\.onnx": ("a network of ONNX", "take the weights it was made from"),
    r"\.weights\.json": ("the index of weights that Keras wrote into several files", REWRITE_KERAS),
    r"\.index\.json": ("the index of weights in several files", "write them into one"),
    r"\.(pth|pt|bin|ckpt)": ("no file of torch.save", _SAVE_STATE),
    r"\.keras": ("no archive of Keras", "Keras writes one by model.save('model.keras')"),
}


def recognize(path: Path) -> str:
    """Returns the format of a file, a key of `FORMATS`, by its content or else by its name.

    Raises:
      UserError: the format is another one; the message says which, and how to get weights from it.
      OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        head, size = file.read(4096), file.seek(0, os.SEEK_END)
        file.seek(max(0, size - len(TABLE_MAGIC)))
        tail = file.read(len(TABLE_MAGIC))
    if head.startswith(HDF5_SIGNATURE):
        return "hdf5"
    if tail == TABLE_MAGIC and path.suffix == ".index":
        return "tensorflow"
    if head.startswith(b"PK\x03\x04"):
        first = head[30 : 30 + int.from_bytes(head[26:28], "little")]
        by_content = {
            rb".*\.npy": "npz",
            rb"metadata\.json|config\.json|model\.weights\.h5": "keras",
            rb"(.*/)?(data\.pkl|\.format_version|\.data/.*|code/.*|version|byteorder|constants\.pkl)": "torch",
        }
        by_name = _SUFFIXES.get(path.suffix) if path.suffix not in _NO_ZIP else None
        if form := next((form for start, form in by_content.items() if re.fullmatch(start, first)), by_name):
            return form
        what, advice = "a zip archive", "unpack it first"
    elif re.match(_TORCH_STREAM, head, re.DOTALL):
        return "torch"
    elif head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= size - 8:
        return "safetensors"
    elif tail == TABLE_MAGIC:
        what, advice = "a table of TensorFlow", "of its checkpoints those are read that have NAME.index and NAME.data-*"
    elif not size:
        what, advice = "empty", "it was never written, or its download went wrong"
    else:
        begun = (found for start, found in _BEGINNINGS.items() if re.match(start, head, re.IGNORECASE | re.DOTALL))
        ended = (found for end, found in _ENDINGS.items() if re.fullmatch(f".*{end}", path.name, re.DOTALL))
        what, advice = next(begun, None) or next(ended, ("something else", "other formats are not read"))
        if what == "something else" and path.suffix in _SUFFIXES:
            return _SUFFIXES[path.suffix]  # damaged: its reader says how
    raise UserError(
        f"{path} must be .h5 or .keras (Keras), .pth, .safetensors or .npz (timm, torch), .index (DeepLab), or a "
        f"workdir; this is {what}; {advice}."
    )


def read(path: Path, form: str, max_bytes: int = MAX_BYTES) -> Contents:
    """Returns the arrays of a file, and what it says about them.

    Arrays are float32 or float64. Arrays of other types, such as integers, are not weights and raise an error, except
    for the counters of Keras and torch, which are skipped.

    Args:
      path: of the file.
      form: from `recognize`.
      max_bytes: limit of all arrays together, as float32 or float64, by the shapes that the file declares.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        return _read(path, form, max_bytes)
    except ValueError as error:
        reason = str(error).rstrip(".")
        raise UserError(f"{path} cannot be read as {FORMATS[form]}: {reason}.") from None


def _read(path: Path, form: str, max_bytes: int) -> Contents:
    folder = str(Path(__file__).resolve().parents[2])
    limits = map(str, (max_bytes, SECONDS, CPU_SECONDS))
    # One thread is enough, and HDF5 must not load plugins that a file names.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "HDF5_PLUGIN_PRELOAD": "::"}
    try:
        reader = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM, folder, form, path, *limits],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
    except OSError as error:
        raise ValueError(f"its reader cannot be started: {error.strerror}") from None
    with reader:
        try:
            contents = _received(reader.stdout)
        except BaseException:
            reader.kill()
            raise
    if contents is None:
        raise ValueError(_end(reader.returncode))
    return contents


def _received(pipe: IO[bytes]) -> Contents | None:
    """Returns what the reader found, or None if it ended before it had sent it all."""
    line = pipe.readline(MAX_ANSWER)
    if not line.endswith(b"\n"):
        return None
    answer = json.loads(line)
    if "error" in answer:
        raise ValueError(answer["error"])
    entries = []
    for name, described in answer["entries"]:
        arrays = []
        for dtype, shape in described:
            data = pipe.read(math.prod(shape) * np.dtype(dtype).itemsize)
            if len(data) < math.prod(shape) * np.dtype(dtype).itemsize:
                return None
            arrays.append(np.frombuffer(data, dtype).reshape(shape))
        entries.append((name, arrays))
    return Contents(entries, answer["config"])


def _end(code: int) -> str:
    if code >= 0:
        return f"its reader ended with code {code}"
    name = signal.Signals(-code).name
    if -code in (signal.SIGALRM, signal.SIGXCPU):
        return f"its reader was not done after {CPU_SECONDS if -code == signal.SIGXCPU else SECONDS} s"
    if -code in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        return f"its reader was ended from outside ({name})"
    return f"the library that reads it crashed ({name}); the file is damaged"
