"""Machines that need not be here, by their names: TPU slices and hosts with GPUs, and what both say of themselves."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from xception_flax.planning import gpus, tpus
from xception_flax.planning.hlo import Traffic
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import suggest, written


class Chip(Protocol):
    """The peak figures of a TPU or GPU; see `tpus.Chip` and `gpus.Gpu`."""

    @property
    def usable_bytes(self) -> int: ...
    @property
    def hbm_bytes_per_second(self) -> float: ...
    @property
    def peaks(self) -> Mapping[str, float]:
        """Operations a second in matrix products, by their type: 'bfloat16', and others where they are known."""


class Machine(Protocol):
    """Connected chips: `tpus.Slice` or `gpus.Hosts`.

    Attributes:
      name: as `parse_machine` takes it.
      noun: what a chip is called.
      chip: the figures of each.
      num_chips: of all hosts.
      libraries: whose versions decide what is compiled, as PyPI calls them.
      compiler_options: for `jax.stages.Lowered.compile`.
      not_known: what a compiled program does not say; '' for nothing.
    """

    @property
    def name(self) -> str: ...
    @property
    def noun(self) -> str: ...
    @property
    def chip(self) -> Chip: ...
    @property
    def num_chips(self) -> int: ...
    @property
    def libraries(self) -> tuple[str, ...]: ...
    @property
    def compiler_options(self) -> dict[str, Any] | None: ...
    @property
    def not_known(self) -> str: ...

    def collective_seconds(self, kind: str, size: int) -> float:
        """Returns an estimate of the time of a collective of `size` bytes over all chips."""

    def kernel(self, part: Traffic) -> str | None:
        """Returns what runs an instruction of a program; None where it is no kernel of its own."""

    def devices(self) -> Sequence[Any]:
        """Returns devices to compile for; raises UserError where their compiler is missing."""


def parse_machine(name: str) -> Machine:
    """Returns the machine of a name such as 'v5e:2x4' (`tpus.parse_slice`) or 'h100:8' (`gpus.parse_hosts`).

    Raises:
      UserError: there is no such machine.
    """
    kind = name.partition(":")[0]
    if kind in tpus.CHIPS:
        return tpus.parse_slice(name)
    if kind in gpus.GPUS:
        return gpus.parse_hosts(name)
    names = suggest(kind, [*tpus.CHIPS, *gpus.GPUS])
    raise UserError(f"unknown TPU or GPU {written(kind)} in topology {written(name)}; {names} As in v5e:2x4, h100:8.")


def hide_hardware() -> None:
    """Keeps JAX from using a TPU or GPU of this machine, and the compilers from looking for one.

    Call it before JAX is imported, which asks Google Cloud for the machine's metadata.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    # XLA logs that a compilation takes minutes; its errors are raised as well as logged.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    tpus.hide_hardware()
