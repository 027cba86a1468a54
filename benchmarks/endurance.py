"""What a long run holds on to: memory, open files, threads, shared memory and files, from its first steps to its last.

It runs `python train.py` on the digits by a network so small that twenty thousand steps take minutes, with an
evaluation and a checkpoint every five epochs of 79 steps, and looks at all its processes every few seconds. Each
quantity should be flat: what a run gains in these steps it gains again in the next.
"""

import argparse
import contextlib
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt

from benchmarks import command
from benchmarks.worker import ROOT, WorkerError, clean_environment

EXAMPLES = """\
  python -m benchmarks.endurance --json endurance.json --picture endurance.png
  python -m benchmarks.endurance --steps 2000 --workers 0 --devices 8
  python -m benchmarks.endurance --results results/endurance.json --picture endurance.png     only draw"""

BATCH = 16
IMAGES = 1257  # of the digits
SHARED = "/dev/shm"
SHORT = 5_000  # steps
STEADY = 0.1  # share of a run after which caches are full


class Sample(NamedTuple):
    """What all processes of a run hold together at one moment.

    Attributes:
      step: of the last record in metrics.jsonl.
      memory_mb: 10^6 bytes that are no file's: what processes share counts once. Pages of libraries are left out, since
        they are divided among all processes of the machine.
      open_files: descriptors.
      threads: threads.
      shared_memory: files in /dev/shm that are open or mapped.
      temporary_files: entries of the run's own temporary folder, and of the folders in it.
      workdir_files: files of the workdir.
    """

    step: int
    memory_mb: float
    open_files: int
    threads: int
    shared_memory: int
    temporary_files: int
    workdir_files: int


LABELS = {
    "memory_mb": "memory, MB",
    "open_files": "open files",
    "threads": "threads",
    "shared_memory": "shared memory, files",
    "temporary_files": "temporary files",
    "workdir_files": "files in the workdir",
}


def main(argv: list[str]) -> int:
    arguments = command.parser("endurance", __doc__, EXAMPLES)
    arguments.add_argument("--steps", type=command.positive(int), default=20_000, metavar="N", help="length (20,000)")
    arguments.add_argument("--workers", type=int, default=2, metavar="N", help="processes that read images (2)")
    arguments.add_argument("--devices", type=command.positive(int), default=2, metavar="N", help="virtual CPUs (2)")
    arguments.add_argument(
        "--epochs", type=command.positive(float), default=5, metavar="N", help="between evaluations and checkpoints (5)"
    )
    arguments.add_argument("--seconds", type=command.positive(float), default=3.0, metavar="S", help="of a look (3)")
    arguments.add_argument("--picture", type=Path, metavar="FILE", help="draw the samples")
    arguments.add_argument("--results", type=Path, metavar="FILE", help="a --json of before: only print and draw it")
    options = arguments.parse_args(argv)
    command.check(arguments, options)
    if options.results:
        results = json.loads(options.results.read_text())
        samples = [Sample(**sample) for sample in results["samples"]]
    else:
        samples, left = watch(options)
        results = {"samples": [sample._asdict() for sample in samples], "left_in_shared_memory": left}
        command.write_json(options.json, options, results)
    if samples[-1].step < SHORT:
        print(f"\n{samples[-1].step:,} steps are too few to judge by: the first of them still fill caches.")
    print(f"\n{table(samples)}\n\nleft in {SHARED} after the end: {len(results['left_in_shared_memory'])} files")
    if options.picture:
        draw(samples, options.picture)
    return 0


def watch(options: argparse.Namespace) -> tuple[list[Sample], list[str]]:
    """Runs it to the end; returns the samples, and the names of what it left in /dev/shm.

    Raises:
      WorkerError: the run failed.
    """
    progress, samples, seen = command.Progress("endurance"), [], set()
    with tempfile.TemporaryDirectory(prefix="xception_flax_benchmark_") as folder:
        workdir, temporary, log = Path(folder) / "workdir", Path(folder) / "tmp", Path(folder) / "log.txt"
        temporary.mkdir()
        devices = f"--xla_force_host_platform_device_count={options.devices}"
        environment = clean_environment() | {"TMPDIR": str(temporary), "XLA_FLAGS": devices, "JAX_PLATFORMS": "cpu"}
        began = time.monotonic()
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "train.py", *recipe(options), "--workdir", str(workdir)],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        try:
            while process.poll() is None:
                time.sleep(options.seconds)
                step = newest_step(workdir / "metrics.jsonl")
                if 0 < step < options.steps:  # between its first record and its end
                    *sizes, shared = held(process.pid)
                    seen |= shared
                    samples.append(Sample(step, *sizes, len(shared), *map(count_files, (temporary, workdir))))
                    seconds = time.monotonic() - began
                    rate = f"step {step:,} of {options.steps:,}, {step / seconds:.0f} steps/s"
                    progress.show(rate, seconds / step * (options.steps - step))
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            progress.end()
        if process.returncode or newest_step(workdir / "metrics.jsonl") < options.steps:
            raise WorkerError(f"train.py ended with {process.returncode}:\n{log.read_text()[-2000:]}")
    return samples, sorted(name for name in seen if os.path.exists(name))


def recipe(options: argparse.Namespace) -> list[str]:
    """Returns the arguments of train.py: everything on that a long run has, by a network of 4,000 parameters."""
    keys = {
        "epochs": options.steps * BATCH / IMAGES,
        "batch_size": BATCH,
        "data.image_size": 16,
        "data.num_workers": options.workers,
        "model.width": 0.1,
        "schedule.warmup_epochs": 0,
        "optimizer.learning_rate": 1e-4,
        "eval_every_epochs": options.epochs,
        "checkpoint_every_epochs": options.epochs,
        "checkpoint_every_minutes": 1,
        "step.on_nonfinite": "skip",
    }
    return ["--config", "configs/digits.py:lenet", *(f"--config.{key}={value}" for key, value in keys.items())]


def newest_step(path: Path) -> int:
    """Returns the step of the last whole line of metrics.jsonl, 0 before there is one."""
    try:
        lines = path.read_text().rpartition("\n")[0].splitlines()
    except FileNotFoundError:
        return 0
    return json.loads(lines[-1])["step"] if lines else 0


def held(pid: int) -> tuple[float, int, int, set[str]]:
    """Returns memory, open files, threads and files of /dev/shm of a process and its descendants."""
    memory, files, threads, shared = 0.0, 0, 0, set()
    for folder in map(Path, [f"/proc/{pid}", *(f"/proc/{child}" for child in descendants(pid))]):
        try:
            sizes = (folder / "smaps_rollup").read_text()
            status = (folder / "status").read_text()
            links = list(links_of(folder / "fd"))
            mapped = [line.split(maxsplit=5)[-1] for line in (folder / "maps").read_text().splitlines()]
        except OSError:  # it ended meanwhile
            continue
        memory += (
            sum(int(kib) for kib in re.findall(r"^Pss_(?:Anon|Shmem): +(\d+) kB", sizes, re.MULTILINE)) * 1024 / 1e6
        )
        files += len(links)
        threads += int(status.partition("Threads:")[2].split()[0])
        shared |= {name for name in (*links, *mapped) if name.startswith(SHARED)}
    return memory, files, threads, shared


def links_of(folder: Path) -> Iterator[str]:
    """Yields what the open files of a process are; some are closed meanwhile."""
    for link in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            yield os.readlink(link)


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in task.read_text().split()]
        except OSError:
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def count_files(folder: Path) -> int:
    return sum(len(names) for _, _, names in os.walk(folder))


def steady(samples: Sequence[Sample]) -> list[Sample]:
    """Returns the samples without those of the run's beginning."""
    return [sample for sample in samples if sample.step > STEADY * samples[-1].step]


def table(samples: Sequence[Sample]) -> str:
    """Returns for each quantity its median in the first and the last quarter of the steady run, and its extremes."""
    kept = steady(samples)
    if len(kept) < 8:
        raise WorkerError(f"{len(kept)} samples are too few; ask for more --steps or fewer --seconds.")
    quarter = len(kept) // 4
    rows = []
    for field, label in LABELS.items():
        values = [getattr(sample, field) for sample in kept]
        first, last = statistics.median(values[:quarter]), statistics.median(values[-quarter:])
        change = f"{100 * (last / first - 1):+.1f} %" if first else f"{last - first:+g}"
        rows.append((label, f"{first:,.0f}", f"{last:,.0f}", change, f"{min(values):,.0f} to {max(values):,.0f}"))
    header = (f"steps {kept[0].step:,} to {kept[-1].step:,}", "first quarter", "last quarter", "change", "all")
    return command.markdown(header, rows)


def draw(samples: Sequence[Sample], path: Path) -> None:
    """Draws each quantity over the steps, from zero."""
    figure, axes = plt.subplots(2, math.ceil(len(LABELS) / 2), figsize=(10, 4.6), layout="constrained", sharex=True)
    for axis, (field, label) in zip(axes.flat, LABELS.items(), strict=True):
        values = [getattr(sample, field) for sample in samples]
        axis.plot([sample.step for sample in samples], values, ".", color="tab:blue", markersize=3, clip_on=False)
        axis.set(title=label, ylim=(0, 1.15 * max(max(values), 1)))
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
        axis.yaxis.get_major_locator().set_params(integer=True)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.savefig(path, dpi=160)
    plt.close(figure)


if __name__ == "__main__":
    command.run(main)
