"""Reads the files of `torch.save`, without torch: a pickle, and the numbers that it refers to.

Since torch 1.6 that is a zip archive of `data.pkl`, `byteorder`, and a member for each block of numbers, `data/0`.
Before, it was five pickles, one after the other (a constant, the format's version, the machine, the object, the keys
of the blocks), and then the blocks, each after the number of its numbers. The numbers are little-endian there.
"""

import io
import mmap
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from xception_flax.weights.reader import archives, pickles
from xception_flax.weights.reader.room import Contents, Room, is_counter, native, printable

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the older format

MAX_PICKLE = 2**26  # bytes
MAX_NAMES = 2**16  # of arrays and other things
MAX_DEPTH = 16  # of dicts in dicts
MAX_LETTERS = 1000  # of a name or a text

Block = Callable[[str], bytes]  # returns the bytes of a block, by its key


def read(path: Path, room: Room) -> Contents:
    """Returns the arrays by name, such as 'state_dict.conv1.weight', and what else the file says in numbers and texts.

    Only dicts are looked into, and of them only what has a text as its key. The rest is for an optimizer.

    Raises:
      ValueError: as the package says.
    """
    with path.open("rb") as file:
        if file.read(2) == b"PK":
            with zipfile.ZipFile(file) as archive:
                return _contents(*_from_archive(archive, room.max_bytes), room)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _contents(*_from_stream(content), room)


def _from_archive(archive: zipfile.ZipFile, max_bytes: int) -> tuple[Any, Block, str]:
    """Returns the object, how to read its blocks, and the order of their bytes."""
    members = archives.members(archive)
    pickled = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
    if any(name.rpartition("/")[2] == "constants.pkl" for name in members):
        raise ValueError(
            "it is TorchScript, a program; with torch, torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth') "
            "writes its weights alone"
        )
    if len(pickled) != 1:
        raise ValueError(f"it has {len(pickled)} members named data.pkl; expected one, as torch.save writes it")
    folder, order = pickled[0].removesuffix("data.pkl"), "little"
    if f"{folder}byteorder" in members:  # since torch 2.1
        order = archives.data(archive, members[f"{folder}byteorder"], 16).decode()
    if order not in ("little", "big"):
        raise ValueError(f"its byteorder is {order!r}; expected 'little' or 'big'")
    value, storages = pickles.load(io.BytesIO(archives.data(archive, members[pickled[0]], MAX_PICKLE)))

    def block(key: str) -> bytes:
        name, num_bytes = f"{folder}data/{key}", storages[key].num_bytes
        if name not in members or members[name].file_size != num_bytes:
            raise ValueError(f"{name} is not there, or has not {num_bytes:,} bytes")
        return archives.data(archive, members[name], max_bytes)

    return value, block, order


def _from_stream(content: mmap.mmap) -> tuple[Any, Block, str]:
    """The same of the older format."""
    if pickles.load(content)[0] != _MAGIC or pickles.load(content)[0] != _PROTOCOL:
        raise ValueError("it does not begin as a file of torch.save")
    pickles.load(content)  # about the machine
    value, storages = pickles.load(content)
    keys, _ = pickles.load(content)
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
        raise ValueError("its list of storages is damaged")
    places, place = {}, content.tell()
    for key in keys:
        if content[place : place + 8] != storages[key].numel.to_bytes(8, "little"):
            raise ValueError(f"the storage {key} has not the size that the tensors in it need")
        places[key] = slice(place + 8, place + 8 + storages[key].num_bytes)
        place = places[key].stop
    if place != len(content):
        raise ValueError(f"it has {len(content):,} bytes; expected {place:,}, by the storages in it")
    return value, lambda key: content[places[key]], "little"


def _contents(value: Any, block: Block, order: str, room: Room) -> Contents:
    arrays: dict[str, np.ndarray] = {}
    config: dict[str, Any] = {}
    # Each block is read once, however many tensors share it.
    blocks, unread = {}, Room(room.max_bytes)
    for name, item in _leaves(value):
        if name in arrays or name in config:
            raise ValueError(f"{name} is in it twice")
        if not isinstance(item, pickles.Tensor):
            config[name] = item
        elif not is_counter(name):
            storage = item.storage
            room.check(name, storage.dtype, item.size)
            inside = _inside(name, item)
            if storage.key not in blocks:
                unread.check(f"the storage of {name}", storage.dtype, (storage.numel,))
                blocks[storage.key] = block(storage.key)
            arrays[name] = native(_view(item, inside, blocks[storage.key], order))
    return Contents([(name, [array]) for name, array in arrays.items()], config)


def _leaves(value: Any) -> Iterator[tuple[str, Any]]:
    """Yields the tensors, numbers and texts in nested dicts by their names, in order."""
    if not isinstance(value, dict):
        raise ValueError(f"it is a {type(value).__name__}; expected a dict of arrays by their names")
    visited, waiting = 0, [("", value, 0)]
    while waiting:
        name, item, depth = waiting.pop()
        visited += 1
        if visited + len(waiting) > MAX_NAMES:
            raise ValueError(f"it has more than {MAX_NAMES:,} names; expected less")
        if isinstance(item, dict):
            if depth == MAX_DEPTH:
                raise ValueError(f"it has more than {MAX_DEPTH} dicts in dicts")
            inside = [(_joined(name, key), held, depth + 1) for key, held in item.items() if isinstance(key, str)]
            waiting.extend(reversed(inside))
        elif isinstance(item, pickles.Tensor) or _is_plain(item):
            yield name, item


def _joined(name: str, key: str) -> str:
    if len(name) + len(key) >= MAX_LETTERS:
        raise ValueError(f"it has a name of more than {MAX_LETTERS:,} letters; expected less")
    return f"{name}.{printable(key)}" if name else printable(key)


def _is_plain(item: Any) -> bool:
    if isinstance(item, int):
        return item.bit_length() < 64
    return isinstance(item, float) or (isinstance(item, str) and len(item) <= MAX_LETTERS)


def _inside(name: str, tensor: pickles.Tensor) -> slice:
    """Returns which numbers of its block a tensor has.

    Raises:
      ValueError: it reaches beyond its storage.
    """
    steps = zip(tensor.size, tensor.stride, strict=True)
    length = 0 if 0 in tensor.size else 1 + sum((n - 1) * stride for n, stride in steps)
    if tensor.offset + length > tensor.storage.numel:
        raise ValueError(f"{name} reaches beyond its {tensor.storage.numel:,} numbers")
    start = tensor.storage.start + tensor.offset
    return slice(start, start + length)


def _view(tensor: pickles.Tensor, inside: slice, block: bytes, order: str) -> np.ndarray:
    dtype = tensor.storage.dtype
    bits = np.dtype(f"<u{dtype.itemsize}")
    numbers = np.frombuffer(block, bits.newbyteorder(order))[inside].astype(bits).view(dtype)
    if not numbers.size:
        return numbers.reshape(tensor.size)
    strides = [stride * dtype.itemsize if n > 1 else 0 for n, stride in zip(tensor.size, tensor.stride, strict=True)]
    return np.lib.stride_tricks.as_strided(numbers, tensor.size, strides)
