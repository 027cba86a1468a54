"""Reads the .npz files of NumPy: a zip archive of arrays."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from xception_flax.weights.reader import archives
from xception_flax.weights.reader.room import MAX_CONFIG, Contents, Room, is_counter, native, parsed


def read(path: Path, room: Room) -> Contents:
    """Returns the arrays by their names, and what a member NAME.json says as `config[NAME]`.

    Raises:
      ValueError: as the package says.
    """
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    found: dict[str, np.ndarray] = {}
    config: dict[str, Any] = {}
    with zipfile.ZipFile(path) as archive:
        for file_name, member in archives.members(archive).items():
            if file_name.endswith(".json"):
                config[file_name.removesuffix(".json")] = parsed(file_name, archives.data(archive, member, MAX_CONFIG))
                continue
            name = file_name.removesuffix(".npy")
            if is_counter(name):
                continue
            if name in found:
                raise ValueError(f"{name} is in it twice")
            if member.file_size > room.max_bytes:
                raise ValueError(f"{name} has more than {room.max_bytes:,} bytes; expected less")
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                if version not in headers:
                    raise ValueError(f"{name} is in version {version} of NumPy's format; expected 1.0 or 2.0")
                shape, fortran_order, dtype = headers[version](file)
                if room.check(name, dtype, shape) != member.file_size - file.tell():
                    raise ValueError(f"{name} has another number of bytes than its shape {shape} needs")
                data = file.read()  # to the end, so that zipfile compares the checksum
            found[name] = native(np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C"))
    return Contents([(name, [array]) for name, array in found.items()], config)
