"""Reads the HDF5 files that Keras writes: weights alone, or whole models."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from xception_flax.weights.reader.room import DESCRIPTION, MAX_CONFIG, Contents, Room, native, parsed, printable


def _child(group: Any, name: str) -> Any:
    """Returns the object in an HDF5 group at `name`, which may be a path. Links to other places are refused."""
    for part in name.split("/"):
        if not isinstance(group, h5py.Group) or part not in group:
            raise ValueError(f"there is no {name} in {getattr(group, 'name', group)}")
        if not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise ValueError(f"{group.name.rstrip('/')}/{part} is a link to another place; expected the thing itself")
        group = group[part]
    return group


def _dataset(group: Any, name: str, room: Room) -> np.ndarray:
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
    return native(dataset[()])


def _is_whole(dataset: Any) -> bool:
    if not dataset.chunks:
        return dataset.id.get_storage_size() >= dataset.nbytes
    chunks = math.prod(-(-n // chunk) for n, chunk in zip(dataset.shape, dataset.chunks, strict=True))
    return dataset.id.get_num_chunks() >= chunks


def _vars(group: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Yields the groups named 'vars', one for each layer of Keras 3, with their places."""
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


def read(path: Path, room: Room) -> Contents:
    """Returns the layers that Keras wrote, and a whole model's configuration. Raises ValueError as the package says.

    A layer without a name gets its place in the file, which begins with '/'.
    """
    with h5py.File(path, "r") as file:
        return Contents(layers(file, room), _config(file))


def layers(file: h5py.File, room: Room) -> list[tuple[str, list[np.ndarray]]]:
    """Returns (name, arrays) of each layer in an open file, also of the layers of a model within a model."""
    top = _child(file, "model_weights") if "model_weights" in file else file
    if "layer_names" not in top.attrs:  # Keras 3
        groups = [
            (group.attrs.get("name", place), group, list(map(str, range(len(group)))))
            for place, group in _vars(file, set())
        ]
    else:  # Keras 1 and 2, and whole models of all versions
        groups = [layer for name in top.attrs["layer_names"] for layer in _layers(top, printable(name))]
    return [
        (printable(name), [_dataset(group, weight, room) for weight in names if not _is_counter(group, weight)])
        for name, group, names in groups
    ]


def _layers(top: h5py.Group, name: str) -> Iterator[tuple[str, h5py.Group, list[str]]]:
    """Yields the layer of this name, or, where it is a model, its layers: a layer's arrays have a common path."""
    group = _child(top, name)
    arrays = list(map(printable, _names(group, "weight_names")))
    paths = dict.fromkeys(array.rpartition("/")[0] for array in arrays)
    for path in paths if len(paths) > 1 else ():
        weights = [array for array in arrays if array.rpartition("/")[0] == path]
        yield path.rpartition("/")[2] or name, group, weights
    if len(paths) <= 1:
        yield name, group, arrays


def _names(group: h5py.Group, attribute: str) -> Iterator[Any]:
    """Yields a list of names. Keras cuts it where it is too long for one attribute."""
    if attribute in group.attrs or f"{attribute}0" not in group.attrs:
        yield from group.attrs[attribute]
    for i in itertools.takewhile(lambda i: f"{attribute}{i}" in group.attrs, itertools.count()):
        yield from group.attrs[f"{attribute}{i}"]


def _is_counter(group: h5py.Group, name: str) -> bool:
    """Whether an array counts the batches behind the statistics of a `Normalization`; nothing here uses it."""
    dataset = _child(group, name)
    return isinstance(dataset, h5py.Dataset) and dataset.dtype.kind in "iu" and dataset.shape == ()


def _config(file: h5py.File) -> dict[str, Any]:
    """Returns what `model.save()` writes beside the weights, and what we do; {} if only weights were saved."""
    ours = {DESCRIPTION: _object(file, DESCRIPTION)} if DESCRIPTION in file.attrs else {}
    if "model_config" not in file.attrs:
        return ours
    versions = {name: printable(file.attrs[name]) for name in ("keras_version", "backend") if name in file.attrs}
    return {"config": _object(file, "model_config"), "metadata": versions} | ours


def _object(file: h5py.File, attribute: str) -> dict[str, Any]:
    if file.attrs.get_id(attribute).get_storage_size() > MAX_CONFIG:
        raise ValueError(f"{attribute} has more than {MAX_CONFIG:,} bytes; expected less")
    return parsed(attribute, file.attrs[attribute])
