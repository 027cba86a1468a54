"""What it costs that a run cannot be lost: checkpoints of the ImageNet recipe's state, and the watch over each step.

The state is that of `configs/imagenet.py` at random: parameters, their average, the optimizer's, batch statistics. To
save it, training stands still while the arrays are checked and copied; they are written beside the steps that follow.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax

from benchmarks import command
from xception_flax.host.watchdog import Watchdog
from xception_flax.recipes import reading
from xception_flax.training import checkpoint, sharding
from xception_flax.training.program import create_program, image_shape

EXAMPLES = """\
  python -m benchmarks.saving
  python -m benchmarks.saving --folder /mnt/disk --step-ms 35.9 --steps 10009"""

IMAGES = 1_281_167  # of ImageNet's training split
BATCH, STEP_MS = 128, 35.9  # of one H200: README.md
SIGNS = 100_000


def main(argv: list[str]) -> int:
    positive = command.positive
    arguments = command.parser("saving", __doc__, EXAMPLES)
    arguments.add_argument("--rounds", type=positive(int), default=5, metavar="N", help="saves (5)")
    arguments.add_argument("--folder", type=Path, metavar="DIR", help="on the disk to measure (temporary files')")
    arguments.add_argument("--step-ms", type=positive(float), default=STEP_MS, metavar="MS", help=f"a step ({STEP_MS})")
    steps = IMAGES // BATCH
    arguments.add_argument(
        "--steps", type=positive(int), default=steps, metavar="N", help=f"between saves ({steps:,}: an epoch)"
    )
    options = arguments.parse_args(argv)
    command.check(arguments, options)

    config = reading.load("configs/imagenet.py")
    program = create_program(config, sharding.create_mesh(), image_shape(config), IMAGES)
    state = jax.block_until_ready(program.init(jax.random.key(0)))
    stands_still, written = [], []
    progress = command.Progress("saving")
    with tempfile.TemporaryDirectory(prefix="xception_flax_benchmark_", dir=options.folder) as folder:
        with checkpoint.open_manager(Path(folder) / "checkpoints", best_metric="top1") as manager:
            for number in range(options.rounds + 1):
                progress.show(f"save {number} of {options.rounds}")
                began = time.perf_counter()
                checkpoint.save(manager, state.replace(step=state.step + number), {}, None)
                stands_still.append(time.perf_counter() - began)
                checkpoint.check_saves(manager, wait=True)
                written.append(time.perf_counter() - began)
        with Watchdog(30, Path(folder) / "stacks.txt", stop=False) as watchdog:
            sign = seconds_of(lambda: [watchdog.sign("a step") for _ in range(SIGNS)]) / SIGNS
    progress.end()

    megabytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6
    step = options.step_ms / 1000
    still = statistics.median(stands_still[1:])  # the first compiles, and is read back
    rows = [
        ("training stands still", *spread(stands_still[1:]), f"{still / (options.steps * step):.3%}"),
        ("until the checkpoint is whole", *spread(written[1:]), "beside it"),
        (
            "the first save stands still",
            f"{stands_still[0]:.2f}",
            "",
            f"{stands_still[0] / (options.steps * step):.3%}",
        ),
        ("the watchdog, two signs a step", f"{2 * sign:.1e}", "", f"{2 * sign / step:.3%}"),
    ]
    share = f"of {options.steps:,} steps of {options.step_ms:g} ms"
    print(f"\n{command.markdown((f'a state of {megabytes:,.0f} MB', 's', 'of saves', share), rows)}\n")
    results = {"bytes": megabytes * 1e6, "stands_still": stands_still, "written": written, "sign": sign}
    command.write_json(options.json, options, results)
    return 0


def seconds_of(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def spread(seconds: list[float]) -> tuple[str, str]:
    """Returns the median and the range."""
    return f"{statistics.median(seconds):.2f}", f"{min(seconds):.2f} to {max(seconds):.2f}"


if __name__ == "__main__":
    command.run(main)
