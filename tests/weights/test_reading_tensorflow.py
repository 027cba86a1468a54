"""Checkpoints that TensorFlow wrote, their checksums, and which one of a folder counts."""

import os

import numpy as np
import pytest

from golden.archives import unpacked
from xception_flax.training.sharding import create_mesh
from xception_flax.weights import reading
from xception_flax.weights.reader.crc32c import crc32c, masked
from xception_flax.weights.reader.room import MAX_CONFIG
from xception_flax.weights.source import open_source


@pytest.fixture
def folder(tmp_path):
    """One in which a test may change files."""
    return unpacked("deeplab.tar.xz", tmp_path) / "xception_41"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),  # of every catalogue of checksums
        (bytes(32), 0x8A9136AA),  # this and the next: RFC 3720, appendix B.4
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_crc32c(data, expected):
    assert crc32c(data) == expected


@pytest.mark.parametrize("size", [1, 3, 4, 5, 511, 512, 513, 777, 2**17 - 1, 2**17, 2**17 + 1, 300_003])
def test_crc32c_of_every_size_is_that_of_the_definition(size):
    """The remainder by the polynomial, a bit at a time."""
    data, register = np.random.RandomState(0).bytes(size), 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    assert crc32c(data) == register ^ 0xFFFFFFFF


def test_a_changed_number_is_found(folder):
    path = folder / "model.ckpt.data-00000-of-00001"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"model\.ckpt\.index cannot be read as a checkpoint of TensorFlow: .* has anot"
    ):
        reading.read(folder / "model.ckpt.index", "tensorflow")


def test_missing_numbers_are_named(folder):
    path = folder / "model.ckpt.data-00000-of-00001"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"reaches beyond the end of model\.ckpt\.data-00000-of-00001"):
        open_source(str(folder), create_mesh())
    path.unlink()
    with pytest.raises(
        ValueError, match=r"are in model\.ckpt\.data-00000-of-00001, which cannot be opened: No such file"
    ):
        open_source(str(folder), create_mesh())


def test_a_limit_of_all_arrays(folder):
    with pytest.raises(ValueError, match=r"its arrays take more than 10,000 bytes"):
        reading.read(folder / "model.ckpt.index", "tensorflow", 10_000)


def test_of_several_checkpoints_the_one_that_the_folder_names(folder):
    (folder / "golden.npz").unlink()
    for suffix in ("index", "data-00000-of-00001"):
        (folder / f"model.ckpt-7.{suffix}").write_bytes((folder / f"model.ckpt.{suffix}").read_bytes())
    with pytest.raises(
        ValueError, match=r"; it has 2 checkpoints of TensorFlow: give one, such as .*/model\.ckpt-7\.in"
    ):
        open_source(str(folder), create_mesh())
    state = 'model_checkpoint_path: "/elsewhere/model.ckpt-{}"\nall_model_checkpoint_paths: "a"\n'
    (folder / "checkpoint").write_text(state.format(7))
    assert open_source(str(folder), create_mesh()).origin["file"] == str(folder / "model.ckpt-7.index")
    (folder / "checkpoint").write_text(state.format(8))
    with pytest.raises(
        ValueError, match=r"the newest checkpoint is model\.ckpt-8, which is not there; give one that is"
    ):
        open_source(str(folder), create_mesh())
    # A file too long for one that says this is not read to its end, and says nothing.
    (folder / "checkpoint").write_text(state.format(7) + " " * MAX_CONFIG)
    with pytest.raises(ValueError, match=r"; it has 2 checkpoints of TensorFlow: give one"):
        open_source(str(folder), create_mesh())


def test_every_name_of_a_checkpoint(folder):
    for name in ("model.ckpt", "model.ckpt.index", "model.ckpt.data-00000-of-00001"):
        assert open_source(str(folder / name), create_mesh()).origin["file"] == str(folder / "model.ckpt.index")


def varint(number: int) -> bytes:
    parts = [number & 127]
    while number := number >> 7:
        parts[-1] |= 128
        parts.append(number & 127)
    return bytes(parts)


def block(*entries: tuple[bytes, bytes], compression: int = 0) -> bytes:
    """A block of a table of LevelDB."""
    content = b"".join(b"\0" + varint(len(key)) + varint(len(value)) + key + value for key, value in entries)
    return signed(content + bytes(4) + (1).to_bytes(4, "little"), compression)


def signed(content: bytes, compression: int = 0) -> bytes:
    """A block of this content, with its checksum."""
    content += bytes([compression])
    return content + masked(crc32c(content)).to_bytes(4, "little")


def table(*entries: tuple[bytes, bytes], compression: int = 0) -> bytes:
    first = block(*entries, compression=compression)
    return with_handles(first, varint(0) + varint(len(first) - 5))


def with_handles(blocks: bytes, *handles: bytes) -> bytes:
    """A table of these blocks, by where its index says they are."""
    index = block(*((b"z", handle) for handle in handles))
    footer = varint(0) + varint(0) + varint(len(blocks)) + varint(len(index) - 5)
    return blocks + index + footer + bytes(40 - len(footer)) + reading.TABLE_MAGIC


HEADER = (b"", b"\x08\x01")
FIRST, EMPTY = block(HEADER), block()


def entry(size: int, offset: int, dtype: int = 1, numbers: bytes = b"") -> bytes:
    """A message about an array of one dimension, with the checksum of its numbers."""
    itemsize = {1: 4, 19: 2}[dtype]
    dim = b"\x08" + varint(size)
    shape = b"\x12" + varint(len(dim)) + dim
    place = b"\x20" + varint(offset) + b"\x28" + varint(size * itemsize)
    checksum = b"\x35" + masked(crc32c(numbers)).to_bytes(4, "little")
    return b"\x08" + varint(dtype) + b"\x12" + varint(len(shape)) + shape + place + checksum


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (table(HEADER, compression=1), "its index has the compression 1; expected none"),
        (table((b"a", b"")), "its index does not begin with a header"),
        (table((b"", b"\x08\x01\x10\x01")), "its numbers are big-endian"),
        (table((b"", b"\x08\x00")), "its numbers are in 0 files; expected 1 to 256"),
        (table(HEADER, (b"a", b"\x08\x03\x12\x04\x12\x02\x08\x02")), "a has the type 3 of TensorFlow"),
        (table(HEADER, (b"a", b"\x08\x01\x28\x04\x3a\x00")), "a is in slices"),
        (table(HEADER, (b"a", b"\x08\x01\x12\x04\x12\x02\x08\x02\x28\x04")), r"bytes than its shape \(2,\)"),
        (table(HEADER, (b"a", b"\x08\x01\x18\x02\x28\x04")), "a is in part 2 of 1"),
        (table(HEADER, (b"b", b"\x08\x07"), (b"a", b"\x08\x07")), "its names are not in their order"),
        (table(HEADER, (b"a", b"\x0b")), "a part of its index is no message of TensorFlow"),
        (table(HEADER, (b"a", b"\x08")), "a number in its index is cut off"),
        (table(HEADER, (b"a", b"\x12\x7f")), "a part of its index is cut off"),
        (table(HEADER, (b"a\n", b"\x08\x07")), "expected text that can be printed"),
        (table(HEADER, (b"a", entry(4, 0)), (b"b", entry(4, 15))), "b has numbers in common with another array"),
        (table(HEADER, (b"a", bytes(1001))), "its index has 1,001 bytes about one array; expected at most 1,000"),
        (table((b"", b"\x08\x01" + b"\x78\x00" * 500)), "its index has 1,002 bytes about one array"),
        (with_handles(FIRST, *[b"\x00" + varint(len(FIRST) - 5)] * 2), "are not one after the other"),
        (with_handles(EMPTY, b"\x00" + varint(len(EMPTY) - 5)), "a part of its index has no names"),
        (bytes(2**22) + table(HEADER), "its index has more than 4,194,304 bytes"),
    ],
)  # fmt: skip
def test_other_tables_are_named(tmp_path, content, message):
    path = tmp_path / "model.index"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        reading.read(path, reading.recognize(path))


def test_numbers_that_are_no_file_are_not_opened(folder):
    """A pipe would keep the reader waiting for its 10 minutes."""
    path = folder / "model.ckpt.data-00000-of-00001"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"its numbers are in model\.ckpt\.data-00000-of-00001, which is no file"):
        reading.read(folder / "model.ckpt.index", "tensorflow")


def test_the_limit_counts_what_is_read_and_not_what_is_stored(tmp_path):
    """8 numbers of 16 bits are 32 bytes here; arrays side by side are read."""
    path, numbers = tmp_path / "model.index", np.arange(16, dtype="<f2").tobytes()
    halves = numbers[:16], numbers[16:]
    entries = [(name, entry(8, 16 * i, 19, halves[i])) for i, name in enumerate((b"a", b"b"))]
    path.write_bytes(table(HEADER, *entries))
    (tmp_path / "model.data-00000-of-00001").write_bytes(numbers)
    found = reading.read(path, "tensorflow", 64).entries
    np.testing.assert_array_equal([array for _, (array,) in found], np.arange(16.0).reshape(2, 8))
    with pytest.raises(ValueError, match=r"with b, of shape \(8,\), its arrays take more than 63 bytes"):
        reading.read(path, "tensorflow", 63)
