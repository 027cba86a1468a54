"""Reads a compiled program: what each instruction moves in memory and sends to other devices.

XLA's `cost_analysis` gives one sum. The text of the program (`compiled.as_text()`, HLO) says which arrays each
instruction reads and writes, in which memory they are and from which layer.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# How often a collective sends its array, if not once: an all-reduce is a reduce-scatter and an all-gather.
PASSES = {"all-reduce": 2}

BITS = (
    {"pred": 8, "token": 0} | {f"{kind}{bits}": bits for kind in "sufc" for bits in (4, 8, 16, 32, 64)} | {"bf16": 16}
)

# These move nothing: they only name arrays or order instructions.
_FREE = (
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "opt-barrier", "domain"),
    *("partition-id", "replica-id"),
)

_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")


class Array(NamedTuple):
    """The size of an array, and its memory."""

    size: int  # in bytes, with the padding of its tiles
    on_chip: bool  # in the chip's own memory (VMEM, SMEM), not in HBM


class Instruction(NamedTuple):
    """One line of a program.

    Attributes:
      name: unique in its computation.
      opcode: 'fusion', 'all-reduce', ...
      results: the arrays that it makes.
      operands: names of the instructions whose results it reads.
      called: names of the computations that it runs.
      times: how often it runs them: the trip count of a loop, else 1.
      op_name: its origin in functions of JAX and modules of the network; '' where XLA does not say.
      target: of a custom call; of a fusion the kind that XLA for GPUs gives it, such as '__triton_gemm'.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    called: tuple[str, ...]
    times: int
    op_name: str
    target: str


class Traffic(NamedTuple):
    """The memory traffic of an instruction, over all its repetitions.

    Attributes:
      opcode: its kind.
      target: see `Instruction`.
      op_name: its origin. For a fusion it is that of the convolution in it; for a copy that XLA added, that of its
        first user.
      times: how often it runs.
      size: bytes read and written; a fusion reads its operands and writes its results once.
      hbm_size: the part of `size` that is in HBM, not in the chip's own memory.
    """

    opcode: str
    target: str
    op_name: str
    times: int
    size: int
    hbm_size: int


class Collective(NamedTuple):
    """Collectives of one kind and size: `kind`, bytes of the whole array on a device, number of runs."""

    kind: str
    size: int
    times: int


class Hlo:
    """A compiled program, from its text."""

    def __init__(self, text: str) -> None:
        self._computations: dict[str, dict[str, Instruction]] = {}
        computation: dict[str, Instruction] = {}
        for line in text.splitlines():
            if line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.-]+) .*->", line)):
                computation = self._computations.setdefault(head[2], {})
                if head[1]:
                    self._entry = head[2]
            elif self._computations and (match := _INSTRUCTION.match(line)):
                computation[match[1]] = _instruction(*match.groups())

    def traffic(self) -> Iterator[Traffic]:
        """Yields the memory traffic of each instruction that moves data, also in loops and branches."""
        for name, times in self._run(self._entry, 1):
            computation = self._computations[name]
            op_names = _with_users(computation, {i.name: self._op_name(i) for i in computation.values()})
            for instruction in computation.values():
                moved = _moved(instruction, computation)
                if moved:
                    size, hbm = sum(a.size for a in moved), sum(a.size for a in moved if not a.on_chip)
                    of_what = instruction.opcode, instruction.target, op_names[instruction.name]
                    yield Traffic(*of_what, times, times * size, times * hbm)

    def collectives(self) -> list[Collective]:
        """Returns the collectives between devices, the largest first, also those inside a fusion."""
        found: dict[tuple[str, int], int] = {}
        for name, times in self._run(self._entry, 1, fused=True):
            computation = self._computations[name]
            for instruction in computation.values():
                kind = instruction.opcode.removesuffix("-start")
                if kind in COLLECTIVES:
                    inputs = sum(a.size for o in instruction.operands for a in computation[o].results)
                    outputs = sum(a.size for a in instruction.results)
                    if instruction.opcode != kind and kind != "all-reduce":  # results include the operands
                        outputs -= inputs
                    key = kind, max(inputs, outputs)
                    found[key] = found.get(key, 0) + times
        return [
            Collective(kind, size, times)
            for (kind, size), times in sorted(found.items(), key=lambda f: (-f[0][1], f[0][0]))
        ]

    def _run(self, name: str, times: int, fused: bool = False) -> Iterator[tuple[str, int]]:
        """Yields each computation that runs and how often; with `fused`, also the computations of fusions."""
        yield name, times
        for instruction in self._computations[name].values():
            if fused or instruction.opcode != "fusion":
                for called in instruction.called:
                    yield from self._run(called, times * instruction.times, fused)

    def _op_name(self, instruction: Instruction) -> str:
        """Returns the op_name of the convolution in a fusion, if there is one, else that of the instruction."""
        if instruction.opcode == "fusion":
            for name, _ in self._run(instruction.called[0], 1, fused=True):
                for inner in self._computations[name].values():
                    if inner.opcode in ("convolution", "dot") and inner.op_name:
                        return inner.op_name
        return instruction.op_name


def _instruction(name: str, types: str, opcode: str, rest: str) -> Instruction:
    arguments, _, attributes = rest.partition(")")
    called: list[str] = []
    # A reduction's `to_apply` is arithmetic on two numbers; only a call's is a computation to count.
    keys = "calls|body|condition|branch_computations|true_computation|false_computation" + "|to_apply" * (
        opcode == "call"
    )
    for group in re.findall(rf"\b(?:{keys})=(\{{[^}}]*\}}|%?[\w.-]+)", attributes):
        called += re.findall(r"[\w.-]+", group)
    trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', attributes) if opcode == "while" else None
    op_name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', attributes)
    target = re.search(r'(?:custom_call_target=|"fusion_backend_config":\{"kind":)"([^"]*)"', attributes)
    return Instruction(
        name=name,
        opcode=opcode,
        results=tuple(_array(*match.groups()) for match in _ARRAY.finditer(types) if match[1] in BITS),
        operands=tuple(re.findall(r"%([\w.-]+)", arguments)),
        called=tuple(called),
        times=int(trips[1]) if trips else 1,
        op_name=op_name[1] if op_name else "",
        target=target[1] if target else "",
    )


def _array(dtype: str, shape: str, layout: str | None, where: str | None) -> Array:
    """Returns the array of a type such as `bf16[128,19,19,728]{0,3,2,1:T(8,128)(2,1)S(1)}`.

    The layout lists the dimensions, the fastest first. The first tile T pads the fastest dimensions. S is the memory:
    none or 0 is the device's HBM, other numbers are the chip's own memory.
    """
    sizes = [int(size) for size in shape.split(",") if size]
    tile = re.match(r"T\(([\d,]+)\)", where or "")
    if tile:
        sizes = [sizes[int(i)] for i in (layout or "").split(",") if i]
        for i, multiple in enumerate(reversed(tile[1].split(","))):
            if i < len(sizes):
                sizes[i] = -(-sizes[i] // int(multiple)) * int(multiple)
    return Array(math.prod(sizes) * BITS[dtype] // 8, bool(re.search(r"S\([1-9]", where or "")))


def _moved(instruction: Instruction, computation: dict[str, Instruction]) -> list[Array]:
    """Returns the arrays that an instruction reads and writes."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done") or (instruction.called and opcode != "fusion"):
        return []
    if instruction.target == "ConcatBitcast":  # adjacent slices, named as one array
        return []
    operands = [array for name in instruction.operands for array in computation[name].results]
    if opcode in ("copy-start", "slice-start"):
        # The results of a copy are (copy, operand, ...), those of a slice (operand, slice, ...).
        made = instruction.results[0 if opcode == "copy-start" else len(operands)]
        return [made, Array(made.size, operands[0].on_chip)]
    if opcode == "dynamic-update-slice":  # in place: only the slice is read and written
        return [operands[1], operands[1]]
    if opcode in ("slice", "dynamic-slice"):
        return [*instruction.results, *(Array(a.size, operands[0].on_chip) for a in instruction.results)]
    return [*instruction.results, *operands]


def _with_users(computation: dict[str, Instruction], op_names: dict[str, str]) -> dict[str, str]:
    """Returns `op_names`, where an instruction without a name gets that of its first user."""
    named = dict(op_names)
    for instruction in reversed(computation.values()):  # users come after their operands
        for operand in instruction.operands:
            if not op_names.get(operand, "") and named[instruction.name]:
                named[operand] = named[instruction.name]
    return named
