"""TPU slices, which this machine need not have: the figures of their chips, and devices to compile for.

The figures of chips are Google's (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e); those of links are from 'How to Scale
Your Model' (jax-ml.github.io/scaling-book/tpus). `usable_bytes` is the limit of a program by libtpu 0.0.42; the system
uses the rest of the chip's memory.
"""

import importlib.util
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from xception_flax.host.peaks import PEAK_FLOPS_PER_SECOND as _PEAKS
from xception_flax.planning.hlo import PASSES, Traffic
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import written

GIB = 2**30

# A message between neighbours takes at least about this long (the same book, 'Sharded Matrices').
HOP_SECONDS = 1e-6


class Chip(NamedTuple):
    """The peak figures of a chip.

    Attributes:
      usable_bytes: high-bandwidth memory (HBM) for a program.
      hbm_bytes_per_second: reads and writes together.
      peaks: of matrix products, by their type; see `host.peaks`.
      link_bytes_per_second: to one neighbour, in one direction.
      shapes: slices that exist, by their sides; with three sides, also all whose sides are multiples of 4.
      wraps_at: a side is a ring if its length is a multiple of this, else a line.
      config: libtpu's name for using all cores of a chip as one device.
    """

    usable_bytes: int
    hbm_bytes_per_second: float
    peaks: Mapping[str, float]
    link_bytes_per_second: float
    shapes: tuple[str, ...]
    wraps_at: int
    config: str = "default"


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")

CHIPS = {
    "v4": Chip(int(30.75 * GIB), 1.2e12, _PEAKS["TPU v4"], 4.5e10, _CUBES, wraps_at=4, config="megacore"),
    "v5e": Chip(int(15.75 * GIB), 8.19e11, _PEAKS["TPU v5e"], 4.5e10, _FLAT, wraps_at=16),
    "v5p": Chip(int(95.74 * GIB), 2.765e12, _PEAKS["TPU v5p"], 9e10, _CUBES, wraps_at=4, config="megacore"),
    "v6e": Chip(int(31.25 * GIB), 1.64e12, _PEAKS["TPU v6e"], 9e10, _FLAT, wraps_at=16),
}


class Slice(NamedTuple):
    """A grid of connected chips.

    Attributes:
      name: 'v5e:2x4'.
      chip: of the generation.
      sides: of the grid, in chips.
    """

    name: str
    chip: Chip
    sides: tuple[int, ...]

    noun = "chip"
    libraries = ("jax", "libtpu")
    compiler_options = None
    not_known = ""

    @property
    def num_chips(self) -> int:
        return math.prod(self.sides)

    @property
    def rings(self) -> tuple[bool, ...]:
        """For each side, whether its ends are connected."""
        # Slices of 4 x 4 x 4 cubes are connected by optical switches, which close the rings of all sides or of none.
        rings = tuple(side % self.chip.wraps_at == 0 for side in self.sides)
        return rings if len(self.sides) == 2 else (all(rings),) * 3

    def collective_seconds(self, kind: str, size: int) -> float:
        """Returns an estimate of the time of a collective over all chips, by bandwidth or by distance.

        As in 'How to Scale Your Model': all sides are used at once, rings in both directions, and a message takes at
        least `HOP_SECONDS` for each hop.

        Args:
          kind: 'all-reduce', 'all-gather', ...
          size: of the whole array, in bytes.
        """
        if self.num_chips == 1:
            return 0.0
        ways = [(side, 2 if ring else 1) for side, ring in zip(self.sides, self.rings, strict=True) if side > 1]
        bandwidth = sum(directions for _, directions in ways) * self.chip.link_bytes_per_second
        hops = sum(side // 2 if directions == 2 else side - 1 for side, directions in ways)
        return PASSES.get(kind, 1) * max(size / bandwidth, hops * HOP_SECONDS)

    def kernel(self, part: Traffic) -> str | None:
        """Returns None: on a TPU a step is one program, not a row of kernels."""
        return None

    def devices(self) -> Sequence[Any]:
        """Returns devices of the slice, to compile for.

        Raises:
          UserError: libtpu is missing, or cannot describe the slice.
        """
        if importlib.util.find_spec("libtpu") is None:
            raise UserError("compiling for TPUs needs libtpu, which is not installed here.\npip install -e '.[tpu]'")
        import jax
        from jax.experimental import topologies

        options: dict[str, Any] = {"wrap": (*self.rings, False)[:3], "chip_config_name": self.chip.config}
        if self.num_chips == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)
        try:
            return topologies.get_topology_desc(platform="tpu", topology_name=self.name, **options).devices
        except jax.errors.JaxRuntimeError as error:
            raise UserError(f"libtpu cannot describe {self.name!r}: {str(error).splitlines()[0]}") from None


def parse_slice(name: str) -> Slice:
    """Returns the slice of a name such as 'v5e:2x4': a generation of `CHIPS`, colon, sides.

    Raises:
      UserError: there is no such slice.
    """
    generation, _, shape = name.partition(":")
    chip = CHIPS[generation]
    # No side has three digits: a v5p pod, the largest, is 16x20x28.
    sides = tuple(map(int, shape.split("x"))) if re.fullmatch(r"[1-9][0-9]?(x[1-9][0-9]?)+", shape) else ()
    cubes = chip.shapes is _CUBES and len(sides) == 3 and all(side % 4 == 0 for side in sides)
    if shape not in chip.shapes and not cubes:
        more = ", and larger ones whose sides divide by 4" if chip.shapes is _CUBES else ""
        raise UserError(
            f"there is no slice {written(name)}; of {generation} there are: {', '.join(chip.shapes)}{more}."
        )
    return Slice(name, chip, sides)


def hide_hardware() -> None:
    """Makes libtpu compile without looking for a TPU; see `machines.hide_hardware`."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    # A lock file allows libtpu in one process at a time. Processes cannot share a TPU, but they can all compile.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    # In place of the metadata: without any values libtpu writes a page of errors, and any values are good.
    for key, value in {"ACCELERATOR_TYPE": "v5litepod-8", "WORKER_HOSTNAMES": "localhost", "WORKER_ID": "0"}.items():
        os.environ.setdefault(f"TPU_{key}", value)
