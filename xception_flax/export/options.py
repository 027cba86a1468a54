"""What a user may choose about an exported program, beside its outputs."""

from typing import NamedTuple

PLATFORMS = ("cpu", "cuda", "tpu")


class Options(NamedTuple):
    """Of all formats.

    Attributes:
      any_size: whether images may have other sizes: the network's own and those a multiple of 32 pixels away, height
        and width each by itself.
      platforms: that StableHLO is written for, some of `PLATFORMS`.
    """

    any_size: bool = False
    platforms: tuple[str, ...] = PLATFORMS
