"""Compiles a recipe's training step for a TPU slice that is not there, and says what it will cost.

It is the step that train.py runs, compiled from shapes by the TPU's own compiler (libtpu): no TPU, no
data and no memory are needed, one to five minutes are. What is the compiler's word and what an estimate:
  memory        of the compiler: what a chip needs at most; a program that does not fit is not made
  bytes         a step and chip, read from the compiled program: each instruction reads what it takes
                and writes what it gives once; arrays in the chip's own memory (VMEM) are not counted
  arithmetic    of the network: six times the multiply-adds of a forward pass (two operations each;
                forward, gradient of the input, gradient of the weights); the compiler's own count of
                all arithmetic stands beside it
  collectives   read from the compiled program: arrays that the chips add up or gather
  time          estimate: each kind of layer at the chip's full bandwidth or full arithmetic, whichever
                takes longer, which no chip reaches, and collectives after that, which may be hidden
                behind it; input, evaluation and checkpoints come on top
"""

import signal

from xception_flax import signals, tpu

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signals.stop_at_once)  # before the imports below, which take seconds
    tpu.hide_hardware()

import collections
import concurrent.futures
import importlib.metadata
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from xception_flax import cli, costs, fused, models, progress, recipe, sharding
from xception_flax.hlo import Collective, Hlo
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
KERNELS = "separable, fused"  # with step.lowering=fused: normalization and both convolutions in one
BETWEEN, LOSS, UPDATE = "between layers", "input, loss", "optimizer"
ORDER = (*KINDS.values(), KERNELS, BETWEEN, LOSS, UPDATE)

BATCH_GRAIN = 8  # images a chip; batches between two multiples are padded to the next on a TPU
MAX_COMPILATIONS = 8  # in search of the largest batch


class DoesNotFit(Exception):
    """The step needs `memory` bytes of a chip, which are not there."""

    def __init__(self, memory: int) -> None:
        self.memory = memory


class Cost(NamedTuple):
    """Of one kind of layer: `flops` of the network's own arithmetic, `size` bytes of HBM read and written."""

    flops: float
    size: int


class Report(NamedTuple):
    """What a compiled step costs a chip.

    Attributes:
      memory: bytes at most.
      state: bytes of it that parameters, statistics, optimizer and averages take.
      flops: all arithmetic, as the compiler counts it.
      xla_size: bytes accessed, as the compiler counts them: also those within the chip.
      kinds: costs of each kind of layer.
      collectives: what is sent between chips.
    """

    memory: int
    state: int
    flops: float
    xla_size: float
    kinds: dict[str, Cost]
    collectives: list[Collective]


def batch_shapes(config: ConfigDict) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of each array of a training batch, as `data.Split.batch_shapes` has them, without the data."""
    size = config.batch_size
    several = config.metrics.name == "multi_label"
    mask = {"mask": ((size,), np.dtype(np.float32))} if config.data.on_bad_image == "replace" else {}
    return mask | {
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
        first_line = str(error).partition("\n")[0]
        amounts = re.findall(r"([\d.]+)([MGT])\b", first_line)
        if "RESOURCE_EXHAUSTED" not in first_line or "hbm" not in first_line.lower() or not amounts:
            raise
        raise DoesNotFit(max(int(float(n) * 2 ** {"M": 20, "G": 30, "T": 40}[unit]) for n, unit in amounts)) from None


def measure(compiled: jax.stages.Compiled, config: ConfigDict, num_chips: int) -> Report:
    """Returns what the compiled step of a recipe costs each of `num_chips` chips."""
    memory, cost, hlo = compiled.memory_analysis(), compiled.cost_analysis(), Hlo(compiled.as_text())
    network = models.create_model(**config.model)
    layers = costs.measure(network, _image_shape(config))
    kinds = collections.defaultdict(lambda: [0.0, 0])
    paths = {"/".join(layer.path): KINDS[layer.module] for layer in layers}
    parts = list(hlo.costs())
    with_kernels = {name for part in parts if (name := fused_layer(part.op_name))}
    for layer in layers:
        kind = KERNELS if "/".join(layer.path[:-1]) in with_kernels else KINDS[layer.module]
        kinds[kind][0] += 6 * layer.macs * config.batch_size / num_chips
    for part in parts:
        kinds[kind_of(part.op_name, paths, type(network).__name__)][1] += part.hbm_size
    return Report(
        memory=sum(getattr(memory, f"{n}_size_in_bytes") for n in ("argument", "output", "temp", "generated_code"))
        - memory.alias_size_in_bytes,
        state=memory.alias_size_in_bytes,
        flops=cost["flops"],
        xla_size=cost["bytes accessed"],
        kinds={kind: Cost(*kinds[kind]) for kind in sorted(kinds, key=ORDER.index)},
        collectives=hlo.collectives(),
    )


def fused_layer(op_name: str) -> str | None:
    """Returns the path of the separable convolution that a kernel of `fused` computes; None of another operation."""
    match = re.search(r"\.endpoints/(.+)\.normalized/shard_map/", op_name)
    return match[1] if match else None


def kind_of(op_name: str, paths: dict[str, str], network: str) -> str:
    """Returns the kind of layer that an operation of the step belongs to.

    Args:
      op_name: such as 'jit(train_step)/transpose(jvp(Xception))/Xception.endpoints/block1_conv1/mul'.
      paths: kinds of the layers by their paths: `{"block1_conv1": "regular conv.", ...}`.
      network: its class.
    """
    if fused_layer(op_name):
        return KERNELS
    parts = op_name.split("/")
    for start in range(len(parts)):
        for end in range(len(parts), start, -1):
            if (path := "/".join(parts[start:end])) in paths:
                return paths[path]
    return BETWEEN if f"jvp({network})" in op_name else LOSS if "jvp(" in op_name else UPDATE


def estimate(report: Report, where: tpu.Slice, images_a_chip: float) -> dict[str, Any]:
    """Returns what the report implies for a slice, as it goes into the JSON: an estimate, no measurement."""
    chip, kinds = where.chip, {}
    for kind, cost in report.kinds.items():
        computing, moving = cost.flops / chip.flops_per_second, cost.size / chip.hbm_bytes_per_second
        bound = "arithmetic" if computing > moving else "bytes"
        kinds[kind] = {"flops": cost.flops, "bytes": cost.size, "seconds": max(computing, moving), "bound": bound}
    sent: dict[str, dict[str, int]] = {}
    for c in report.collectives:
        of_kind = sent.setdefault(c.kind, {"count": 0, "bytes": 0})
        of_kind["count"] += c.times
        of_kind["bytes"] += c.times * c.size
    sending = sum(c.times * where.collective_seconds(c.kind, c.size) for c in report.collectives)
    bounds = {name: sum(k["seconds"] for k in kinds.values() if k["bound"] == name) for name in ("arithmetic", "bytes")}
    bounds["links"] = sending
    seconds = sum(bounds.values())
    return {
        "flops": report.flops,
        "network_flops": sum(cost.flops for cost in report.kinds.values()),
        "hbm_bytes": sum(cost.size for cost in report.kinds.values()),
        "xla_bytes": report.xla_size,
        "kinds": kinds,
        "collectives": sent,
        "collective_seconds": sending,
        "step_seconds": seconds,
        "bound": max(bounds, key=bounds.__getitem__),
        "images_per_second_per_chip": images_a_chip / seconds,
    }


def largest_batch(
    memory_at: Callable[[int], int], usable: int, first: int, state: int, grain: int = BATCH_GRAIN
) -> tuple[int, int | None]:
    """Returns the most images a chip that fit, and the fewest that do not, or None if all did: multiples of `grain`.

    Memory is nearly affine in the batch, so each guess is where the line through the last two points
    meets the limit. After `MAX_COMPILATIONS` the two may be further apart than they could be.

    Args:
      memory_at: compiles for so many images a chip, and returns the bytes that it needs.
      usable: bytes of a chip.
      first: images a chip to begin with.
      state: bytes without any image.
      grain: images between two batches that are tried.
    """
    fits, fails = 0, sys.maxsize
    guess, last = max(grain, first // grain * grain), (0, state)
    for _ in range(MAX_COMPILATIONS):
        point = (guess, memory_at(guess))
        fits, fails = (max(fits, guess), fails) if point[1] <= usable else (fits, min(fails, guess))
        if fails - fits <= grain:
            break
        an_image = (point[1] - last[1]) / (point[0] - last[0])
        # Four times at most: where a chip is nearly empty, its memory says little of an image's.
        crossing = guess + (usable - point[1]) / an_image if an_image > 0 else 4 * guess
        last, guess = point, int(max(min(crossing // grain * grain, 4 * guess, fails - grain), fits + grain))
    return fits, None if fails == sys.maxsize else fails


# Showing -------------------------------------------------------------------------------------------


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"


def _gib(size: float) -> str:
    return f"{size / tpu.GIB:.2f} GiB"


def _show_memory(config: ConfigDict, where: tpu.Slice, result: dict[str, Any]) -> None:
    used, usable, parts = result["memory_bytes"], where.chip.usable_bytes, config.step.accumulation_steps
    rows = {
        "compiler": f"jax {result['jax']}, libtpu {result['libtpu']}",
        "batch": f"{config.batch_size:,}, {config.batch_size / where.num_chips:g} images a chip"
        + (f" in {parts} parts" if parts > 1 else ""),
        "memory": f"{_gib(used)} a chip, of {_gib(usable)}: " + ("fits" if result["fits"] else "DOES NOT FIT"),
    }
    if result["fits"]:
        rows["  of it state"] = f"{_gib(result['state_bytes'])}: parameters, statistics, optimizer, averages"
    if "largest_batch" in result:
        too_large = result["too_large_batch"]
        rows["largest batch"] = f"{result['largest_batch']:,} fits, " + (
            f"{too_large:,} does not" if too_large else f"and so did all that {MAX_COMPILATIONS} compilations tried"
        )
    progress.show_table(f"{result['config']} on {where.name}, {where.num_chips} chips", rows)


def _show_costs(config: ConfigDict, where: tpu.Slice, result: dict[str, Any]) -> None:
    kinds = result["kinds"]
    columns = {
        "a step of a chip": [*kinds, "collectives", "in all"],
        "GFLOP": [*(f"{k['flops'] / 1e9:,.1f}" for k in kinds.values()), "", f"{result['network_flops'] / 1e9:,.1f}"],
        "GB": [*(f"{k['bytes'] / 1e9:,.2f}" for k in kinds.values()), "", f"{result['hbm_bytes'] / 1e9:,.2f}"],
        "ms": [
            f"{1e3 * seconds:,.2f}"
            for seconds in (
                *(k["seconds"] for k in kinds.values()),
                result["collective_seconds"],
                result["step_seconds"],
            )
        ],
        "bound by": [*(k["bound"] for k in kinds.values()), "links", result["bound"]],
    }
    progress.show_columns("time by the chip's specification (estimate)", columns)
    rate = result["images_per_second_per_chip"]
    rows = {
        "arithmetic": f"{result['network_flops'] / 1e9:,.0f} GFLOP of the network; in all, by the compiler's count, "
        f"{result['flops'] / 1e9:,.0f}",
        "bytes": f"{_gb(result['hbm_bytes'])} of HBM; by the compiler's count, with those within the chip, "
        f"{_gb(result['xla_bytes'])}",
        "collectives": ", ".join(
            f"{c['count']} {kind} of {c['bytes'] / 1e6:,.2f} MB" for kind, c in result["collectives"].items()
        )
        or "none",
        "speed": f"{rate:,.0f} images/s a chip, {rate * where.num_chips:,.0f} in all (estimate)",
        "run": "its length needs --num-images",
    }
    if "steps" in result:
        rows["run"] = f"{result['steps']:,} steps, {config.epochs:g} epochs: {result['hours']:,.2f} h (estimate)"
    progress.show_table("a step of a chip, and the run", rows)


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
    num_images = arguments.num_images or NUM_IMAGES.get(str(config.data.get("name")).partition(":")[0])
    devices, usable = tpu.devices(where), where.chip.usable_bytes

    def at(batch_size: int) -> Report | DoesNotFit:
        changed = config.copy_and_resolve_references()
        changed.batch_size = batch_size
        with progress.waiting(f"compiling for {where.name}, {batch_size:,} images"):
            try:
                # In a thread: this one waits as Python does, and so hears Ctrl-C.
                with concurrent.futures.ThreadPoolExecutor(1) as thread:
                    compiled = thread.submit(compile_step, changed, devices, num_images or batch_size).result()
            except DoesNotFit as error:
                return error
        return measure(compiled, changed, where.num_chips)

    report = at(config.batch_size)
    fits = isinstance(report, Report)
    result = {
        "config": arguments.config,
        "topology": where.name,
        "chips": where.num_chips,
        **{name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
        "batch_size": config.batch_size,
        "fits": fits,
        "memory_bytes": report.memory,
        "usable_bytes": usable,
    }
    if arguments.find_largest_batch:
        parts = where.num_chips * config.step.accumulation_steps

        def memory_at(images: int) -> int:
            known = images * parts == config.batch_size
            found = report if known else at(images * parts)
            return found.memory if isinstance(found, Report) else max(found.memory, usable + 1)

        grain = fused.IMAGES if config.step.lowering == "fused" else BATCH_GRAIN
        sizes = largest_batch(memory_at, usable, config.batch_size // parts, report.state if fits else 0, grain)
        result["largest_batch"], result["too_large_batch"] = (images and images * parts for images in sizes)
    if fits:
        result |= {"state_bytes": report.state} | estimate(report, where, config.batch_size / where.num_chips)
        if num_images is not None:
            steps = max(1, round(config.epochs * num_images / config.batch_size))
            result |= {"steps": steps, "hours": steps * result["step_seconds"] / 3600}
    _show_memory(config, where, result)
    if fits:
        _show_costs(config, where, result)
    print(progress.to_json(result))
    return 0 if fits else 1


if __name__ == "__main__":
    cli.run(main)
