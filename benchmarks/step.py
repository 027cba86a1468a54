"""Times a forward pass and a training step of Xception on a CPU: this project beside what one would use instead.

Each contender is a process of its own on the same CPUs. They take turns many times, so that other load on the machine
affects all alike; the processes that wait are stopped. See benchmarks/README.md.
"""

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.contenders import CEILINGS, CONTENDERS, MATRIX_GFLOP, MATRIX_SIZE
from benchmarks.job import Job
from benchmarks.turns import Turns
from benchmarks.worker import Worker

EXAMPLES = f"""\
  python -m benchmarks.step
  python -m benchmarks.step --mode forward --only xception_flax,onnxruntime --rounds 3
  python -m benchmarks.step --batch 1 --json step.json

contenders: {", ".join(CONTENDERS)}"""

MODES = ("forward", "train")
MIN_IMAGE_SIZE = 71  # pixels a side; Keras Applications takes none smaller

# Largest difference from the expected result, as a share of its spread over images: rounding in float32 makes 1e-5,
# another network about 1.
MAX_DIFFERENCE = 1e-3

# A training step is the forward pass and two more of its size: the gradients of activations and of weights.
PASSES = {"forward": 1, "train": 3}


def main(argv: list[str]) -> int:
    arguments = command.parser("step", __doc__, EXAMPLES)
    arguments.add_argument("--mode", choices=(*MODES, "both"), default="both", help="what is timed (both)")
    arguments.add_argument("--batch", type=command.positive(int), default=8, metavar="N", help="images (8)")
    arguments.add_argument("--size", type=command.positive(int), default=299, metavar="PX", help="pixels a side (299)")
    command.add_only(arguments)
    command.add_turns(arguments)
    command.add_contenders_python(arguments)
    options = arguments.parse_args(argv)
    command.check(arguments, options)
    if options.size < MIN_IMAGE_SIZE:
        arguments.error(f"--size must be at least {MIN_IMAGE_SIZE} pixels, got {options.size}.")
    modes = MODES if options.mode == "both" else (options.mode,)
    names = command.chosen(arguments, options, CONTENDERS)
    for name in names:
        if options.only and not set(modes) & set(CONTENDERS[name].modes):
            arguments.error(f"{name} has no mode {options.mode!r}, only {', '.join(CONTENDERS[name].modes)}.")
    foreign = [name for name in names if not CONTENDERS[name].ours]
    command.check_contenders(arguments, options, foreign, "--only xception_flax,plain_linen")

    results = {}
    for mode in modes:
        if having := [name for name in names if mode in CONTENDERS[name].modes]:
            results[mode] = measure(having, mode, options)
            print(f"\n{table(results[mode])}\n", flush=True)
    command.write_json(options.json, options, results)
    return int(any("error" in row for result in results.values() for row in result["rows"]))


def measure(names: Sequence[str], mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the job, the ceiling of the machine, and a row for each of `names`, the fastest first."""
    # If no contender needs the other environment, the ceiling does not need it either.
    foreign = any(not CONTENDERS[name].ours for name in names)
    ceilings = [name for name in CEILINGS if foreign or CEILINGS[name].ours]
    progress = command.Progress(mode)
    with tempfile.TemporaryDirectory(prefix="xception_flax_benchmark_") as folder, Turns(progress) as turns:
        job = Job(folder, mode, options.batch, options.size, options.threads)

        def start(*, ours: bool, environment: Mapping[str, str] | None = None) -> Worker:
            python = Path(sys.executable) if ours else options.contenders_python
            return Worker(python, options.threads, Path(folder), environment or {})

        progress.show("making images and weights")
        with start(ours=True) as worker:
            readings = sorted({CONTENDERS[name].reading for name in names})
            costs = worker.ask("write_inputs", job=job._asdict(), readings=readings)
        if any(name.startswith(("onnxruntime", "openvino")) for name in names):
            progress.show("exporting timm's network to ONNX")
            with start(ours=False) as worker:
                worker.ask("write_onnx", job=job._asdict())

        for name in (*names, *ceilings):
            entry = (CONTENDERS | CEILINGS)[name]
            worker = start(ours=entry.ours, environment=entry.environment)
            turns.add(name, entry.title, worker, contender=name, job=job._asdict())
            difference = turns.rows[name].get("difference", 0.0)
            if not difference <= MAX_DIFFERENCE:
                turns.fail(
                    name, f"computes something else: the difference is {difference:.0e}, at most {MAX_DIFFERENCE:.0e}"
                )
        turns.take(options.rounds, options.seconds_per_turn)
        progress.end()

    rows = turns.rows
    ceiling = {name: MATRIX_GFLOP / rows[name]["seconds"] for name in ceilings if "seconds" in rows[name]}
    finished = sorted((rows[name] for name in names if "seconds" in rows[name]), key=lambda row: row["seconds"])
    others = [row for row in finished if not row["name"].startswith("xception_flax")]
    gflop = 2 * costs["macs"] / 1e9 * PASSES[mode]  # an image
    for row in finished:
        row["images_per_second"] = options.batch / row["seconds"]
        row["images_per_second_of_rounds"] = [options.batch / statistics.median(laps) for laps in row["lap_seconds"]]
        row["of_the_best_other"] = others[0]["seconds"] / row["seconds"] if others else math.nan
        row["of_the_ceiling"] = gflop * row["images_per_second"] / max(ceiling.values(), default=math.nan)
    return {
        **job._asdict(),
        "gflop_per_image": gflop,
        "parameters": costs["parameters"],
        "ceiling_gflop_per_second": ceiling,
        "ceiling_rows": [rows[name] for name in ceilings],
        "rows": finished + [rows[name] for name in names if "error" in rows[name]],
    }


def table(result: Mapping[str, Any]) -> str:
    """Returns the result of `measure` as a table in Markdown, and the ceiling in a line below it."""
    what = {"forward": "forward pass", "train": "training step"}[result["mode"]]
    header = (
        f"{what}, {result['batch']} x {result['size']} px, {result['threads']} threads",
        *("images/s", "of rounds", "of the best other", "of the ceiling"),
        *("build s", "first run s", "MB imported", "MB peak built", "MB peak run", "difference"),
    )
    rows = [
        (
            row["title"],
            f"{row['images_per_second']:.2f}",
            f"{min(row['images_per_second_of_rounds']):.2f} to {max(row['images_per_second_of_rounds']):.2f}",
            f"{row['of_the_best_other']:.2f}",
            f"{100 * row['of_the_ceiling']:.0f} %",
            f"{row['build_seconds']:.1f}",
            f"{row['first_seconds']:.1f}",
            *(f"{row[memory]:,.0f}" for memory in ("imported_mb", "build_peak_mb", "run_peak_mb")),
            f"{row['difference']:.0e}",
        )
        for row in result["rows"]
        if "error" not in row
    ]
    failures = [f"| {row['title']} | failed: {row['error']} |" for row in result["rows"] if "error" in row]
    products = result["ceiling_gflop_per_second"]
    each = ", ".join(f"{CEILINGS[name].title} {value:.0f}" for name, value in products.items())
    return "\n".join(
        (
            command.markdown(header, rows),
            *failures,
            "",
            f"Ceiling: {max(products.values(), default=math.nan):.0f} GFLOP/s, the best of matrices {MATRIX_SIZE} x "
            f"{MATRIX_SIZE} ({each}). An image is {result['gflop_per_image']:.2f} GFLOP.",
        )
    )


if __name__ == "__main__":
    command.run(main)
