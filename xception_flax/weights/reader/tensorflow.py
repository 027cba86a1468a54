"""Reads TensorFlow's checkpoints, without TensorFlow: NAME.index and NAME.data-00000-of-00001.

The index is a table as LevelDB has them: blocks of names, each with a protocol buffer about one array, and a block of
where these blocks are. The data are the arrays' numbers, one after the other. Every block and every array has its
CRC-32C, so that no changed number is taken for a weight. (TensorFlow: `core/util/tensor_bundle`,
`core/lib/io/format.cc`, `core/protobuf/tensor_bundle.proto`.)

It is a reader of our own, since TensorFlow takes 600 MB, which is much for a file that is read once.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xception_flax.weights.reader.crc32c import crc32c, masked
from xception_flax.weights.reader.room import Contents, Room, native, printable

MAGIC = bytes.fromhex("57fb808b247547db")  # at the end of the index
FOOTER_BYTES, TRAILER_BYTES = 48, 5  # of a table; of a block: its compression, and its checksum

MAX_INDEX = 2**22  # bytes; that of Xception 71 with its training's slots takes 300,000
MAX_NAMES = 2**16
MAX_MESSAGE = 1000  # bytes about one array, which take about 30
MAX_SHARDS = 256
MAX_LETTERS = 1000  # of a name
MAX_RANK = 8

AVERAGE = "/ExponentialMovingAverage"  # behind the name of the array that it is of

_TYPES = {1: np.dtype("<f4"), 2: np.dtype("<f8"), 14: np.dtype("V2"), 19: np.dtype("<f2")}  # DT_FLOAT, DT_DOUBLE, ...
_INTEGERS, _STRING = {3: 4, 9: 8}, 7  # DT_INT32, DT_INT64 and their bytes; DT_STRING


def read(path: Path, room: Room) -> Contents:
    """Returns the arrays by their names, such as 'xception_65/logits/weights'.

    Single integers, such as `global_step`, and texts, such as the graph of objects of TensorFlow 2, are skipped. So is
    what an optimizer keeps of an array, which has the array's name and one part more; averages are not.

    Args:
      path: of the index; the data are beside it.
      room: for the arrays.

    Raises:
      ValueError: as the package says.
    """
    if path.stat().st_size > MAX_INDEX:
        raise ValueError(f"its index has more than {MAX_INDEX:,} bytes; expected less")
    messages = _entries(path.read_bytes())
    shards = _num_shards(next(messages, (None, b"")))
    entries: dict[str, _Entry] = {}
    for key, value in messages:
        if len(entries) == MAX_NAMES:
            raise ValueError(f"it has more than {MAX_NAMES:,} names; expected less")
        name = printable(key)
        entries[name] = _entry(name, value)
    _check_apart(entries)
    opened: dict[int, mmap.mmap] = {}
    arrays: dict[str, np.ndarray] = {}
    for name, entry in entries.items():
        if entry.dtype == _STRING or (entry.dtype in _INTEGERS and entry.shape == ()):
            continue
        if _is_slot(name, entries):
            continue
        if entry.dtype not in _TYPES:
            raise ValueError(f"{name} has the type {entry.dtype} of TensorFlow; expected floating-point numbers")
        dtype = _TYPES[entry.dtype]
        if room.check(name, dtype, entry.shape) != entry.size:
            raise ValueError(f"{name} has another number of bytes than its shape {entry.shape} needs")
        if entry.shard >= shards:
            raise ValueError(f"{name} is in part {entry.shard} of {shards}")
        if entry.size and entry.shard not in opened:
            opened[entry.shard] = _opened(path, entry.shard, shards)
        data = opened[entry.shard][entry.offset : entry.offset + entry.size] if entry.size else b""
        if len(data) != entry.size:
            raise ValueError(f"{name} reaches beyond the end of {_data(path, entry.shard, shards).name}")
        if masked(crc32c(data)) != entry.checksum:
            raise ValueError(f"{name} has another checksum than its numbers; the file is damaged")
        arrays[name] = native(np.frombuffer(data, dtype).reshape(entry.shape))
    return Contents([(name, [array]) for name, array in arrays.items()], {})


def _is_slot(name: str, entries: dict[str, "_Entry"]) -> bool:
    """Whether an optimizer keeps it of an array, or it is the average of such a thing."""
    whose = name.rpartition("/")[0]
    return whose in entries and (not name.endswith(AVERAGE) or _is_slot(whose, entries))


def _check_apart(entries: dict[str, "_Entry"]) -> None:
    """Checks that no two arrays have numbers in common, by which a small file would become large arrays."""
    end = (0, 0)
    for shard, offset, size, name in sorted((e.shard, e.offset, e.size, name) for name, e in entries.items() if e.size):
        if (shard, offset) < end:
            raise ValueError(f"{name} has numbers in common with another array")
        end = (shard, offset + size)


def _data(index: Path, shard: int, shards: int) -> Path:
    return index.with_name(f"{index.name.removesuffix('.index')}.data-{shard:05d}-of-{shards:05d}")


def _opened(index: Path, shard: int, shards: int) -> mmap.mmap:
    path = _data(index, shard, shards)
    if path.exists() and not path.is_file():  # opening a pipe would wait for who writes into it
        raise ValueError(f"its numbers are in {printable(path.name)}, which is no file")
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ValueError(
            f"its numbers are in {printable(path.name)}, which cannot be opened: {error.strerror}"
        ) from None


# The table -----------------------------------------------------------------------------------------


def _entries(table: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields names and values, in the order of the names."""
    if len(table) < FOOTER_BYTES or not table.endswith(MAGIC):
        raise ValueError("it does not end as an index of TensorFlow")
    footer = table[-FOOTER_BYTES:]
    _, _, index = _handle(footer, 0)  # of the block about other blocks, which has nothing
    previous, end = None, 0
    for _, handle in _block(table, *_handle(footer, index)[:2]):
        offset, size, _ = _handle(handle, 0)
        if offset < end:
            raise ValueError("the parts of its index are not one after the other")
        begin, end = previous, offset + size + TRAILER_BYTES
        for key, value in _block(table, offset, size):
            if previous is not None and key <= previous:
                raise ValueError("its names are not in their order")
            previous = key
            yield key, value
        if previous is begin:
            raise ValueError("a part of its index has no names")


def _block(table: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yields names and values of a block; a name has only what differs from the one before it."""
    block = table[offset : offset + size + TRAILER_BYTES]
    if len(block) != size + TRAILER_BYTES or size < 4:
        raise ValueError("a part of its index is missing")
    if masked(crc32c(block[:-4])) != int.from_bytes(block[-4:], "little"):
        raise ValueError("its index has another checksum than its content; the file is damaged")
    if block[size]:
        raise ValueError(f"its index has the compression {block[size]}; expected none, as TensorFlow writes it")
    end = size - 4 - 4 * int.from_bytes(block[size - 4 : size], "little")  # behind it are places of whole names
    place, key = 0, b""
    while place < end:
        shared, place = _varint(block, place)
        more, place = _varint(block, place)
        length, place = _varint(block, place)
        if shared > len(key) or shared + more > MAX_LETTERS or place + more + length > end:
            raise ValueError("a part of its index is damaged")
        if length > MAX_MESSAGE:
            raise ValueError(f"its index has {length:,} bytes about one array; expected at most {MAX_MESSAGE:,}")
        key = key[:shared] + block[place : place + more]
        yield key, block[place + more : place + more + length]
        place += more + length


def _handle(data: bytes, place: int) -> tuple[int, int, int]:
    """Returns where a block is: its offset and its size; and the place behind that."""
    offset, place = _varint(data, place)
    size, place = _varint(data, place)
    return offset, size, place


# Protocol buffers ----------------------------------------------------------------------------------


class _Entry(NamedTuple):
    """A BundleEntryProto."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int


def _entry(name: str, value: bytes) -> _Entry:
    fields = _fields(value)
    if 7 in fields:
        raise ValueError(f"{name} is in slices, a part a variable; expected it whole: save it without a partitioner")
    shape = []
    for dim in _of_type(_fields(_last(fields, 2, b"")).get(2, []), bytes):
        (size,) = _of_type(_fields(dim).get(1, [0])[-1:], int)
        shape.append(size - 2**64 if size >= 2**63 else size)
    if len(shape) > MAX_RANK:
        raise ValueError(f"{name} has {len(shape)} dimensions; expected at most {MAX_RANK}")
    numbers = (_last(fields, field, 0) for field in (1, 3, 4, 5, 6))
    dtype, shard, offset, size, checksum = numbers
    return _Entry(dtype, tuple(shape), shard, offset, size, checksum)


def _num_shards(header: tuple[bytes | None, bytes]) -> int:
    """Returns the number of files of data, by the BundleHeaderProto, whose name is empty."""
    key, value = header
    if key != b"":
        raise ValueError("its index does not begin with a header")
    fields = _fields(value)
    if _last(fields, 2, 0) != 0:
        raise ValueError("its numbers are big-endian; expected little-endian")
    shards = _last(fields, 1, 0)
    if not 1 <= shards <= MAX_SHARDS:
        raise ValueError(f"its numbers are in {shards} files; expected 1 to {MAX_SHARDS}")
    return shards


def _last(fields: dict[int, list[Any]], number: int, default: Any) -> Any:
    """The value of a field that is there once, or its default."""
    return _of_type(fields.get(number, [default])[-1:], type(default))[0]


def _of_type(values: list[Any], kind: type) -> list[Any]:
    if any(type(value) is not kind for value in values):
        raise ValueError("a part of its index is no message of TensorFlow")
    return values


def _fields(message: bytes) -> dict[int, list[Any]]:
    """Returns the values of each field: ints of varints and of fixed numbers, bytes of all else."""
    found: dict[int, list[Any]] = {}
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        kind = tag & 7
        value: int | bytes
        if kind == 0:
            value, place = _varint(message, place)
        elif kind in (1, 2, 5):
            length, place = _varint(message, place) if kind == 2 else (8 if kind == 1 else 4, place)
            value, place = message[place : place + length], place + length
            if place > len(message):
                raise ValueError("a part of its index is cut off")
            value = value if kind == 2 else int.from_bytes(value, "little")
        else:
            raise ValueError("a part of its index is no message of TensorFlow")
        found.setdefault(tag >> 3, []).append(value)
    return found


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """Returns a number of seven bits a byte, the lowest first, and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            break
        byte = data[place]
        value, place = value | (byte & 0x7F) << shift, place + 1
        if byte < 0x80:
            return value, place
    raise ValueError("a number in its index is cut off")
