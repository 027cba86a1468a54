"""The history of a run on the disk: metrics.jsonl."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xception_flax.host.files import file_errors, write_whole

TEXTS = ("eval/weights",)  # the keys of a record whose values are text, not numbers


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a metrics.jsonl: for each, values by name. They are numbers or None, except for `TEXTS`.

    Lines that are not records are left out: the last one may be cut off, and the user may have added some.

    Raises:
      UserError: it cannot be read.
    """
    return [record for line in _lines(path) if (record := _parse_record(line)) is not None]


def read_kept(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a metrics.jsonl as `read_metrics`; none where the file is gone.

    Raises:
      UserError: it cannot be read.
    """
    return read_metrics(path) if path.is_file() else []


def count_bad_images(path: Path) -> int:
    """Returns how many times training left out a bad image, by the records of a metrics.jsonl.

    Raises:
      UserError: it cannot be read.
    """
    counts = (record.get("train/bad_images") for record in read_metrics(path))
    return sum(count for count in counts if type(count) is int)  # null and others are of a hand, not of a run


def open_metrics(path: Path, start_step: int, *, unevaluated: bool = False) -> tuple[Any, list[int]]:
    """Opens metrics.jsonl to append records of steps after `start_step`.

    Records of later steps, from a run that was cut off, are removed, and so is a last line that was cut off. All else
    stays as it is, byte for byte.

    Args:
      path: of the file.
      start_step: of the checkpoint.
      unevaluated: whether this step is evaluated anew. A run that was killed between the record of an evaluation and
        its checkpoint left one, which is removed.

    Returns:
      The file, and the numbers of the lines that stay though they are not records.

    Raises:
      UserError: it cannot be read or written.
    """
    strange: list[int] = []

    def kept() -> Iterator[bytes]:
        for number, line in enumerate(_lines(path), 1):
            record, is_whole = _parse_record(line), line.endswith(b"\n")
            if record is not None:
                again = unevaluated and record["step"] == start_step and "eval/loss" in record
                if record["step"] <= start_step and not again:
                    yield line if is_whole else line + b"\n"
            elif is_whole:
                strange.append(number)
                yield line

    if path.exists():
        write_whole(path, kept())
    with file_errors(path, "written"):
        return path.open("ab"), strange


def _lines(path: Path) -> Iterator[bytes]:
    with file_errors(path, "read"), path.open("rb") as file:
        yield from file


def _parse_record(line: bytes) -> dict[str, Any] | None:
    """Returns the record in a line; None if the line is not a record."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int or record["step"] < 0:
        return None

    def is_right(name: str, value: Any) -> bool:
        if isinstance(value, str):
            return name in TEXTS
        return value is None or (type(value) in (int, float) and abs(value) <= sys.float_info.max)

    return record if all(is_right(name, value) for name, value in record.items()) else None
