"""`--distributed` by real launchers: Open MPI's `mpirun`, and the environment in which Slurm starts a task."""

import os
import shutil
import subprocess
from pathlib import Path

from tests.chaos import run, several
from tests.chaos.kills import RUN_SECONDS
from tests.chaos.run import Failure, Setting

# What JAX reads of a job step. The coordinator's port follows from the number of the job.
SLURM = {
    "SLURM_JOB_ID": str(os.getpid()),
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_NUM_NODES": "1",
}


def slurm(task: int, tasks: int) -> dict[str, str]:
    """Returns the environment of a task of one node."""
    return SLURM | {"SLURM_NTASKS": str(tasks), "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)}


def train(launcher: str, setting: Setting, folder: Path, tasks: int) -> Path:
    """Trains with `tasks` processes of a launcher, 'mpirun' or 'slurm'; returns the workdir.

    Raises:
      Failure: there is no such launcher, or a process ended with an error.
    """
    folder.mkdir(parents=True)
    workdir, environment = folder / "workdir", run.environment(1, folder / "cache")
    command = run.command(setting, workdir, "--distributed", *several.SPLIT)
    if launcher == "mpirun":
        if shutil.which("mpirun") is None:
            raise Failure("there is no mpirun; apt-get install openmpi-bin")
        # Bound to one core each, processes would split their sums otherwise than the untouched run.
        own = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
        launched = ["mpirun", *own, "-n", str(tasks), *command]
        begun = [run.start(launched, environment, folder / "log")]
    else:
        begun = [run.start(command, environment | slurm(i, tasks), folder / "log") for i in range(tasks)]
    try:
        codes = [process.wait(RUN_SECONDS) for process in begun]
    except subprocess.TimeoutExpired:
        raise Failure(f"{launcher}: not ended after {RUN_SECONDS} s") from None
    finally:
        run.end(begun)
    if any(codes):
        raise Failure(f"{launcher}: codes {codes}:\n{(folder / 'log').read_text()}")
    return workdir
