"""How this project's cost grows with the batch, the size of the images, the network's width and depth, and its kind.

If time grows as the multiply-adds do, the last column of a table stays at 1. Each point is a process
of its own, and the points of a table take turns.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.job import Job
from benchmarks.step import MODES, PASSES
from benchmarks.turns import Turns
from benchmarks.worker import Worker
from xception_flax.models import MODELS
from xception_flax.text.lookup import suggest

EXAMPLES = """\
  python -m benchmarks.growth
  python -m benchmarks.growth --mode train --axis batch --axis width=0.5,1
  python -m benchmarks.growth --mode train --axis network=inception_v3,xception --batch 8
  python -m benchmarks.growth --batch 1 --json growth.json"""

AXES: dict[str, tuple[Any, ...]] = {
    "batch": (1, 2, 4, 8, 16),
    "size": (149, 224, 299, 448),
    "width": (0.25, 0.5, 1.0, 1.5),
    "middle_repeats": (2, 4, 8, 16),
    "network": ("xception", "inception_v3", "xception65"),
}


def main(argv: list[str]) -> int:
    arguments = command.parser("growth", __doc__, EXAMPLES)
    arguments.add_argument("--mode", choices=MODES, default="forward", help="what is timed (forward)")
    arguments.add_argument(
        "--axis",
        action="append",
        type=_axis,
        metavar="NAME[=V,...]",
        help=f"make a table along this axis, over these values; may be repeated (all: {', '.join(AXES)})",
    )
    command.add_turns(arguments)
    group = arguments.add_argument_group("values that stay the same within a table")
    for name, kind, value in (("batch", int, 4), ("size", int, 299), ("width", float, 1.0), ("middle_repeats", int, 8)):
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, type=command.positive(kind), default=value, metavar="V", help=f"({value:g})")
    options = arguments.parse_args(argv)
    options.network = "xception"
    command.check(arguments, options)
    for axis, _ in options.axis or AXES.items():
        if axis == "network" and (options.width, options.middle_repeats) != (1, 8):
            arguments.error("--axis network compares networks as they are: leave out --width and --middle-repeats.")

    results = {}
    for axis, values in options.axis or AXES.items():
        results[axis] = measure(axis, values, options)
        print(f"\n{table(results[axis])}\n", flush=True)
    command.write_json(options.json, options, results)
    return int(any("error" in row for result in results.values() for row in result["rows"]))


def _axis(text: str) -> tuple[str, tuple[Any, ...]]:
    name, _, values = text.partition("=")
    if name not in AXES:
        raise argparse.ArgumentTypeError(f"unknown axis {name!r}; {suggest(name, AXES)}")
    if name == "network":
        for value in (names := tuple(values.split(",") if values else AXES[name])):
            if value not in MODELS:
                raise argparse.ArgumentTypeError(f"unknown network {value!r}; {suggest(value, MODELS)}")
        return name, names
    kind = type(AXES[name][0])
    try:
        return name, tuple(command.positive(kind)(value) for value in values.split(",")) if values else AXES[name]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{name} takes {kind.__name__} values, got {values!r}") from None


def measure(axis: str, values: Sequence[Any], options: argparse.Namespace) -> dict[str, Any]:
    """Returns a row for each value, with `relative`: its time for a FLOP as a multiple of the last row's."""
    fields = {name: getattr(options, name) for name in AXES}
    progress = command.Progress(f"{options.mode}, {axis}")
    with tempfile.TemporaryDirectory(prefix="xception_flax_benchmark_") as folder, Turns(progress) as turns:
        gflop = {}
        for value in values:
            name = _written(value)
            own = Path(folder) / name
            own.mkdir()
            job = Job(str(own), options.mode, threads=options.threads, **fields | {axis: value})._asdict()
            with Worker(Path(sys.executable), options.threads, own, {}) as worker:
                costs = worker.ask("write_inputs", job=job, readings=[])
            gflop[name] = 2 * costs["macs"] / 1e9 * PASSES[options.mode] * job["batch"]
            worker = Worker(Path(sys.executable), options.threads, own, {})
            turns.add(name, f"{axis} {name}", worker, contender="xception_flax", job=job)
        turns.take(options.rounds, options.seconds_per_turn)
        progress.end()

    rows = [row | {"gflop": gflop[name]} for name, row in turns.rows.items()]
    finished = [row for row in rows if "seconds" in row]
    for row in finished:
        row["gflop_per_second"] = row["gflop"] / row["seconds"]
        row["relative"] = row["seconds"] / row["gflop"] * finished[-1]["gflop"] / finished[-1]["seconds"]
    return {"axis": axis, "mode": options.mode, "threads": options.threads, **fields, "rows": rows}


def _written(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def table(result: Mapping[str, Any]) -> str:
    """Returns the result of `measure` as a table in Markdown."""
    fixed = ", ".join(f"{name} {_written(result[name])}" for name in AXES if name != result["axis"])
    finished = [row for row in result["rows"] if "error" not in row]
    header = (result["axis"], "ms", "GFLOP", "GFLOP/s", "first run s", "MB peak run", "time a FLOP")
    rows = [
        (
            row["name"],
            f"{1000 * row['seconds']:.1f}",
            f"{row['gflop']:.2f}",
            f"{row['gflop_per_second']:.1f}",
            f"{row['first_seconds']:.1f}",
            f"{row['run_peak_mb']:,.0f}",
            f"{row['relative']:.2f}",
        )
        for row in finished
    ]
    failures = [f"| {row['name']} | failed: {row['error']} |" for row in result["rows"] if "error" in row]
    title = f"{result['mode']} by {result['axis']} ({fixed}, {result['threads']} threads)"
    lines = [title, "", command.markdown(header, rows), *failures]
    if len(finished) > 1 and result["axis"] != "network":
        lines += ["", f"Time grows as FLOP to the power of {exponent(finished):.2f}."]
    return "\n".join(lines)


def exponent(rows: Sequence[Mapping[str, float]]) -> float:
    """The slope of the straight line through log time over log FLOP, by least squares."""
    x, y = [math.log(row["gflop"]) for row in rows], [math.log(row["seconds"]) for row in rows]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


if __name__ == "__main__":
    command.run(main)
