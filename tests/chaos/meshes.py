"""A run that goes on with other devices: 8, then 1, then 4 with a split state, then 2 processes; it learns the same."""

import re
import signal
import time
from pathlib import Path

import numpy as np

from tests import workdirs
from tests.chaos import phases, run, several
from tests.chaos.kills import RUN_SECONDS, tail
from tests.chaos.run import Failure, Setting

# Devices, and whether the state is split (FSDP). The last start is one of two processes, and ends the run.
LEGS = [
    (8, "--config.mesh.fsdp=1"),
    (1, "--config.mesh.fsdp=1"),
    (4, "--config.mesh.fsdp=4"),
    (4, "--config.mesh.fsdp=2"),
]

# Sums in another order differ by rounding, which AdamW's division magnifies where a gradient is nearly zero. Of the
# largest value of an array.
BOUND = 1e-3


def walk(untouched: Path, setting: Setting, cache: Path, folder: Path) -> tuple[list[int], float]:
    """Trains with one mesh after the other; returns the steps at which they changed, and the largest difference.

    Args:
      untouched: workdir of a run on one mesh, of the network of `several.SPLIT`.
      setting: its network.
      cache: of compiled programs.
      folder: new.

    Raises:
      Failure: a start did not end as promised, or the end differs by more than `BOUND`.
    """
    folder.mkdir(parents=True)
    workdir, steps = folder / "workdir", []
    for number, (devices, mesh) in enumerate(LEGS):
        log = folder / f"log {number}"
        command = run.command(setting, workdir, *several.SPLIT, mesh)
        process = run.start(command, run.environment(devices, cache), log)
        try:
            several.wait_for(lambda wanted=9 * (number + 1): phases.last_step(workdir) >= wanted, [process])
            process.send_signal(signal.SIGTERM)
            code = several.ended(process, time.monotonic() + RUN_SECONDS)
        finally:
            run.end([process])
        found = re.search(r"stopped at step (\d+), checkpoint written", log.read_text(errors="replace"))
        if code != 128 + signal.SIGTERM or not found:
            raise Failure(f"on {devices} devices it ended with code {code}:\n{tail(log)}")
        steps.append(int(found[1]))
    several.train(setting, folder, workdir, processes=2)
    return steps, differ(untouched, workdir)


def differ(expected: Path, workdir: Path) -> float:
    """Returns the largest difference of an array of the last checkpoint, as a share of its largest value.

    Raises:
      Failure: it is larger than `BOUND`, or another number of images was evaluated.
    """
    wanted, found = (workdirs.arrays(each, run.STEPS) for each in (expected, workdir))
    worst = ("", 0.0)
    for path, value in wanted.items():
        if not path.startswith("optimizer"):
            share = float(np.max(np.abs(found[path] - value)) / np.max(np.abs(value)))
            worst = max(worst, (path, share), key=lambda each: each[1])
    if not worst[1] <= BOUND:
        raise Failure(f"{worst[0]} differs by {worst[1]:.3g} of its largest value, more than {BOUND:g}")
    before, after = run.evaluations(expected), run.evaluations(workdir)
    if {step: row["eval/count"] for step, row in before.items()} != {
        step: row["eval/count"] for step, row in after.items()
    }:
        raise Failure(f"evaluated were steps {sorted(after)}, expected {sorted(before)}")
    return worst[1]
