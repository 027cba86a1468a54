"""Kinds that are findings by intention: by them it is tested that a finding is seen."""

import ctypes
import random
import time
from pathlib import Path

from tests.fuzz.kinds import Files, Kind, WrongError
from xception_flax.text.errors import UserError


def _nothing(draw: random.Random) -> Files:
    return {"input": draw.randbytes(4)}


def _crash(folder: Path) -> None:
    ctypes.string_at(0)


def _hang(folder: Path) -> None:
    time.sleep(3600)


def _memory(folder: Path) -> None:
    bytearray(4 * 2**30)


def _wrong(folder: Path) -> None:
    raise WrongError("2 and 2 are 5")


def _traceback(folder: Path) -> None:
    {}["a key"]


def _silence(folder: Path) -> None:
    raise UserError("")


def _speech(folder: Path) -> None:
    raise UserError("x" * 5000)


def _refused(folder: Path) -> None:
    raise UserError("it is refused.")


KINDS = {
    "planted crash": Kind(_nothing, _crash),
    "planted hang": Kind(_nothing, _hang),
    "planted memory": Kind(_nothing, _memory),
    "planted wrong": Kind(_nothing, _wrong),
    "planted traceback": Kind(_nothing, _traceback),
    "planted silence": Kind(_nothing, _silence),
    "planted speech": Kind(_nothing, _speech),
    "planted refused": Kind(_nothing, _refused),
    "planted accepted": Kind(_nothing, lambda folder: None),
}
