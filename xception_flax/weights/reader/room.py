"""What reading a file gives, what it may take, and the checks that all formats share."""

import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

DESCRIPTION = "xception_flax"  # where a file has our own description: a key, an attribute, or a member with `.json`

MAX_ANSWER = 2**24  # bytes of the line that describes the arrays
MAX_CONFIG = 2**21  # bytes of a configuration; that of Xception takes 120,000
MAX_DEPTH = 100  # of lists and dicts in a configuration; models in models take about 7 each


class Contents(NamedTuple):
    """What a file of weights has in it.

    Attributes:
      entries: (name, arrays) in the order of the file. Of Keras these are layers, or where the file has no names of
        layers, their places in it, which begin with '/'. Of other libraries they are single arrays. Each array is
        float32 or float64.
      config: what else the file says, {} if nothing. Of a whole Keras model {'config': ..., 'metadata': ...}: the
        model's configuration, as of `model.to_json()`, and at least 'keras_version', if there. Of safetensors its
        '__metadata__'. Of torch the numbers and texts beside the arrays. Of our own files `DESCRIPTION` too, as text or
        read. These texts may have any characters.
    """

    entries: list[tuple[str, list[np.ndarray]]]
    config: dict[str, Any]


class Room:
    """How much may be read. Each array is checked by its header, before it is read.

    Args:
      max_bytes: limit of all arrays together, as `native` returns them.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._taken = 0

    def check(self, name: str, dtype: np.dtype, shape: tuple[int, ...] | None) -> int:
        """Returns the size in bytes, in the file, of an array that may be read.

        Raises:
          ValueError: it is not an array of real floating-point numbers, or there is no room for it.
        """
        bfloat16 = dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None and dtype.subdtype is None
        if not bfloat16 and not (dtype.kind == "f" and dtype.itemsize in (2, 4, 8)):
            raise ValueError(f"{name} has the type {dtype}; expected floating-point numbers of 16, 32 or 64 bits")
        if shape is None or any(n < 0 for n in shape):
            raise ValueError(f"{name} has the shape {shape}; expected an array")
        numbers = math.prod(shape)
        self._taken += numbers * max(4, dtype.itemsize)  # `native` makes float32 of 16 bits
        if self._taken > self.max_bytes:
            raise ValueError(
                f"with {name}, of shape {shape}, its arrays take more than {self.max_bytes:,} bytes; expected less"
            )
        return numbers * dtype.itemsize


def native(array: np.ndarray) -> np.ndarray:
    """Returns the same values as little-endian float32 or float64."""
    if array.dtype.kind == "V":  # bfloat16, as written by ml_dtypes and Keras: the upper half of a float32
        return (array.view("<u2").astype("<u4") << 16).view("<f4")
    return array.astype("<f8" if array.dtype.itemsize == 8 else "<f4")


def printable(name: Any) -> str:
    """Returns a name from a file as a string. It must be printable, since it may get into a message."""
    text = name.decode() if isinstance(name, bytes) else name
    if not isinstance(text, str) or not text.isprintable():
        raise ValueError(f"a name in it is {text!r:.80}; expected text that can be printed")
    return str(text)


def is_counter(name: str) -> bool:
    """Whether an array of torch counts the batches behind the moving statistics; nothing here uses it."""
    return name.endswith("num_batches_tracked")


def parsed(name: str, text: Any) -> dict[str, Any]:
    """Returns the object that a JSON text in a file stands for.

    Raises:
      ValueError: it is no text, too long, too deep, no JSON, or no object.
    """
    if not isinstance(text, str | bytes):
        raise ValueError(f"{name} is a {type(text).__name__}; expected text")
    if len(text) > MAX_CONFIG:
        raise ValueError(f"{name} has more than {MAX_CONFIG:,} bytes; expected less")
    try:
        value = json.loads(text)
    except RecursionError:
        value, depth = None, MAX_DEPTH + 1
    except ValueError as error:
        raise ValueError(f"{name} is no JSON: {error}") from None
    else:
        depth = max(_depths(value))
    if depth > MAX_DEPTH:
        raise ValueError(f"{name} has more than {MAX_DEPTH} levels; expected less")
    if not isinstance(value, dict):
        raise ValueError(f"{name} is a {type(value).__name__}; expected an object of JSON")
    return value


def _depths(value: Any, depth: int = 0) -> Iterator[int]:
    yield depth
    if depth <= MAX_DEPTH and isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _depths(item, depth + 1)
