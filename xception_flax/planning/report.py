"""What a training step costs on other machines, without having them: memory, bytes, kernels, a bound on its time."""

import collections
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from xception_flax import models
from xception_flax.data.batch import Shapes, shapes
from xception_flax.models import costs, ops
from xception_flax.planning.hlo import Collective, Hlo
from xception_flax.planning.machines import Machine
from xception_flax.training import sharding
from xception_flax.training.metrics import METRICS
from xception_flax.training.program import create_program, image_shape

# Training images of data sets that this machine need not have: ILSVRC 2012.
NUM_IMAGES = {"imagenet2012": 1_281_167}

KINDS = {
    "Conv": "regular conv.",
    "DepthwiseConv": "depthwise conv.",
    "PointwiseConv": "pointwise conv.",
    "BatchNorm": "batch norm.",
    "Dense": "classifier",
}

BETWEEN, LOSS, UPDATE = "between layers", "input, loss", "optimizer"
ORDER = (*KINDS.values(), ops.FUSED_LAYER, BETWEEN, LOSS, UPDATE)

BATCH_GRAIN = 8  # images a chip; batches between two multiples are padded to the next on a TPU
MAX_COMPILATIONS = 8  # in search of the largest batch


class DoesNotFit(Exception):
    """The step needs `memory` bytes of a chip, more than it has."""

    def __init__(self, memory: int) -> None:
        self.memory = memory


class Cost(NamedTuple):
    """The cost of one kind of layer: `flops` of the network's own arithmetic, `size` bytes of HBM read and written."""

    flops: float
    size: int


class Report(NamedTuple):
    """What a compiled step costs a chip.

    Attributes:
      memory: bytes at the peak.
      state: bytes of parameters, statistics, optimizer and averages, a part of `memory`.
      flops: all arithmetic, as the compiler counts it; None where it does not.
      xla_size: bytes accessed, as the compiler counts them, also those within the chip; None where it does not.
      kinds: costs of each kind of layer.
      kernels: how often each kind of kernel is started; empty where a step is one program.
      collectives: what is sent between chips.
    """

    memory: int
    state: int
    flops: float | None
    xla_size: float | None
    kinds: dict[str, Cost]
    kernels: dict[str, int]
    collectives: list[Collective]


def batch_shapes(config: ConfigDict) -> Shapes:
    """Returns shape and type of each array of a training batch, as `data.Split.batch_shapes` does, without the data."""
    label_shape = (config.model.num_classes,) if METRICS[config.metrics.name].several_labels else ()
    masked = config.data.on_bad_image == "replace"
    return shapes(config.batch_size, image_shape(config), label_shape, masked=masked)


def compile_step(
    config: ConfigDict, devices: Sequence[Any], num_images: int, compiler_options: dict[str, Any] | None = None
) -> jax.stages.Compiled:
    """Returns the training step of a resolved recipe, compiled for `devices`.

    Args:
      config: the resolved recipe.
      devices: of a `Machine`.
      num_images: of the training split.
      compiler_options: of the machine.

    Raises:
      UserError: values of the recipe do not go together.
      DoesNotFit: a device has too little memory.
    """
    mesh = sharding.create_mesh(**config.mesh, devices=devices)
    sharding.check_batch_size(config.batch_size, mesh, config.step.accumulation_steps)
    program = create_program(config, mesh, image_shape(config), num_images)
    lowered = program.train_step.lower(program.abstract_state, sharding.abstract_batch(mesh, batch_shapes(config)))
    try:
        return lowered.compile(compiler_options)
    except jax.errors.JaxRuntimeError as error:
        # '... the total memory required ... (17.31G) exceeds available HBM (15.75G)', 'Used 17.31G of 15.75G hbm'
        first_line = str(error).partition("\n")[0]
        amounts = re.findall(r"([\d.]+)([MGT])\b", first_line)
        if "RESOURCE_EXHAUSTED" not in first_line or "hbm" not in first_line.lower() or not amounts:
            raise
        raise DoesNotFit(max(int(float(n) * 2 ** {"M": 20, "G": 30, "T": 40}[unit]) for n, unit in amounts)) from None


def create_report(compiled: jax.stages.Compiled, config: ConfigDict, where: Machine) -> Report:
    """Returns what the compiled step of a recipe costs each chip of a machine."""
    memory, cost, hlo = compiled.memory_analysis(), compiled.cost_analysis() or {}, Hlo(compiled.as_text())
    network = models.create_model(**config.model)
    layers = costs.list_layers(network, image_shape(config))
    kinds = collections.defaultdict(lambda: [0.0, 0])
    paths = {"/".join(layer.path): KINDS[layer.module] for layer in layers}
    parts = list(hlo.traffic())
    fused = {name for part in parts if (name := ops.fused_layer(part.op_name))}
    for layer in layers:
        kind = ops.FUSED_LAYER if "/".join(layer.path[:-1]) in fused else KINDS[layer.module]
        kinds[kind][0] += 6 * layer.macs * config.batch_size / where.num_chips
    kernels: collections.Counter[str] = collections.Counter()
    for part in parts:
        kinds[kind_of(part.op_name, paths, type(network).__name__)][1] += part.hbm_size
        if kernel := where.kernel(part):
            kernels[kernel] += part.times
    return Report(
        memory=sum(getattr(memory, f"{n}_size_in_bytes") for n in ("argument", "output", "temp", "generated_code"))
        - memory.alias_size_in_bytes,
        state=memory.alias_size_in_bytes,
        flops=cost.get("flops"),
        xla_size=cost.get("bytes accessed"),
        kinds={kind: Cost(*kinds[kind]) for kind in sorted(kinds, key=ORDER.index)},
        kernels=dict(kernels.most_common()),
        collectives=hlo.collectives(),
    )


def kind_of(op_name: str, paths: dict[str, str], network: str) -> str:
    """Returns the kind of layer that an operation of the step belongs to.

    Args:
      op_name: such as 'jit(train_step)/transpose(jvp(Xception))/Xception.endpoints/block2/block2_sepconv1_bn/mul'.
      paths: kinds of the layers by their paths: `{"block1_conv1": "regular conv.", ...}`.
      network: name of its class.
    """
    if ops.fused_layer(op_name):
        return ops.FUSED_LAYER
    # Flax names the scope of a method MODULE.METHOD.
    parts = [part.partition(".")[0] for part in op_name.split("/")]
    for start in range(len(parts)):
        for end in range(len(parts), start, -1):
            if (path := "/".join(parts[start:end])) in paths:
                return paths[path]
    if ".normalized/" in op_name:  # a chain of layers: what is none of its convolutions is of the normalization
        return KINDS["BatchNorm"]
    return BETWEEN if f"jvp({network})" in op_name else LOSS if "jvp(" in op_name else UPDATE


def estimate(report: Report, where: Machine, images_a_chip: float, dtype: str) -> dict[str, Any]:
    """Returns what the report implies for a machine, for the JSON: an estimate, not a measurement.

    Args:
      report: of a step.
      where: the machine.
      images_a_chip: of a step.
      dtype: in which the network computes. Where the chip's peak in it is not known, that in bfloat16 is taken, which
        'peak_dtype' of the result says.
    """
    chip, kinds = where.chip, {}
    peak_dtype = dtype if dtype in chip.peaks else "bfloat16"
    peak = chip.peaks[peak_dtype]
    for kind, cost in report.kinds.items():
        computing, moving = cost.flops / peak, cost.size / chip.hbm_bytes_per_second
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
        "peak_dtype": peak_dtype,
        "peak_flops_per_second": peak,
        "kinds": kinds,
        "kernels": report.kernels,
        "collectives": sent,
        "collective_seconds": sending,
        "step_seconds": seconds,
        "bound": max(bounds, key=bounds.__getitem__),
        "images_per_second_per_chip": images_a_chip / seconds,
    }


def largest_batch(
    memory_at: Callable[[int], int], usable: int, first: int, state: int, grain: int = BATCH_GRAIN
) -> tuple[int, int | None]:
    """Returns the most images a chip that fit, and the fewest that do not (None if all did), as multiples of `grain`.

    Memory is nearly affine in the batch, so each guess is where the line through the last two points
    meets the limit. After `MAX_COMPILATIONS` the two may still be more than a `grain` apart.

    Args:
      memory_at: compiles for a number of images a chip, and returns the bytes that it needs.
      usable: bytes of a chip.
      first: the first number of images a chip to try.
      state: bytes without any image.
      grain: least difference between two numbers of images.
    """
    fits, fails = 0, sys.maxsize
    guess, last = max(grain, first // grain * grain), (0, state)
    for _ in range(MAX_COMPILATIONS):
        point = (guess, memory_at(guess))
        fits, fails = (max(fits, guess), fails) if point[1] <= usable else (fits, min(fails, guess))
        if fails - fits <= grain:
            break
        an_image = (point[1] - last[1]) / (point[0] - last[0])
        # At most four times as many: the memory of a nearly empty chip says little about that of an image.
        crossing = guess + (usable - point[1]) / an_image if an_image > 0 else 4 * guess
        last, guess = point, int(max(min(crossing // grain * grain, 4 * guess, fails - grain), fits + grain))
    return fits, None if fails == sys.maxsize else fails
