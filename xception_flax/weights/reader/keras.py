"""Reads .keras files, the archives of Keras 3: a model's configuration and its weights."""

import zipfile
from pathlib import Path

import h5py

from xception_flax.weights.reader import archives, hdf5
from xception_flax.weights.reader.room import DESCRIPTION, MAX_CONFIG, Contents, Room, parsed

WEIGHTS = "model.weights.h5"
COPIES = 4  # the weights, what an optimizer keeps of each, and some to spare


def read(path: Path, room: Room) -> Contents:
    """Returns the layers and the configuration. Raises ValueError as the package says."""
    with zipfile.ZipFile(path) as archive:
        members = archives.members(archive)
        config = {
            name: parsed(f"{name}.json", archives.data(archive, members[f"{name}.json"], MAX_CONFIG))
            for name in ("config", "metadata", DESCRIPTION)
            if f"{name}.json" in members
        }
        if "config" not in config or WEIGHTS not in members:
            others = sorted(name for name in members if name.startswith("model") and name != WEIGHTS)
            has = f"; it has {', '.join(others[:3])}, which is not read" if others else ""
            raise ValueError(f"it has no {WEIGHTS if 'config' in config else 'config.json'}{has}")
        content = archives.data(archive, members[WEIGHTS], COPIES * room.max_bytes)
    with h5py.File(h5py.h5f.open_file_image(content)) as file:
        return Contents(hdf5.layers(file, room), {"metadata": {}} | config)
