"""Compiles a recipe's training step for a TPU slice that is not there, and says what it will cost.

It is the step that train.py runs, compiled from shapes by the TPU's own compiler (libtpu): no TPU, no
data and no memory are needed, a minute or two is. What is the compiler's word and what an estimate:
  memory        of the compiler: what a chip needs at most; a program that does not fit is not made
  bytes         a step and chip, read from the compiled program: each instruction reads what it takes
                and writes what it gives once; arrays in the chip's own memory (VMEM) are not counted
  arithmetic    of the network: six times the multiply-adds of a forward pass (two operations each;
                forward, gradient of the input, gradient of the weights); the compiler's own count of
                all arithmetic stands beside it
  collectives   read from the compiled program: arrays that the chips add up or gather
  time          estimate, and a bound: each kind of layer at the chip's full bandwidth or full
                arithmetic, whichever takes longer, and collectives after that, hidden by nothing. No
                chip reaches it; input, evaluation and checkpoints come on top
"""

import signal

from xception_flax import signals, tpu

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signals.stop_at_once)  # before the imports below, which take seconds
    tpu.hide_hardware()

import collections
import importlib.metadata
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from xception_flax import cli, costs, models, progress, recipe, sharding
from xception_flax.hlo import Hlo
from xception_flax.program import create_program

EXAMPLES = """\
  python -m xception_flax.precompile --config configs/imagenet.py --topology v5e:4x4
  python -m xception_flax.precompile --config configs/imagenet.py --topology v5e:2x4 --config.batch_size=1024
  python -m xception_flax.precompile --config configs/imagenet.py --topology v6e:2x4 --find-largest-batch
  python -m xception_flax.precompile --config configs/folder.py:photos --topology v4:2x2x1 --num-images 50000"""

# Training images of data sets that are not at hand: ILSVRC 2012.
NUM_IMAGES = {"imagenet2012": 1_281_167}

KINDS = {
    "Conv": "regular conv.",
    "DepthwiseConv": "depthwise conv.",
    "PointwiseConv": "pointwise conv.",
    "BatchNorm": "batch norm.",
    "Dense": "classifier",
}
BETWEEN, LOSS, UPDATE = "between layers", "loss", "optimizer"

BATCH_GRAIN = 8  # images a chip; batches between two multiples are padded to the next on a TPU
MAX_COMPILATIONS = 8  # in search of the largest batch


class DoesNotFit(Exception):
    """The compiled step needs `used` bytes of a chip's memory, which are not there."""

    def __init__(self, used: int) -> None:
        self.used = used


class Report(NamedTuple):
    """What a compiled step costs a chip.

    Attributes:
      memory: bytes at most.
      state: bytes of it that parameters, statistics, optimizer and averages take.
      flops: all arithmetic, as the compiler counts it.
      xla_size: bytes accessed, as the compiler counts them: also those within the chip.
      kinds: for each kind of layer (arithmetic of the network, bytes of HBM).
      collectives: what is sent between chips.
    """

    memory: int
    state: int
    flops: float
    xla_size: float
    kinds: dict[str, tuple[float, int]]
    collectives: list[Any]


def batch_shapes(config: ConfigDict) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of each array of a training batch, as `data.Split.batch_shapes` has them, without the data."""
    size = config.batch_size
    several = config.metrics.name == "multi_label"
    return {
        "images": ((size, *_image_shape(config)), np.dtype(np.uint8)),
        "labels": ((size, config.model.num_classes), np.dtype(np.uint8)) if several else ((size,), np.dtype(np.int32)),
    }


def _image_shape(config: ConfigDict) -> tuple[int, int, int]:
    return config.data.image_size, config.data.image_size, config.data.channels


def compile_step(config: ConfigDict, devices: Iterable[Any], num_images: int) -> jax.stages.Compiled:
    """Returns the training step of a resolved recipe, compiled for `devices`.

    Raises:
      ValueError: values of the recipe that do not go together.
      DoesNotFit: into a device's memory.
    """
    mesh = sharding.create_mesh(**config.mesh, devices=devices)
    sharding.check_batch_size(config.batch_size, mesh, config.step.accumulation_steps)
    program = create_program(config, mesh, _image_shape(config), num_images)
    lowered = program.train_step.lower(program.abstract_state, sharding.abstract_batch(mesh, batch_shapes(config)))
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        # '... the total memory required ... (17.31G) exceeds available HBM (15.75G)', 'Used 17.31G of 15.75G hbm'
        amounts = re.findall(r"([\d.]+)([MGT])\b", str(error).partition("\n")[0])
        if "RESOURCE_EXHAUSTED" not in str(error) or not amounts:
            raise
        raise DoesNotFit(max(int(float(n) * 2 ** {"M": 20, "G": 30, "T": 40}[unit]) for n, unit in amounts)) from None


def measure(compiled: jax.stages.Compiled, config: ConfigDict, num_chips: int) -> Report:
    """Returns what the compiled step of a recipe costs each of `num_chips` chips."""
    memory, cost, hlo = compiled.memory_analysis(), compiled.cost_analysis(), Hlo(compiled.as_text())
    network = models.create_model(**config.model)
    layers = costs.measure(network, _image_shape(config))
    kinds = collections.defaultdict(lambda: [0.0, 0])
    for layer in layers:
        kinds[KINDS.get(layer.module, layer.module)][0] += 6 * layer.macs * config.batch_size / num_chips
    paths = {"/".join(layer.path): KINDS.get(layer.module, layer.module) for layer in layers}
    for part in hlo.costs():
        kinds[kind_of(part.op_name, paths, type(network).__name__)][1] += part.hbm_size
    return Report(
        memory=sum(getattr(memory, f"{n}_size_in_bytes") for n in ("argument", "output", "temp", "generated_code"))
        - memory.alias_size_in_bytes,
        state=memory.alias_size_in_bytes,
        flops=cost["flops"],
        xla_size=cost["bytes accessed"],
        kinds={kind: (flops, size) for kind, (flops, size) in kinds.items()},
        collectives=hlo.collectives(),
    )


def kind_of(op_name: str, paths: dict[str, str], network: str) -> str:
    """Returns the kind of layer that an operation of the step belongs to.

    Args:
      op_name: such as 'jit(train_step)/transpose(jvp(Xception))/Xception.endpoints/block1_conv1/mul'.
      paths: kinds of the layers by their paths: `{"block1_conv1": "regular conv.", ...}`.
      network: its class.
    """
    parts = op_name.split("/")
    for start in range(len(parts)):
        for end in range(len(parts), start, -1):
            if (path := "/".join(parts[start:end])) in paths:
                return paths[path]
    return BETWEEN if f"jvp({network})" in op_name else LOSS if "jvp(" in op_name else UPDATE


def step_seconds(report: Report, where: tpu.Slice) -> tuple[dict[str, tuple[float, float]], float]:
    """Returns seconds of arithmetic and of memory of each kind of layer, and seconds of collectives: a bound."""
    chip = where.chip
    kinds = {
        kind: (flops / chip.flops_per_second, size / chip.hbm_bytes_per_second)
        for kind, (flops, size) in report.kinds.items()
    }
    return kinds, sum(c.times * where.collective_seconds(c.kind, c.size) for c in report.collectives)


def largest_batch(used_at: Callable[[int], int], limit: int, first: int, state: int, grain: int) -> tuple[int, int]:
    """Returns a number of images a chip that fits into `limit` bytes, and the least one seen that does not.

    Memory is nearly affine in the batch, so each guess is where the line through the last two points
    meets the limit; the two are `grain` apart, unless `MAX_COMPILATIONS` are over.

    Args:
      used_at: compiles for so many images a chip, and returns the bytes that are used.
      first: images a chip to begin with.
      state: bytes without any image.
      grain: images a chip; guesses are multiples of it.
    """
    points = [(0, state)]
    fits, fails, guess = 0, math.inf, max(grain, first // grain * grain)
    for _ in range(MAX_COMPILATIONS):
        points.append((guess, used_at(guess)))
        if points[-1][1] <= limit:
            fits = max(fits, guess)
        else:
            fails = min(fails, guess)
        if fails - fits <= grain:
            break
        (n0, used0), (n1, used1) = points[-2:]
        crossing = n1 + (limit - used1) * (n1 - n0) / (used1 - used0) if used1 != used0 else math.inf
        guess = int(min(max(crossing // grain * grain, fits + grain), fails - grain, 4 * guess))
    return fits, fails


# Showing -------------------------------------------------------------------------------------------


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f}"


def _show(config: ConfigDict, where: tpu.Slice, report: Report, num_images: int | None) -> dict[str, Any]:
    """Prints the report, and returns what is in it."""
    kinds, sending = step_seconds(report, where)
    seconds = sum(max(times) for times in kinds.values()) + sending
    rate = config.batch_size / where.num_chips / seconds
    order = [*KINDS.values(), BETWEEN, LOSS, UPDATE]
    rows = sorted(kinds, key=lambda kind: order.index(kind) if kind in order else len(order))
    computing, moving = (sum(times[i] for times in kinds.values()) for i in (0, 1))
    table = {
        "a step of a chip": [*rows, "collectives", "in all"],
        "GFLOP": [f"{report.kinds[kind][0] / 1e9:,.1f}" for kind in rows] + ["", f"{_total(report, 0) / 1e9:,.1f}"],
        "GB": [_gb(report.kinds[kind][1]) for kind in rows] + ["", _gb(_total(report, 1))],
        "ms at best": [f"{1e3 * max(kinds[kind]):.2f}" for kind in rows] + [f"{1e3 * sending:.2f}", f"{1e3 * seconds:.2f}"],
        "bound by": ["arithmetic" if kinds[kind][0] > kinds[kind][1] else "bytes" for kind in rows]
        + ["links", "arithmetic" if computing > max(moving, sending) else "bytes" if moving > sending else "links"],
    }
    progress.show_columns("where the time goes (estimate: bandwidth and arithmetic as specified)", table)
    sums = collections.Counter()
    for c in report.collectives:
        sums[c.kind, "count"] += c.times
        sums[c.kind, "bytes"] += c.times * c.size
    collectives = {c.kind: {"count": sums[c.kind, "count"], "bytes": sums[c.kind, "bytes"]} for c in report.collectives}
    result = {
        "flops": report.flops,
        "model_flops": _total(report, 0),
        "hbm_bytes": _total(report, 1),
        "xla_bytes": report.xla_size,
        "collectives": collectives,
        "collective_seconds": sending,
        "step_seconds": seconds,
        "images_per_second_per_chip": rate,
    }
    lines = {
        "arithmetic": f"{_total(report, 0) / 1e9:,.0f} GFLOP of the network; the compiler counts {report.flops / 1e9:,.0f}",
        "bytes": f"{_gb(_total(report, 1))} GB of HBM; the compiler counts {_gb(report.xla_size)} GB, "
        "with those within the chip",
        "collectives": "; ".join(f"{c['count']} {kind}, {c['bytes'] / 1e6:,.2f} MB" for kind, c in collectives.items())
        or "none",
        "speed": f"at most {rate:,.0f} images/s a chip, {rate * where.num_chips:,.0f} in all (estimate)",
    }
    if num_images is None:
        lines["length"] = "unknown without --num-images"
    else:
        steps = max(1, round(config.epochs * num_images / config.batch_size))
        result |= {"steps": steps, "hours": steps * seconds / 3600}
        lines["length"] = (
            f"{steps:,} steps for {config.epochs:g} epochs of {num_images:,} images: at least "
            f"{result['hours']:,.2f} hours (estimate)"
        )
    progress.show_table("a step of a chip, and the run", lines)
    return result


def _total(report: Report, column: int) -> float:
    return sum(kind[column] for kind in report.kinds.values())


# Command -------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    parser = cli.parser(__doc__, EXAMPLES, hosts=False)
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="the recipe, and its argument")
    parser.add_argument(
        "--topology", required=True, metavar="SLICE", help=f"such as v5e:2x4; TPUs: {', '.join(tpu.CHIPS)}"
    )
    parser.add_argument(
        "--num-images", type=cli.positive, metavar="N", help="of the training split; known of imagenet2012"
    )
    parser.add_argument(
        "--find-largest-batch", action="store_true", help="compile for other batches too: a few times as long"
    )
    parser.add_argument("--config.KEY=VALUE", dest="ignored", metavar="", help="override a key of the recipe")
    arguments, overrides = parser.parse_known_args(argv)
    where = tpu.parse_slice(arguments.topology)
    config = recipe.load(arguments.config, overrides)
    num_images = arguments.num_images or NUM_IMAGES.get(config.data.get("name"))
    devices = tpu.devices(where)
    limit = where.chip.usable_bytes
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    parts = where.num_chips * config.step.accumulation_steps

    def compiled_at(batch_size: int) -> Report | DoesNotFit:
        changed = config.copy_and_resolve_references()
        changed.batch_size = batch_size
        with progress.waiting(f"compiling for {batch_size:,} images on {where.num_chips} x {where.name.partition(':')[0]}"):
            try:
                compiled = compile_step(changed, devices, num_images or batch_size)
            except DoesNotFit as error:
                return error
        return measure(compiled, changed, where.num_chips)

    report = compiled_at(config.batch_size)
    fits = isinstance(report, Report)
    used = report.memory if fits else report.used
    result = {
        "config": arguments.config,
        "topology": where.name,
        "chips": where.num_chips,
        **versions,
        "batch_size": config.batch_size,
        "fits": fits,
        "memory_bytes": used,
        "usable_bytes": limit,
    }
    words = f"fits: {100 * used / limit:.0f} %" if fits else "DOES NOT FIT: more than the"
    rows = {
        "step": f"batch {config.batch_size:,}, {config.batch_size / where.num_chips:g} images a chip"
        + (f" in {config.step.accumulation_steps} parts" if config.step.accumulation_steps > 1 else ""),
        "memory": f"{_gib(used)} a chip; {words} of {_gib(limit)}",
        "compiler": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    if fits:
        rows["state"] = f"{_gb(report.state)} GB of it: parameters, statistics, optimizer, averages"
    if arguments.find_largest_batch:

        def used_at(images: int) -> int:
            at = report if images * parts == config.batch_size else compiled_at(images * parts)
            return at.memory if isinstance(at, Report) else max(at.used, limit + 1)

        state = report.state if fits else 0
        largest, too_large = largest_batch(used_at, limit, config.batch_size // parts, state, BATCH_GRAIN)
        result |= {"largest_batch": largest * parts, "too_large_batch": too_large * parts}
        rows["largest batch"] = f"{largest * parts:,} fits, {too_large * parts:,} does not (multiples of {BATCH_GRAIN})"
    progress.show_table(f"{arguments.config} on {where.name}, {where.num_chips} chips", rows)
    if fits:
        result |= _show(config, where, report, num_images)
    print(progress.to_json(result))
    return 0 if fits else 1


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


if __name__ == "__main__":
    cli.run(main)
