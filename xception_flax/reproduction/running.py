"""Runs one setting with one seed: a process of train.py, then its numbers on the test split, as a row of results."""

import datetime
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from xception_flax import __version__, data
from xception_flax.data.pipeline import usable_cpus
from xception_flax.host import parents, processor
from xception_flax.host.files import file_errors
from xception_flax.host.project import TRAIN
from xception_flax.inference import subject as subjects
from xception_flax.models import create_model
from xception_flax.models.costs import list_layers
from xception_flax.recipes import reading
from xception_flax.reproduction.claims import Table
from xception_flax.reproduction.results import Results, Run
from xception_flax.runs import history
from xception_flax.runs.workdir import HISTORY
from xception_flax.text.errors import UserError
from xception_flax.text.sizes import sides
from xception_flax.training import evaluation

TEST = "test"  # the split of the results, in every data set; rates are chosen on that of the recipe
WEIGHTS = ("ema", "raw")
POLL_SECONDS = 0.1
DIVERGED = re.compile(r"(loss|gradient_norm|evaluation) is (nan|-?inf)|not finite")  # what train.py says then

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")


class Stopped(Exception):
    """A signal has asked to stop; `number` is the signal's. What was run so far is on the disk."""

    def __init__(self, number: int) -> None:
        self.number = number


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

    The last step is evaluated, whatever the validation says. The workdir is removed afterwards.

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
        "validation": None if diverged else _scores(evaluations[-1], "eval/"),
        "test": None if diverged or run.is_search else _test(workdir, config),
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
    workdir.with_name(f"{workdir.name}.log").unlink(missing_ok=True)


def _folder_name(run: Run, recipe: str) -> str:
    return f"{run.data_set}-{run.setting}-{run.learning_rate:g}-{run.seed}-{recipe}"


def _train(run: Run, arguments: Sequence[str], workdir: Path, stopped: Callable[[], int | None]) -> bool:
    """Runs train.py to its end; returns whether the run diverged."""
    log = workdir.with_name(f"{workdir.name}.log")
    with file_errors(log, "written"):
        log.parent.mkdir(parents=True, exist_ok=True)
        file = log.open("wb")
    # In a session of its own, so that Ctrl-C reaches this process alone, which passes it on once.
    with (
        file,
        subprocess.Popen(
            [sys.executable, str(TRAIN), "--config", *arguments],
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
    said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if process.returncode == 0:
        return False
    if (number := stopped()) is not None:
        raise Stopped(number)
    errors = [line for line in said if line.startswith("error:")]
    if process.returncode == 2 and errors and DIVERGED.search(errors[-1]):
        return True
    reason = errors[-1].removeprefix("error: ") if errors else (said or ["it said nothing"])[-1]
    end = f"signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
    raise UserError(
        f"{run.data_set}, {run.setting}, seed {run.seed}: train.py ended with {end}: {reason}\n"
        f"The same command goes on from the last checkpoint; all that it said is in {log}."
    )


def _test(workdir: Path, config: ConfigDict) -> dict[str, Any]:
    """Returns the scores on the test split of both weights, at the last step."""
    config = config.copy_and_resolve_references()
    config.data.eval_split = TEST
    found: dict[str, Any] = {}
    for weights in WEIGHTS:
        subject = subjects.of_run(str(workdir), config, checkpoint="latest", weights=weights, batch_size=None)
        results = evaluation.evaluate(subject.eval_step, subject.variables, subject.split, subject.mesh)
        found[weights] = _scores(results, "")
        found["images"] = results["count"]
    return found


def _scores(values: Any, prefix: str) -> dict[str, float]:
    return {name: values[f"{prefix}{name}"] for name in ("top1", "loss")}


def _machine() -> dict[str, Any]:
    return {
        "cpu": processor.name(),
        "cpus": usable_cpus(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
