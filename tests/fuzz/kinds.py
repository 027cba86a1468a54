"""What is tried: for each kind of input a function that makes one, and the function of a command that reads it."""

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

Files = Mapping[str, bytes]


class Kind(NamedTuple):
    """A kind of input.

    Attributes:
      make: returns the files of an input, by their paths in its folder; the same for the same generator.
      read: reads the input in a folder as a command does. It returns where the input is accepted, and then has compared
        what was read with what is true; it raises UserError where the input is refused. All else is a finding.
      share: of the inputs of a run, in proportion to other kinds: less where one takes longer.
    """

    make: Callable[[random.Random], Files]
    read: Callable[[Path], None]
    share: float = 1.0


class WrongError(AssertionError):
    """An input was accepted, and what was read of it is not true."""


def generator(kind: str, seed: int) -> random.Random:
    """The randomness of an input."""
    return random.Random(f"{kind} {seed}")


def write(files: Files, folder: Path) -> None:
    """Writes the files of an input."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def all_kinds() -> dict[str, Kind]:
    """Every kind by its name. It imports the whole program."""
    from tests.fuzz import examples, images, runs, weights

    return images.KINDS | weights.KINDS | examples.KINDS | runs.KINDS
