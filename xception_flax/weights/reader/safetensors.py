"""Reads .safetensors files."""

from pathlib import Path

import numpy as np
import safetensors

from xception_flax.weights.reader.room import Contents, Room, is_counter, native, parsed, printable

_TYPES = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "BF16": np.dtype("V2")}


def read(path: Path, room: Room) -> Contents:
    """Returns the arrays by their names, and the file's metadata. Raises ValueError as the package says."""
    if path.stat().st_size > room.max_bytes:
        raise ValueError(f"it has more than {room.max_bytes:,} bytes; expected less")
    data, entries = path.read_bytes(), []
    for name, entry in safetensors.deserialize(data):
        if is_counter(name):
            continue
        if entry["dtype"] not in _TYPES:
            raise ValueError(f"{name} has the type {entry['dtype']}; expected {', '.join(_TYPES)}")
        dtype, shape = _TYPES[entry["dtype"]], tuple(entry["shape"])
        room.check(name, dtype, shape)
        entries.append((printable(name), [native(np.frombuffer(entry["data"], dtype).reshape(shape))]))
    header = parsed("the header", data[8 : 8 + int.from_bytes(data[:8], "little")])
    return Contents(entries, header.get("__metadata__") or {})  # null is none
