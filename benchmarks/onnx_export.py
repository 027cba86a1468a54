"""Times the ONNX file of `xception-flax export` in ONNX Runtime, beside the file that torch writes of timm's network.

Both have the same weights, and both results are compared with this project's own. torch's file is for one batch and
takes normalized float32; ours takes any batch of uint8. This process needs onnx (`pip install 'xception_flax[onnx]'`).
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.contenders import EXPORTED
from benchmarks.job import Job
from benchmarks.step import MAX_DIFFERENCE
from benchmarks.turns import Turns
from benchmarks.worker import Worker

EXAMPLES = """\
  python -m benchmarks.onnx_export
  python -m benchmarks.onnx_export --batch 1 --rounds 10 --json onnx.json"""


def main(argv: list[str]) -> int:
    arguments = command.parser("onnx_export", __doc__, EXAMPLES)
    arguments.add_argument(
        "--batch", type=command.positive(int), nargs="+", default=[1, 8], metavar="N", help="images (1 8)"
    )
    arguments.add_argument("--size", type=command.positive(int), default=299, metavar="PX", help="pixels a side (299)")
    command.add_turns(arguments)
    command.add_only(arguments)
    command.add_contenders_python(arguments)
    options = arguments.parse_args(argv)
    command.check(arguments, options)
    names = command.chosen(arguments, options, EXPORTED)
    command.check_contenders(arguments, options, names, "another command")
    results = {str(batch): measure(names, batch, options) for batch in options.batch}
    for batch, rows in results.items():
        print(f"\n{table(rows, f'{batch} x {options.size} px, {options.threads} threads')}\n", flush=True)
    command.write_json(options.json, options, results)
    return int(any("error" in row for rows in results.values() for row in rows.values()))


def measure(names: list[str], batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Returns a row for each file."""
    progress = command.Progress(f"batch {batch}")
    with tempfile.TemporaryDirectory(prefix="xception_flax_benchmark_") as folder, Turns(progress) as turns:
        job = Job(folder, "forward", batch, options.size, options.threads)
        progress.show("writing the files")
        with Worker(Path(sys.executable), options.threads, Path(folder), {}) as worker:
            worker.ask("write_inputs", job=job._asdict(), readings=["keras", "timm"])
            if "our_onnx" in names:
                worker.ask("write_our_onnx", job=job._asdict())
        if "timm_onnx" in names:
            with Worker(options.contenders_python, options.threads, Path(folder), {}) as worker:
                worker.ask("write_onnx", job=job._asdict())
        for name in names:
            worker = Worker(options.contenders_python, options.threads, Path(folder), {})
            turns.add(name, EXPORTED[name].title, worker, contender=name, job=job._asdict())
            difference = turns.rows[name].get("difference", 0.0)
            if not difference <= MAX_DIFFERENCE:
                turns.fail(name, f"computes something else: the difference is {difference:.0e}")
        turns.take(options.rounds, options.seconds_per_turn)
        progress.end()
        return turns.rows


def table(rows: Mapping[str, Any], what: str) -> str:
    """Returns the rows as a table in Markdown: medians, the fastest run, and the share of the last row's time."""
    header = (what, "ms, median", "ms, fastest", "of the last", "difference")
    finished = [row for row in rows.values() if "seconds" in row]
    cells = [
        (
            row["title"],
            f"{1e3 * row['seconds']:.1f}",
            f"{1e3 * min(lap for laps in row['lap_seconds'] for lap in laps):.1f}",
            f"{row['seconds'] / finished[-1]['seconds']:.2f}",
            f"{row['difference']:.0e}",
        )
        for row in finished
    ]
    return command.markdown(header, cells)


if __name__ == "__main__":
    command.run(main)
