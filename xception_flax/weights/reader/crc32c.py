"""CRC-32C (Castagnoli), the checksum of TensorFlow's checkpoints, by NumPy.

A byte at a time, Python takes a minute for a network. The checksum is linear, so a message of many rows can be folded
into one: the sum of its rows, each moved on by what follows it, has the same remainder as all of them. The sums are
of whole rows, at some hundred MB a second, and what is left is short.
"""

from functools import cache

import numpy as np

_POLYNOMIAL = 0x82F63B78  # x^32 + x^28 + x^27 + ... + 1, RFC 3720 appendix B.4, the bits in reverse
_ROW_BYTES = (2**16, 2**8)  # rows that fit the processor's cache, then few enough bytes for Python
_MASK = 0xA282EAD8  # what LevelDB and TensorFlow add, lest a checksum of checksums is weak


def crc32c(data: bytes | memoryview) -> int:
    """Returns the checksum: 0xE3069283 of b'123456789'."""
    if len(data) < 4:
        return _by_byte(bytes(data), 0xFFFFFFFF) ^ 0xFFFFFFFF
    # The register starts with ones; that is the same as inverting the first four bytes.
    first = bytes(byte ^ 0xFF for byte in bytes(data[:4]))
    message = _folded(first, data, _ROW_BYTES[0])
    message = _folded(message[:4], message, _ROW_BYTES[1])
    return _by_byte(message, 0) ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    """Returns a checksum as the files have it."""
    return ((crc >> 15 | crc << 17) + _MASK) & 0xFFFFFFFF


def _folded(first: bytes, data: bytes | memoryview, row_bytes: int) -> bytes:
    """Returns a message of the same remainder, shorter than two rows; `first` is in place of the first four bytes."""
    rows = len(data) // row_bytes
    if rows < 2:
        return first + bytes(data[4:])
    words = np.frombuffer(data, "<u4", rows * row_bytes // 4).reshape(rows, -1)
    low, high = _moved_on(row_bytes)
    total = words[0].copy()
    total[0] = int.from_bytes(first, "little")
    for row in words[1:]:
        total = low[total & 0xFFFF] ^ high[total >> 16] ^ row
    return total.astype("<u4").tobytes() + bytes(data[rows * row_bytes :])


def _by_byte(message: bytes, register: int) -> int:
    table = _table()
    for byte in message:
        register = table[(register ^ byte) & 0xFF] ^ register >> 8
    return register


@cache
def _table() -> list[int]:
    """The register after a zero byte, by its lowest byte."""
    table = list(range(256))
    for _ in range(8):
        table = [value >> 1 ^ (_POLYNOMIAL if value & 1 else 0) for value in table]
    return table


@cache
def _moved_on(zero_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the register after `zero_bytes` zeros, a power of two, by its lower and its upper half; their sum."""
    images = [_by_byte(b"\0", 1 << bit) for bit in range(32)]  # of each bit, after one byte
    while zero_bytes > 1:
        images, zero_bytes = [_image(images, value) for value in images], zero_bytes // 2
    halves = []
    for half in (images[:16], images[16:]):
        table = np.zeros(1, np.uint32)
        for image in half:
            table = np.concatenate([table, table ^ np.uint32(image)])
        halves.append(table)
    return halves[0], halves[1]


def _image(images: list[int], value: int) -> int:
    total = 0
    for bit, image in enumerate(images):
        total ^= image if value >> bit & 1 else 0
    return total
