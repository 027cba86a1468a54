"""A run that is stopped, then killed, and ends with the numbers of one that was not."""

import contextlib
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import workdirs
from xception_flax.reproduction import running
from xception_flax.reproduction.claims import SEARCH_SEED, read_table
from xception_flax.reproduction.results import Results, Run
from xception_flax.text.errors import UserError

pytestmark = pytest.mark.usefixtures("one_device_in_processes")

TABLE = read_table(Path(__file__).with_name("tiny.py"))
MEASURED = ("steps", "validation", "test", "accuracies", "parameters", "multiply_adds", "recipe")
RUN = Run("digits", "base", 0.05, 0)


@pytest.fixture
def one_device_in_processes(monkeypatch):
    """As a user's; with the eight of the tests a step takes longer."""
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"))


def perform(run: Run, workdirs: Path, stopped: Callable[[], int | None] = lambda: None) -> dict:
    return running.perform(run, TABLE, Results(TABLE, []), workdirs, None, stopped)


def test_a_run_that_was_stopped_and_killed_ends_as_one_that_was_not(tmp_path):
    whole = perform(RUN, tmp_path / "whole")
    assert whole["steps"] == 157
    assert whole["test"]["images"] == 360
    assert whole["test"]["ema"] != whole["test"]["raw"]
    assert whole["losses"][-1][0] == 157
    assert whole["seconds"] > 0

    folder = tmp_path / "torn"
    results = Results(TABLE, [])

    def workdir() -> Path:
        return next(path for path in folder.iterdir() if path.is_dir())

    def records_from(step: int) -> bool:
        records = workdirs.records(workdir()) if folder.exists() and any(p.is_dir() for p in folder.iterdir()) else []
        return any(record["step"] >= step for record in records)

    with pytest.raises(running.Stopped) as stopped:
        perform(RUN, folder, lambda: signal.SIGTERM if records_from(5) else None)
    assert stopped.value.number == signal.SIGTERM
    before = max(record["step"] for record in workdirs.records(workdir()))
    assert before < 157

    def kill() -> None:
        if records_from(before + 20):
            with contextlib.suppress(ProcessLookupError):  # it is asked once more, when the process has gone
                os.kill(int(re.search(r"process (\d+)", (workdir() / ".lock").read_text())[1]), signal.SIGKILL)

    with pytest.raises(UserError, match=r"(?s)ended with signal 9.*The same command goes on"):
        perform(RUN, folder, kill)
    row = perform(RUN, folder)
    assert {name: row[name] for name in MEASURED} == {name: whole[name] for name in MEASURED}
    # A run that is stopped records its loss at that step too, so the two curves have other points there.
    assert row["losses"][-5:] == whole["losses"][-5:]
    assert row["seconds"] is None, "of a run in parts nobody knows the time"
    running.remove(RUN, results, folder)
    assert not list(folder.iterdir())


def test_a_search_never_sees_the_test_split(tmp_path):
    row = perform(Run("digits", "base", 0.05, SEARCH_SEED), tmp_path)
    assert row["test"] is None
    assert row["validation"]["top1"] > 0.2


def test_a_run_that_diverges_has_a_row_without_numbers(tmp_path):
    row = perform(Run("digits", "unstable", 1e30, SEARCH_SEED), tmp_path)
    assert (row["validation"], row["test"]) == (None, None)


def test_a_mistake_names_the_run_and_the_log(tmp_path):
    with pytest.raises(UserError, match=r"(?s)digits, base, seed 0: train.py ended with exit code 2.*\.log"):
        perform(RUN._replace(learning_rate=-1.0), tmp_path)


def test_the_test_split_is_scored_by_this_package_and_to_the_end(tmp_path, monkeypatch):
    """From a folder with a package of the same name, and with a signal that comes meanwhile."""
    (tmp_path / "xception_flax").mkdir()
    (tmp_path / "xception_flax" / "__init__.py").write_text("raise RuntimeError('another package')")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs"
    row = perform(RUN, folder, lambda: signal.SIGTERM if list(folder.glob("*.test.log")) else None)
    assert row["test"]["images"] == 360
    assert row["seconds"] > 0


def test_jobs_have_equal_shares_of_the_cpus():
    cpus, shares = os.sched_getaffinity(0), []
    barrier = threading.Barrier(2)

    def share() -> set[int]:
        barrier.wait(60)  # so that each thread has one
        return os.sched_getaffinity(0)

    with running.at_once(2) as pool:
        shares = [future.result() for future in [pool.submit(share), pool.submit(share)]]
    assert [len(each) for each in shares] == [len(cpus) // 2] * 2
    assert not shares[0] & shares[1]
    assert os.sched_getaffinity(0) == cpus, "of this thread"
    with running.at_once(1) as pool:
        assert pool.submit(os.sched_getaffinity, 0).result() == cpus


@pytest.mark.parametrize("there", [False, True])
def test_jobs_run_where_a_share_cannot_be_taken(monkeypatch, there):
    """Elsewhere than on Linux there is no such function; in a sandbox it may be refused."""

    def refused(thread: int, cpus: list[int]) -> None:
        raise PermissionError

    if there:
        monkeypatch.setattr(os, "sched_setaffinity", refused)
    else:
        monkeypatch.delattr(os, "sched_setaffinity")
    with running.at_once(2) as pool:
        assert pool.submit(lambda: 1).result() == 1


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("error: a folder is missing.\nbye", "a folder is missing."),
        ("Traceback\n  file\njaxlib.JaxRuntimeError: RESOURCE_EXHAUSTED\n----\nFor simplicity, ...", "RESOURCE_EX"),
        ("", "it said nothing"),
    ],
)
def test_the_reason_of_a_failure_is_the_line_that_says_it(tmp_path, said, reason):
    log = tmp_path / "log"
    log.write_text(said)
    with pytest.raises(UserError, match=f"the evaluation ended with exit code 1: .*{reason}"):
        running._has_diverged(RUN, "the evaluation", 1, log)
