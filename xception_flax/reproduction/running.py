"""Runs one setting with one seed: a process of train.py, one that scores it on the test split, a row of results."""

import datetime
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from xception_flax import __version__, data
from xception_flax.data.pipeline import usable_cpus
from xception_flax.host import parents, processor
from xception_flax.host.files import file_errors
from xception_flax.host.project import TRAIN
from xception_flax.models import create_model
from xception_flax.models.costs import list_layers
from xception_flax.recipes import reading
from xception_flax.reproduction import scoring
from xception_flax.reproduction.claims import Table
from xception_flax.reproduction.results import Results, Run
from xception_flax.runs import history
from xception_flax.runs.workdir import HISTORY
from xception_flax.text.errors import UserError
from xception_flax.text.sizes import sides

POLL_SECONDS = 0.1
DIVERGED = re.compile(r"(loss|gradient_norm|evaluation) is (nan|-?inf)|not finite")  # what train.py says then

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")


class Stopped(Exception):
    """A signal has asked to stop; `number` is the signal's. What was run so far is on the disk."""

    def __init__(self, number: int) -> None:
        self.number = number


def at_once(jobs: int) -> ThreadPoolExecutor:
    """Returns threads that perform runs, each with its processes on its own share of the CPUs, where the system can.

    A small network keeps one core busy, so several runs beside each other take less time than one after the other.
    """
    if jobs == 1 or not hasattr(os, "sched_setaffinity"):
        return ThreadPoolExecutor(jobs)
    cpus = sorted(os.sched_getaffinity(0))
    shares = [cpus[len(cpus) * job // jobs : len(cpus) * (job + 1) // jobs] for job in range(jobs)]
    # 0 is the calling thread, and what it starts inherits its CPUs.
    return ThreadPoolExecutor(jobs, initializer=lambda: os.sched_setaffinity(0, shares.pop()))


def _changes(run: Run, data_dir: str | None, config: ConfigDict) -> list[str]:
    """Returns what a run changes in the recipe of its setting; `data_dir` where its source takes one."""
    changes = [f"--config.seed={run.seed}", f"--config.optimizer.learning_rate={run.learning_rate:g}"]
    if data_dir is not None and "data_dir" in config.data:
        changes.append(f"--config.data.data_dir={data_dir!r}")
    return changes


def check_data(table: Table, data_set: str, data_dir: str | None) -> None:
    """Raises UserError, with what to do, if the data of a data set are not on this machine."""
    setting = next(iter(table.settings))
    config = reading.load(table.recipe(data_set, setting))
    if data_dir is not None and "data_dir" in config.data:
        config.data.data_dir = data_dir
    data.load(**config.data, train=False, batch_size=config.batch_size)


def perform(
    run: Run,
    table: Table,
    results: Results,
    workdirs: Path,
    data_dir: str | None,
    stopped: Callable[[], int | None],
) -> dict[str, Any]:
    """Trains a run to its end, from its last checkpoint if there is one, and returns its row of the results.

    The workdir stays until `remove`, which is to be called when the row is written.

    Args:
      run: what to run.
      table: with its setting.
      results: which know the recipe's name.
      workdirs: folder of the workdirs of runs that are not at their end.
      data_dir: of the data, if its source takes one.
      stopped: returns the signal that has asked to stop, None while none has.

    Raises:
      Stopped: a signal came; the run has a checkpoint, from which the next call goes on.
      UserError: training failed by anything but a loss that is not finite.
    """
    recipe = table.recipe(run.data_set, run.setting)
    config = reading.load(recipe)
    changes = _changes(run, data_dir, config)
    config = reading.load(recipe, changes)
    name = results.recipe_name(run.data_set, run.setting)
    workdir = workdirs / _folder_name(run, name)
    is_new = not workdir.exists()
    begun = time.monotonic()
    diverged = _train(run, [recipe, "--workdir", str(workdir), *changes], workdir, stopped)
    seconds = time.monotonic() - begun
    records = history.read_metrics(workdir / HISTORY)
    evaluations = [r for r in records if "eval/loss" in r]
    image_shape = (*sides(config.data.image_size), config.data.channels)
    layers = list_layers(create_model(**config.model), image_shape)
    steps = [r["train/step_seconds"] for r in records if r.get("train/step_seconds") is not None]
    row: dict[str, Any] = {
        **run._asdict(),
        "recipe": name,
        "steps": records[-1]["step"] if records else 0,
        "validation": None if diverged else scoring.chosen(evaluations[-1], "eval/"),
        "test": None if diverged or run.is_search else _test(run, workdir, stopped),
        "parameters": sum(layer.parameters for layer in layers),
        "multiply_adds": sum(layer.macs for layer in layers),
        "losses": [[r["step"], round(r["train/loss"], 6)] for r in records if r.get("train/loss") is not None],
        "accuracies": [[r["step"], r["eval/top1"]] for r in evaluations],
        "seconds": round(seconds, 1) if is_new else None,  # of a run that was interrupted nobody knows it
        "step_seconds": round(statistics.median(steps), 5) if steps else None,
        "versions": {"xception_flax": __version__} | {name: metadata.version(name) for name in LIBRARIES},
        "machine": _machine(),
    }
    return row


def remove(run: Run, results: Results, workdirs: Path) -> None:
    """Removes what a run left on the disk, after its row is written."""
    workdir = workdirs / _folder_name(run, results.recipe_name(run.data_set, run.setting))
    shutil.rmtree(workdir, ignore_errors=True)
    _log(workdir).unlink(missing_ok=True)


def _folder_name(run: Run, recipe: str) -> str:
    return f"{run.data_set}-{run.setting}-{run.learning_rate:g}-{run.seed}-{recipe}"


def _train(run: Run, arguments: Sequence[str], workdir: Path, stopped: Callable[[], int | None]) -> bool:
    """Runs train.py to its end; returns whether the run diverged."""
    code, said = _process([str(TRAIN), "--config", *arguments], workdir, stopped)
    errors = [line for line in said if line.startswith("error:")]
    if code == 2 and errors and DIVERGED.search(errors[-1]):
        return True
    _check_ended(run, "train.py", code, said, workdir)
    return False


def _test(run: Run, workdir: Path, stopped: Callable[[], int | None]) -> dict[str, Any]:
    """Returns the scores on the test split of both weights, at the last step."""
    code, said = _process(["-m", scoring.__name__, str(workdir)], workdir, stopped)
    _check_ended(run, "its evaluation", code, said, workdir)
    return json.loads((workdir / scoring.SCORES).read_text())


def _process(arguments: Sequence[str], workdir: Path, stopped: Callable[[], int | None]) -> tuple[int, list[str]]:
    """Runs a process of Python to its end; returns its exit code and the lines that it said, which are in the log too.

    Raises:
      Stopped: a signal came, and was passed on.
    """
    log = _log(workdir)
    with file_errors(log, "written"):
        log.parent.mkdir(parents=True, exist_ok=True)
        file = log.open("wb")
    # In a session of its own, so that Ctrl-C reaches this process alone, which passes it on once.
    with (
        file,
        subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=parents.named(),
        ) as process,
    ):
        try:
            told = False
            while process.poll() is None:
                if not told and stopped() is not None:
                    process.send_signal(signal.SIGTERM)
                    told = True
                time.sleep(POLL_SECONDS)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0 and (number := stopped()) is not None:
        raise Stopped(number)
    return process.returncode, [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]


def _log(workdir: Path) -> Path:
    return workdir.with_name(f"{workdir.name}.log")


def _check_ended(run: Run, what: str, code: int, said: Sequence[str], workdir: Path) -> None:
    """Raises UserError if a process has failed."""
    if code == 0:
        return
    errors = [line for line in said if line.startswith("error:")]
    reason = errors[-1].removeprefix("error: ") if errors else (said or ["it said nothing"])[-1]
    end = f"signal {-code}" if code < 0 else f"exit code {code}"
    raise UserError(
        f"{run.data_set}, {run.setting}, seed {run.seed}: {what} ended with {end}: {reason}\n"
        f"The same command goes on from the last checkpoint; all that it said is in {_log(workdir)}."
    )


def _machine() -> dict[str, Any]:
    return {
        "cpu": processor.name(),
        "cpus": usable_cpus(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
