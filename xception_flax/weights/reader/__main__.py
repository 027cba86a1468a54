"""The process itself: its limits, and what it sends back.

It gets the format, the file, and the limits, and writes a line of JSON to standard output, {"entries": [[name, [[type,
shape], ...]], ...], "config": {...}} or {"error": reason}, and then the numbers of all arrays, one after the other.
"""

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

from xception_flax.weights.reader.room import MAX_ANSWER, Room


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


def main(form: str, path: str, max_bytes: str, seconds: str, cpu_seconds: str) -> None:
    """Reads a file, and writes the answer to standard output.

    Args:
      form: the name of a module of this package that has `read`.
      path: of the file.
      max_bytes: limit of all arrays together.
      seconds: limit of the time.
      cpu_seconds: limit of the time of the processor.
    """
    _bound(int(seconds), int(cpu_seconds), int(max_bytes))
    with os.fdopen(os.dup(1), "wb") as answer:
        os.dup2(2, 1)  # keep what a library prints out of the answer
        line, arrays = _answer(form, Path(path), Room(int(max_bytes)))
        answer.write(json.dumps(line).encode() + b"\n")
        for array in arrays:
            answer.write(array.tobytes())


def _answer(form: str, path: Path, room: Room) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Returns the answer's line, and the arrays that follow it."""
    try:
        entries, config = importlib.import_module(f"xception_flax.weights.reader.{form}").read(path, room)
        described = [(name, [(array.dtype.str, array.shape) for array in arrays]) for name, arrays in entries]
        line = {"entries": described, "config": config}
        if len(json.dumps(line)) >= MAX_ANSWER:
            raise ValueError("it has more arrays, or says more about them, than any network")
    except BaseException as error:  # h5py, zipfile, NumPy and Rust raise all kinds of exceptions
        reason = f"{error}" if type(error) is ValueError else f"{type(error).__name__}: {error}"
        if "File is not a zip file" in reason:  # the list of its contents, at its end, is not there
            reason = "it has not the end of an archive (zip), so it may be incomplete; copy it or fetch it again"
        return {"error": "".join(c if c.isprintable() else "?" for c in " ".join(reason.split())[:300].rstrip("."))}, []
    return line, [array for _, arrays in entries for array in arrays]


if __name__ == "__main__":
    main(*sys.argv[1:])
