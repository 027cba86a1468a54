"""Runs one setting with one seed: a process of train.py, one that scores it on the test split, a row of results."""

import contextlib
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
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from xception_flax import __version__, data
from xception_flax.data.pipeline import usable_cpus
from xception_flax.host import parents, processor
from xception_flax.host.files import file_errors
from xception_flax.host.project import PACKAGE, TRAIN
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
EXCEPTION = re.compile(r"[\w.]+(Error|Exception)\b")  # the line of a traceback that says what happened
DIVERGED = re.compile(r"(loss|gradient_norm|evaluation) is (nan|-?inf)|not finite")  # what train.py says then

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")


class Stopped(Exception):
    """A signal has asked to stop; `number` is the signal's. What was run so far is on the disk."""

    def __init__(self, number: int) -> None:
        self.number = number


def at_once(jobs: int) -> ThreadPoolExecutor:
    """Returns threads that perform runs, each with its processes on an equal share of the CPUs, where the system can.

    A small network keeps one core busy, so several runs beside each other take less time than one after the other.
    """
    if jobs == 1 or not hasattr(os, "sched_setaffinity"):
        return ThreadPoolExecutor(jobs)
    cpus = sorted(os.sched_getaffinity(0))
    size = len(cpus) // jobs
    shares = [cpus[job * size : (job + 1) * size] for job in range(jobs)]

    def take_a_share() -> None:
        with contextlib.suppress(OSError):  # not allowed here; it is for speed alone
            os.sched_setaffinity(0, shares.pop())  # of this thread, and of the processes that it will start

    return ThreadPoolExecutor(jobs, initializer=take_a_share)


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
    workdir = _workdir(run, results, workdirs)
    is_new = not is_begun(run, results, workdirs)
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
        "recipe": results.recipe_name(run.data_set, run.setting),
        "steps": records[-1]["step"] if records else 0,
        "validation": None if diverged else scoring.chosen(evaluations[-1], "eval/"),
        "test": None if diverged or run.is_search else _test(run, workdir),
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


def is_begun(run: Run, results: Results, workdirs: Path) -> bool:
    """Returns whether a run was stopped before, so that `perform` goes on with it."""
    return _workdir(run, results, workdirs).exists()


def remove(run: Run, results: Results, workdirs: Path) -> None:
    """Removes what a run left on the disk, after its row is written."""
    workdir = _workdir(run, results, workdirs)
    shutil.rmtree(workdir, ignore_errors=True)
    for path in _beside(workdir):
        path.unlink(missing_ok=True)


class _Beside(NamedTuple):
    """Files beside the workdir of a run: what its processes say, and its scores."""

    train_log: Path
    test_log: Path
    test: Path


def _beside(workdir: Path) -> _Beside:
    return _Beside(*(workdir.with_name(workdir.name + end) for end in (".log", ".test.log", ".test.json")))


def _workdir(run: Run, results: Results, workdirs: Path) -> Path:
    recipe = results.recipe_name(run.data_set, run.setting)
    return workdirs / f"{run.data_set}-{run.setting}-{run.learning_rate:g}-{run.seed}-{recipe}"


def _train(run: Run, arguments: Sequence[str], workdir: Path, stopped: Callable[[], int | None]) -> bool:
    """Runs train.py to its end; returns whether the run diverged."""
    log = _beside(workdir).train_log
    return _has_diverged(run, "train.py", _process([str(TRAIN), "--config", *arguments], log, stopped), log)


def _test(run: Run, workdir: Path) -> dict[str, Any] | None:
    """Returns the scores on the test split of both weights, at the last step; None if a loss is not finite there.

    It takes seconds, so a signal waits for it.
    """
    beside = _beside(workdir)
    # By -P not from the working directory, where another package may have this one's name; from where this one is.
    arguments = ["-P", "-m", scoring.__name__, str(workdir), str(beside.test)]
    path = os.pathsep.join([str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    code = _process(arguments, beside.test_log, lambda: None, PYTHONPATH=path)
    if _has_diverged(run, "the evaluation", code, beside.test_log):
        return None
    return json.loads(beside.test.read_text())


def _process(arguments: Sequence[str], log: Path, stopped: Callable[[], int | None], **environment: str) -> int:
    """Runs a process of Python to its end, with all that it says in `log`; returns its exit code.

    Raises:
      Stopped: a signal came, and the process has stopped by it.
    """
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
            env=parents.named() | environment,
        ) as process,
    ):
        try:
            told = None
            while process.poll() is None:
                if told is None and (told := stopped()) is not None:
                    process.send_signal(signal.SIGTERM)
                time.sleep(POLL_SECONDS)
        except BaseException:
            process.kill()
            raise
    if told is not None and process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM):
        raise Stopped(told)
    return process.returncode


def _has_diverged(run: Run, what: str, code: int, log: Path) -> bool:
    """Returns whether a process ended since a loss is not finite; False if it ended well.

    Raises:
      UserError: it failed otherwise.
    """
    if code == 0:
        return False
    said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in said if line.startswith("error:")]
    if code == 2 and errors and DIVERGED.search(errors[-1]):
        return True
    reasons = errors or [line for line in said if EXCEPTION.match(line)] or said or ["it said nothing"]
    end = f"signal {-code}" if code < 0 else f"exit code {code}"
    raise UserError(
        f"{run.data_set}, {run.setting}, seed {run.seed}: {what} ended with {end}: "
        f"{reasons[-1].removeprefix('error: ')}\n"
        f"The same command goes on from the last checkpoint; all that it said is in {log}."
    )


def _machine() -> dict[str, Any]:
    return {
        "cpu": processor.name(),
        "cpus": usable_cpus(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
