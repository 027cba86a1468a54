"""Times reading, decoding, cropping and batching of images: this pipeline beside tf.data and torchvision's.

Each contender is a process of its own on one CPU, and another on all of --threads. They take turns; the processes that
wait are stopped. CPU time depends less than images per second on other load of the machine. See benchmarks/README.md.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import command, photos
from benchmarks.job import Job
from benchmarks.readers import BATCHES, READERS
from benchmarks.turns import Turns
from benchmarks.worker import Worker

EXAMPLES = f"""\
  python -m benchmarks.input_pipeline
  python -m benchmarks.input_pipeline --only xception_flax,alone --rounds 3 --json input_pipeline.json

contenders: {", ".join(READERS)}"""

# Rows without a difference: the work alone reads nothing, and records have other pixels, which `reencoding` measures.
ALONE = ("alone", "prepared_alone")
UNCOMPARED = (*ALONE, "prepared")

CHECKED = 8  # images, not cropped, whose pixels are compared

# Largest mean difference from this project's pixels, of 255, for photos scaled down to 299 pixels. Rounding and the
# arithmetic of the decoder make less than 1; torchvision scales with antialiasing, which makes another picture.
MAX_DIFFERENCE = {"tf_data": 1.5, "torchvision": 6.0}


def main(argv: list[str]) -> int:
    arguments = command.parser("input_pipeline", __doc__, EXAMPLES)
    arguments.add_argument("--batch", type=command.positive(int), default=32, metavar="N", help="images (32)")
    arguments.add_argument("--size", type=command.positive(int), default=299, metavar="PX", help="pixels a side (299)")
    arguments.add_argument("--images", type=command.positive(int), default=512, metavar="N", help="files (512)")
    command.add_only(arguments)
    command.add_turns(arguments)
    command.add_contenders_python(arguments)
    options = arguments.parse_args(argv)
    command.check(arguments, options)
    names = command.chosen(arguments, options, READERS)
    if options.images < options.batch:
        arguments.error(f"--images must be at least the batch of {options.batch}, got {options.images}.")
    foreign = [name for name in names if not READERS[name].ours]
    command.check_contenders(arguments, options, foreign, "--only xception_flax,alone")

    result = measure(names, options)
    print(f"\n{table(result)}\n", flush=True)
    command.write_json(options.json, options, result)
    return int(any("error" in row for row in result["rows"]))


def measure(names: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Returns the size of the files, the images of a run, and a row for each of `names` on each number of CPUs."""
    progress = command.Progress("input_pipeline")
    with tempfile.TemporaryDirectory(prefix="xception_flax_benchmark_") as folder, Turns(progress) as turns:

        def start(name: str, threads: int) -> Worker:
            python = Path(sys.executable) if READERS[name].ours else options.contenders_python
            return Worker(python, threads, Path(folder), READERS[name].environment)

        progress.show("making photos")
        size = _write(Path(folder) / "random", photos.jpegs(options.images))
        _write(Path(folder) / "whole", photos.jpegs(CHECKED, width=400, height=400))

        whole = Job(str(Path(folder) / "whole"), "whole", CHECKED, options.size, 1)
        random = Job(str(Path(folder) / "random"), "random", options.batch, options.size, 1)
        checked = [name for name in names if name not in UNCOMPARED]
        differences: dict[str, float] = {}
        for name in sorted({*checked, "xception_flax"}, key=lambda name: not READERS[name].ours):
            with Turns(progress) as alone:  # with rows of its own: a failure is not the end
                alone.add(name, READERS[name].title, start(name, 1), contender=name, job=whole._asdict())
            if "error" not in alone.rows[name]:
                ours, theirs = (np.load(Path(whole.folder) / f"whole_{n}.npy") for n in ("xception_flax", name))
                differences[name] = float(np.abs(ours.astype(int) - theirs).mean())

        for threads in sorted({1, options.threads}):
            for name in names:
                if name in ALONE and threads > 1:
                    continue
                key, title = f"{name}@{threads}", f"{READERS[name].title}, {threads} CPU{'s' * (threads > 1)}"
                job = random._replace(threads=threads)
                turns.add(key, title, start(name, threads), contender=name, job=job._asdict())
                row = turns.rows[key]
                row |= {"contender": name, "cpus": threads, "difference": differences.get(name)}
                if "error" not in row and (row["difference"] or 0) > MAX_DIFFERENCE.get(name, 0):
                    turns.fail(key, f"reads something else: its pixels differ by {row['difference']:.1f} of 255")
        turns.take(options.rounds, options.seconds_per_turn)
        progress.end()

    images = BATCHES * options.batch
    for row in turns.rows.values():
        if "error" not in row:
            row["images_per_second"] = images / row["seconds"]
            # torchvision's workers are other processes, whose time is not known.
            row["cpu_ms_per_image"] = None if row["contender"] == "torchvision" else 1e3 * row["cpu_seconds"] / images
            row["images_per_second_of_rounds"] = [images / statistics.median(laps) for laps in row["lap_seconds"]]
    return {"mean_file_bytes": size, "images": images, "rows": list(turns.rows.values())}


def _write(folder: Path, files: Sequence[bytes]) -> float:
    """Writes the files of one class of a split 'train'; returns their mean size in bytes."""
    directory = folder / "train" / "photo"
    directory.mkdir(parents=True)
    for i, content in enumerate(files):
        (directory / f"{i:05}.jpg").write_bytes(content)
    return statistics.mean(map(len, files))


def table(result: Mapping[str, Any]) -> str:
    """Returns the result of `measure` as a table in Markdown, with conclusions in lines below."""
    done = {(r["contender"], r["cpus"]): r for r in result["rows"] if "error" not in r}
    ours = done.get(("xception_flax", 1))

    def relative(row: Mapping[str, Any]) -> str:
        base = done.get(("xception_flax", row["cpus"]))
        return f"{base['images_per_second'] / row['images_per_second']:.2f}" if base else "-"

    header = (
        "photos",
        "images/s",
        "of rounds",
        "xception_flax is",
        "CPU ms an image",
        "MB imported",
        "MB peak run",
        "difference",
    )
    rows = [
        (
            row["title"],
            f"{row['images_per_second']:.0f}",
            f"{min(row['images_per_second_of_rounds']):.0f} to {max(row['images_per_second_of_rounds']):.0f}",
            relative(row),
            "-" if row["cpu_ms_per_image"] is None else f"{row['cpu_ms_per_image']:.2f}",
            f"{row['imported_mb']:,.0f}",
            f"{row['run_peak_mb']:,.0f}",
            "-" if row["difference"] is None else f"{row['difference']:.2f}",
        )
        for row in done.values()
    ]
    failures = [f"| {row['title']} | failed: {row['error']} |" for row in result["rows"] if "error" in row]
    lines = [f"Files of {result['mean_file_bytes'] / 1e3:.0f} kB."]
    prepared = done.get(("prepared", 1))
    for reader, name, what in ((ours, "alone", ""), (prepared, "prepared_alone", ", of the records")):
        if reader and (alone := done.get((name, 1))):
            share = 1 - alone["cpu_ms_per_image"] / reader["cpu_ms_per_image"]
            lines.append(f"{100 * share:.1f} % of one CPU's time is outside of decode, crop, resize and flip{what}.")
    if prepared and (theirs := done.get(("tf_data", 1))):
        ratio = theirs["cpu_ms_per_image"] / prepared["cpu_ms_per_image"]
        lines.append(f"The records take 1/{ratio:.2f} of the CPU time that tf.data takes for the originals.")
    for (name, cpus), row in done.items():
        if name == "xception_flax" and cpus > 1 and ours:
            lines.append(f"{cpus} CPUs are {row['images_per_second'] / ours['images_per_second']:.2f} times one.")
    return "\n".join((command.markdown(header, rows), *failures, "", " ".join(lines)))


if __name__ == "__main__":
    command.run(main)
