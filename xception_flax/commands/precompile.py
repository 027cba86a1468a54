"""Compiles a recipe's training step for TPUs or GPUs, without having them, and reports what it will cost.

It is the step that train.py runs, compiled from shapes by the compiler of the TPU (libtpu) or the GPU (XLA for
CUDA). No TPU, GPU or data are needed; it takes one to five minutes. Where the figures are from:
  memory        the compiler: the most that a chip needs. For GPUs it is compared with the three quarters of
                their memory that JAX takes (XLA_PYTHON_CLIENT_MEM_FRACTION), and lacks what cuDNN works in
  bytes         per step and chip, read from the compiled program: each instruction reads its operands
                and writes its results once; arrays in a TPU's own memory (VMEM) are not counted
  kernels       of GPUs, read from the compiled program, which was not autotuned: on the GPU some matrix
                products and convolutions will be other kernels
  arithmetic    of the network: six times the multiply-adds of a forward pass (two operations each;
                forward, gradient of the input, gradient of the weights); the compiler's own count of
                all arithmetic is beside it
  collectives   read from the compiled program: arrays that the chips sum or gather
  time          an estimate: each kind of layer takes the larger of its bytes at full bandwidth and its
                arithmetic at full peak, which no chip reaches: that of the type in which the recipe
                computes, where it is known, else that of bfloat16; collectives are added, though they
                may overlap; input, evaluation, checkpoints and starting kernels are not included
"""

import concurrent.futures
import importlib.metadata
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from xception_flax.commands import cli
from xception_flax.display import console
from xception_flax.models import ops
from xception_flax.planning import gpus, machines, tpus
from xception_flax.planning.machines import Machine
from xception_flax.planning.report import (
    BATCH_GRAIN,
    MAX_COMPILATIONS,
    NUM_IMAGES,
    DoesNotFit,
    Report,
    compile_step,
    create_report,
    estimate,
    largest_batch,
)
from xception_flax.recipes import reading
from xception_flax.text import naming
from xception_flax.text.counting import counted
from xception_flax.training.length import create_length

EXAMPLES = """\
  xception-flax precompile --config imagenet --topology v5e:4x4
  xception-flax precompile --config imagenet --topology v5e:2x4 --config.batch_size=1024
  xception-flax precompile --config imagenet --topology h100:8
  xception-flax precompile --config imagenet --topology v6e:2x4 --find-largest-batch
  xception-flax precompile --config folder:photos --topology v4:2x2x1 --num-images 50000"""


# Showing -------------------------------------------------------------------------------------------


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _show_memory(config: ConfigDict, where: Machine, result: dict[str, Any]) -> None:
    used, usable, parts = result["memory_bytes"], where.chip.usable_bytes, config.step.accumulation_steps
    rows = {
        "compiler": ", ".join(f"{name} {result[name]}" for name in where.libraries),
        "batch": f"{config.batch_size:,}, {config.batch_size / where.num_chips:g} images a {where.noun}"
        + (f" in {parts} parts" if parts > 1 else ""),
        "memory": f"{_gib(used)} a {where.noun}, of {_gib(usable)}: " + ("fits" if result["fits"] else "DOES NOT FIT"),
    }
    if result["fits"]:
        rows["  of it state"] = f"{_gib(result['state_bytes'])}: parameters, statistics, optimizer, averages"
    if "largest_batch" in result:
        too_large = result["too_large_batch"]
        rows["largest batch"] = f"{result['largest_batch']:,} fits, " + (
            f"{too_large:,} does not" if too_large else f"and so did all that {MAX_COMPILATIONS} compilations tried"
        )
    console.show_table(f"{result['config']} on {where.name}, {counted(where.num_chips, where.noun)}", rows)


def _show_costs(config: ConfigDict, where: Machine, result: dict[str, Any]) -> None:
    kinds = result["kinds"]
    columns = {
        f"a step of a {where.noun}": [*kinds, "collectives", "in all"],
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
    console.show_columns(f"time by the {where.noun}'s specification (estimate)", columns)
    rate = result["images_per_second_per_chip"]
    rows = {
        "arithmetic": f"{result['network_flops'] / 1e9:,.0f} GFLOP of the network"
        + (f"; in all, by the compiler's count, {result['flops'] / 1e9:,.0f}" if result["flops"] else ""),
        "peak": _peak(jnp.dtype(config.model.dtype).name, where, result),
        "bytes": f"{_gb(result['hbm_bytes'])} of HBM"
        + (
            f"; by the compiler's count, with those within the chip, {_gb(result['xla_bytes'])}"
            if result["xla_bytes"]
            else ""
        ),
        "kernels": ", ".join(counted(count, kernel) for kernel, count in result["kernels"].items()),
        "collectives": ", ".join(
            f"{c['count']} {kind} of {c['bytes'] / 1e6:,.2f} MB" for kind, c in result["collectives"].items()
        )
        or "none",
        "speed": f"{rate:,.0f} images/s a {where.noun}, {rate * where.num_chips:,.0f} in all (estimate)",
        "run": "its length needs --num-images",
        "not known": where.not_known,
    }
    if "steps" in result:
        epochs = "1 epoch" if config.epochs == 1 else f"{config.epochs:g} epochs"
        rows["run"] = f"{counted(result['steps'], 'step')}, {epochs}: {result['hours']:,.2f} h (estimate)"
    console.show_table(f"a step of a {where.noun}, and the run", {name: row for name, row in rows.items() if row})


def _peak(dtype: str, where: Machine, result: dict[str, Any]) -> str:
    """Returns of which type the peak is that the estimate takes; '' for bfloat16 in a recipe that computes in it."""
    used = result["peak_dtype"]
    if dtype == used == "bfloat16":
        return ""
    unknown = f", since the {where.noun}'s in {dtype} is not known" if dtype != used else ""
    return f"{result['peak_flops_per_second'] / 1e12:,.1f} TFLOP/s, in {used}{unknown}"


# Command -------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    parser = cli.parser("xception-flax precompile", __doc__, EXAMPLES, hosts=False)
    cli.add_recipe(parser)
    parser.add_argument(
        "--topology",
        required=True,
        metavar="MACHINE",
        help=f"a TPU slice, such as v5e:2x4 ({', '.join(tpus.CHIPS)}); or GPUs ({', '.join(gpus.GPUS)}): h100 is one, "
        "h100:8 a host of eight, h100:2x8 two such hosts",
    )
    parser.add_argument(
        "--num-images", type=cli.positive, metavar="N", help="images of the training split; not needed for imagenet2012"
    )
    parser.add_argument(
        "--find-largest-batch", action="store_true", help="compile for other batch sizes too: takes a few times as long"
    )
    arguments, overrides = parser.parse_known_args(argv)
    where = machines.parse_machine(arguments.topology)
    config = reading.load(arguments.config, overrides)
    num_images = arguments.num_images or NUM_IMAGES.get(str(config.data.get("name")).partition(":")[0])
    devices, usable = where.devices(), where.chip.usable_bytes

    def at(batch_size: int) -> Report | DoesNotFit:
        changed = config.copy_and_resolve_references()
        changed.batch_size = batch_size
        with console.waiting(f"compiling for {where.name}, {counted(batch_size, 'image')}"):
            try:
                # In a thread, so that this one can handle Ctrl-C while the compiler runs.
                with concurrent.futures.ThreadPoolExecutor(1) as thread:
                    step = compile_step, changed, devices, num_images or batch_size, where.compiler_options
                    compiled = thread.submit(*step).result()
            except DoesNotFit as error:
                return error
        found = create_report(compiled, changed, where)
        # XLA for GPUs compiles what does not fit, too.
        return found if found.memory <= usable else DoesNotFit(found.memory)

    report = at(config.batch_size)
    fits = isinstance(report, Report)
    result = {
        "config": arguments.config,
        "topology": where.name,
        "chips": where.num_chips,
        **{name: importlib.metadata.version(name) for name in where.libraries},
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

        grain = max(BATCH_GRAIN, ops.image_multiple(config.step.lowering))
        sizes = largest_batch(memory_at, usable, config.batch_size // parts, report.state if fits else 0, grain)
        result["largest_batch"], result["too_large_batch"] = (images and images * parts for images in sizes)
    if fits:
        result |= {"state_bytes": report.state} | estimate(
            report, where, config.batch_size / where.num_chips, jnp.dtype(config.model.dtype).name
        )
        if num_images is not None:
            steps = create_length(config.epochs, config.batch_size, num_images).total_steps
            result |= {"steps": steps, "hours": steps * result["step_seconds"] / 3600}
    _show_memory(config, where, result)
    if fits:
        _show_costs(config, where, result)
    print(naming.to_json_line(result))
    return 0 if fits else 1
