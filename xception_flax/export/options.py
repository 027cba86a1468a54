"""What a user may choose about an exported program, beside its outputs."""

from pathlib import Path
from typing import NamedTuple

PLATFORMS = ("cpu", "cuda", "tpu")


class Options(NamedTuple):
    """Of all formats.

    Attributes:
      any_size: whether images may have other sizes: the network's own and those a multiple of 32 pixels away, height
        and width each by itself.
      platforms: that StableHLO is written for, some of `PLATFORMS`.
      int8: a folder of images that ONNX is quantized with; None for float32.
    """

    any_size: bool = False
    platforms: tuple[str, ...] = PLATFORMS
    int8: Path | None = None
