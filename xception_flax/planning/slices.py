"""TPU slices that need not be there: what their chips can do, and devices to compile for.

Figures of chips are Google's (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e), links are as in 'How to
Scale Your Model' (jax-ml.github.io/scaling-book/tpus). `usable_bytes` is what libtpu 0.0.42 says
that a program may have; the rest of the chip's memory is the system's.
"""

import importlib.util
import math
import os
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from xception_flax.host.devices import PEAK_FLOPS_PER_SECOND as _PEAKS
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import suggest, written

GIB = 2**30

# A message between neighbours takes about so long, however short it is (the same book, 'Sharded Matrices').
HOP_SECONDS = 1e-6

# How often a collective sends what it works on: an all-reduce is a reduce-scatter and an all-gather.
PASSES = {"all-reduce": 2}


class Chip(NamedTuple):
    """What one chip can do at best.

    Attributes:
      usable_bytes: of high-bandwidth memory (HBM), for a program.
      hbm_bytes_per_second: read and written.
      flops_per_second: of matrix products in bfloat16; a multiply-add is two.
      link_bytes_per_second: to one neighbour, one way.
      shapes: of slices, by their sides; with three sides also all whose sides divide by 4.
      wraps_at: a side whose length divides by this is a ring, others are a line.
      config: libtpu's name for its cores used as one device.
    """

    usable_bytes: int
    hbm_bytes_per_second: float
    flops_per_second: float
    link_bytes_per_second: float
    shapes: tuple[str, ...]
    wraps_at: int
    config: str = "default"


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")

CHIPS = {
    "v4": Chip(int(30.75 * GIB), 1.2e12, _PEAKS["TPU v4"]["bfloat16"], 4.5e10, _CUBES, wraps_at=4, config="megacore"),
    "v5e": Chip(int(15.75 * GIB), 8.19e11, _PEAKS["TPU v5e"]["bfloat16"], 4.5e10, _FLAT, wraps_at=16),
    "v5p": Chip(int(95.74 * GIB), 2.765e12, _PEAKS["TPU v5p"]["bfloat16"], 9e10, _CUBES, wraps_at=4, config="megacore"),
    "v6e": Chip(int(31.25 * GIB), 1.64e12, _PEAKS["TPU v6e"]["bfloat16"], 9e10, _FLAT, wraps_at=16),
}


class Slice(NamedTuple):
    """Chips that are wired to each other: a generation and the sides of the grid."""

    name: str
    chip: Chip
    sides: tuple[int, ...]

    @property
    def num_chips(self) -> int:
        return math.prod(self.sides)

    @property
    def rings(self) -> tuple[bool, ...]:
        """For each side whether its ends are wired to each other."""
        # Where optical switches close the rings of cubes of 4 x 4 x 4, they close all or none.
        rings = tuple(side % self.chip.wraps_at == 0 for side in self.sides)
        return rings if len(self.sides) == 2 else (all(rings),) * 3

    def collective_seconds(self, kind: str, size: int) -> float:
        """Returns about how long a collective over all chips takes, by bandwidth or by distance.

        As in 'How to Scale Your Model': all sides are used at once, a ring in both directions, and
        no message is faster than its way. An estimate.

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


def parse_slice(name: str) -> Slice:
    """Returns the slice that is called 'v5e:2x4': generation, colon, sides.

    Raises:
      UserError: no chip, or no slice of it, is called so.
    """
    generation, _, shape = name.partition(":")
    if generation not in CHIPS:
        raise UserError(f"unknown TPU {generation!r} in topology {name!r}; {suggest(generation, CHIPS)} As in v5e:2x4.")
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
    """Makes libtpu compile without looking for a TPU, and JAX leave those alone that are there.

    To be called before JAX is imported: it asks Google Cloud for the machine's metadata at import.
    """
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    # libtpu lets one process in at a time, by a lock file: two can share a compiler, if not a TPU.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    # What the metadata would have said; without it libtpu writes a page of errors. Any values do.
    for key, value in {"ACCELERATOR_TYPE": "v5litepod-8", "WORKER_HOSTNAMES": "localhost", "WORKER_ID": "0"}.items():
        os.environ.setdefault(f"TPU_{key}", value)


def devices(where: Slice) -> Iterable[Any]:
    """Returns devices of the slice, to compile for.

    Raises:
      UserError: libtpu is missing, or does not describe such a slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for TPUs needs libtpu, which is not installed here.\npip install -e '.[tpu]'")
    import jax
    from jax.experimental import topologies

    options = {"wrap": (*where.rings, False)[:3], "chip_config_name": where.chip.config}
    if where.num_chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=where.name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"libtpu cannot describe {where.name!r}: {str(error).splitlines()[0]}") from None
