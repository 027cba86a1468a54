"""A run of 47 steps that is trained in six seconds, evaluates and saves six times, and how its end is compared."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from tests import workdirs

ROOT = Path(__file__).parents[2]
STEPS = 47

NETWORKS = {
    "lenet": ["--config", "configs/digits.py:lenet", "--config.model.width=0.1", "--config.data.image_size=16"],
    "xception": [
        *("--config", "configs/digits.py", "--config.model.width=0.02", "--config.model.middle_repeats=0"),
        "--config.data.image_size=32",
    ],
}

# Eight steps are between two evaluations. The recipe keeps averages (EMA), which must also be the same at the end.
RECIPE = [
    "--config.batch_size=16",
    "--config.epochs=0.6",
    "--config.schedule.warmup_epochs=0.1",
    "--config.eval_every_epochs=0.1",
    "--config.checkpoint_every_epochs=0.1",
    "--config.log_every_steps=2",
    "--config.mix.mixup_alpha=0.2",
]

THREADS = ["--config.data.num_workers=0"]
WORKERS = ["--config.data.num_workers=1", "--config.data.num_threads=1"]
EACH_RECORD = ["--config.checkpoint_every_minutes=1e-6"]

# Metrics that are times; all others must be equal.
TIMES = ("seconds", "per_second", "mfu")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a result depends on: two runs of one setting must end with the same bits."""

    network: str = "lenet"
    devices: int = 1

    def __str__(self) -> str:
        return f"{self.network} on {self.devices} device{'s' if self.devices > 1 else ''}"


def command(setting: Setting, workdir: Path, *arguments: str) -> list[str]:
    network = NETWORKS[setting.network]
    return [sys.executable, "train.py", "--workdir", str(workdir), *network, *RECIPE, *arguments]


def environment(devices: int, cache: Path, **variables: str) -> dict[str, str]:
    """Returns the environment of a run on CPU devices, which says where it is: see `startup/sitecustomize.py`."""
    own = {
        "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent / "startup"), str(ROOT))),
        "COLUMNS": "120",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        # Level 0 compiles in a third of the time; what is compiled is the same each time.
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
    }
    return os.environ | own | variables


def start(command: Sequence[str], environment: dict[str, str], log: Path) -> subprocess.Popen:
    """Starts a command in a session of its own; what it prints is appended to `log`."""
    with open(log, "ab") as file:
        return subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def end(processes: Iterable[subprocess.Popen]) -> None:
    """Kills what is still there, each with its workers."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def untouched(setting: Setting, folder: Path) -> tuple[Path, Path, float]:
    """Trains without a kill and with an empty cache.

    Returns:
      The workdir, the cache of compiled programs, and the seconds that it took.

    Raises:
      Failure: it ended with an error.
    """
    folder.mkdir(parents=True)
    log, begin = folder / "log", time.monotonic()
    process = start(command(setting, folder / "workdir"), environment(setting.devices, folder / "cache"), log)
    try:
        process.wait()
    finally:
        end([process])
    if process.returncode != 0:
        raise Failure(f"the untouched run of {setting} ended with code {process.returncode}:\n{log.read_text()}")
    return folder / "workdir", folder / "cache", time.monotonic() - begin


# Comparing -----------------------------------------------------------------------------------------


class Failure(Exception):
    """A promise that was not kept."""


def check_same(expected: Path, workdir: Path) -> int:
    """Checks that two workdirs end alike, bit for bit; returns the number of arrays compared.

    Compared are all arrays of the last checkpoint, all evaluations, the records of training that are means over the
    same steps, and which checkpoint is the best.

    Raises:
      Failure: it names the first difference.
    """
    wanted, found = (workdirs.arrays(each, STEPS) for each in (expected, workdir))
    if wanted.keys() != found.keys():
        raise Failure(f"only one of the two has {sorted(wanted.keys() ^ found.keys())[0]}")
    for path, value in wanted.items():
        if found[path].dtype != value.dtype or found[path].tobytes() != value.tobytes():
            off = np.abs(found[path].astype(np.float64) - value.astype(np.float64))
            raise Failure(f"{path} differs in {np.count_nonzero(off)} of {off.size} values, by up to {off.max():g}")
    for name, rows in (("evaluations", evaluations), ("means over steps", means)):
        before, after = rows(expected), rows(workdir)
        if name == "evaluations" and before.keys() != after.keys():
            raise Failure(f"the evaluations are of steps {sorted(after)}, expected {sorted(before)}")
        for key in before.keys() & after.keys():
            if before[key] != after[key]:
                raise Failure(f"{name} {key}: {after[key]}, expected {before[key]}")
    if (best := best_step(workdir)) != best_step(expected):
        raise Failure(f"the best checkpoint is of step {best}, expected {best_step(expected)}")
    if left := [path.name for path in (workdir / "checkpoints").iterdir() if not path.name.isdecimal()]:
        raise Failure(f"beside the checkpoints are {left}")
    return len(wanted)


def _values(record: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in record.items() if not name.endswith(TIMES)}


def evaluations(workdir: Path) -> dict[int, dict[str, float]]:
    """Returns what each evaluation gave, by its step."""
    rows = [record for record in workdirs.records(workdir) if "eval/loss" in record]
    if len({row["step"] for row in rows}) < len(rows):
        raise Failure("a step was recorded as evaluated twice")
    return {row["step"]: _values(row) for row in rows}


def means(workdir: Path) -> dict[tuple[int, int], dict[str, float]]:
    """Returns the records of training by the step before the first and the last of the steps that they cover.

    A run that was stopped has a record where it stopped, so some means are over other steps than those of a whole run.
    """
    rows = [record for record in workdirs.records(workdir) if "train/loss" in record]
    steps = [0, *(row["step"] for row in rows)]
    if steps != sorted(set(steps)):
        raise Failure(f"the steps of the records are not in order: {steps}")
    return {(before, row["step"]): _values(row) for before, row in zip(steps, rows, strict=False)}


def saved_steps(workdir: Path) -> list[int]:
    """Returns the steps that have a checkpoint, from the oldest on."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def is_over(workdir: Path) -> bool:
    """Whether the last step is saved with its evaluation."""
    return (workdir / "checkpoints" / str(STEPS) / "metrics" / "metrics").exists()


def best_step(workdir: Path) -> int:
    """Returns the step of the checkpoint with the most right answers, of equal ones that with the lower loss."""
    scores = {}
    for step in saved_steps(workdir):
        file = workdir / "checkpoints" / str(step) / "metrics" / "metrics"
        if file.exists():
            metrics = json.loads(file.read_text())
            scores[step] = metrics["top1"], -metrics["loss"], -step
    return max(scores, key=scores.__getitem__)
