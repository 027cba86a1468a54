"""Times from the start of a process to the end of its first training step: what a user waits for.

It runs `python train.py --config configs/imagenet.py` on a small file of arrays, in float32, with an empty cache of
compiled programs and again with the cache filled. Beside it, Keras Applications on TensorFlow gets the same file.
"""

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks import command
from benchmarks.worker import ROOT, WorkerError, clean_environment

EXAMPLES = """\
  python -m benchmarks.cold_start
  python -m benchmarks.cold_start --only-ours --rounds 1
  python -m benchmarks.cold_start --config.step.ema_decay=0 --json cold_start.json"""

NUM_CLASSES = 1000
POLL_SECONDS = 0.01  # between two looks at the log


def main(argv: list[str]) -> int:
    arguments = command.parser("cold_start", __doc__, EXAMPLES)
    arguments.add_argument("--batch", type=command.positive(int), default=8, metavar="N", help="images (8)")
    arguments.add_argument("--size", type=command.positive(int), default=299, metavar="PX", help="pixels a side (299)")
    arguments.add_argument("--rounds", type=command.positive(int), default=3, metavar="N", help="starts of each (3)")
    arguments.add_argument("--only-ours", action="store_true", help="without Keras")
    arguments.add_argument("--config.KEY=VALUE", dest="ignored", metavar="", help="override a key of the recipe")
    command.add_contenders_python(arguments)
    options, overrides = arguments.parse_known_args(argv)
    command.check(arguments, options)
    if wrong := [text for text in overrides if not text.startswith("--config.")]:
        arguments.error(f"unrecognized arguments: {' '.join(wrong)}")
    if not options.only_ours:
        command.check_contenders(arguments, options, ["keras_tensorflow"], "--only-ours")

    names = ("xception_flax, empty cache", "xception_flax, again", "Keras on TensorFlow")
    seconds: dict[str, list[float]] = {name: [] for name in names[: 2 if options.only_ours else 3]}
    progress = command.Progress("cold start")
    with tempfile.TemporaryDirectory(prefix="xception_flax_benchmark_") as folder:
        data = Path(folder) / "data.npz"
        write_arrays(data, options.batch, options.size)
        for number in range(1, options.rounds + 1):
            cache = {"XDG_CACHE_HOME": f"{folder}/cache{number}"}
            for i, (name, each) in enumerate(seconds.items()):
                progress.show(f"round {number} of {options.rounds}, {name}")
                own = Path(folder) / f"run{number}_{i}"
                own.mkdir()
                if name == "Keras on TensorFlow":
                    python, script = options.contenders_python, ROOT / "benchmarks" / "keras_first_step.py"
                    start = [python, script, data, options.batch, options.threads]
                    each.append(seconds_until(lambda log: "first step done" in log, start, own, options.threads))
                else:
                    start = [sys.executable, "train.py", *recipe(data, options.batch, options.size), *overrides]
                    start += ["--workdir", own / "workdir"]
                    each.append(seconds_until(lambda log: "step 1/" in log, start, own, options.threads, cache))
        progress.end()

    header = (f"to the end of the first step, {options.batch} x {options.size} px", "s", "of rounds")
    rows = [
        (name, f"{statistics.median(each):.1f}", f"{min(each):.1f} to {max(each):.1f}")
        for name, each in seconds.items()
    ]
    print(f"\n{command.markdown(header, rows)}\n")
    command.write_json(options.json, options, {"overrides": overrides, "seconds": seconds})
    return 0


def write_arrays(path: Path, batch: int, size: int) -> None:
    """Writes noise for the source 'arrays': four batches to train on, one to evaluate on."""
    rng = np.random.default_rng(0)
    arrays = {"class_names": np.array([str(label) for label in range(NUM_CLASSES)])}
    for split, count in (("train", 4 * batch), ("validation", batch)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, size, size, 3), np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, NUM_CLASSES, count, np.int32)
    np.savez(path, **arrays)


def recipe(data: Path, batch: int, size: int) -> list[str]:
    """Returns the ImageNet recipe on `data`, in float32, with this batch and size, and with a record of each step."""
    keys = {
        "batch_size": batch,
        "model.dtype": "float32",
        "data.source": "arrays",
        "data.path": data,
        "data.image_size": size,
        "log_every_steps": 1,
    }
    return ["--config", "configs/imagenet.py", *(f"--config.{key}={value}" for key, value in keys.items())]


def seconds_until(
    is_done: Callable[[str], bool],
    start: Sequence[object],
    folder: Path,
    threads: int,
    environment: Mapping[str, str] | None = None,
) -> float:
    """Starts a process, ends it when `is_done(its output)`, and returns the seconds until then.

    Raises:
      WorkerError: it ended before.
    """
    log = folder / "log.txt"
    cpus = sorted(os.sched_getaffinity(0))[:threads]
    with log.open("w") as file:
        began = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in start],
            cwd=ROOT,
            env=clean_environment() | dict(environment or {}),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cpus),
        )
        try:
            while not is_done(log.read_text(errors="replace")):
                if process.poll() is not None:
                    raise WorkerError(f"{start[1]} ended by itself: {log.read_text(errors='replace')[-1000:].strip()}")
                time.sleep(POLL_SECONDS)
            return time.perf_counter() - began
        finally:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


if __name__ == "__main__":
    command.run(main)
