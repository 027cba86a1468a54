"""`reproduce` around the runs, which tests/reproduction/test_running.py makes: what it begins, and says."""

import datetime
import fcntl
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import shell
import workdirs
from tests.reproduction import planted
from xception_flax.commands import reproduce
from xception_flax.data.pipeline import usable_cpus
from xception_flax.reproduction import results as rows
from xception_flax.reproduction import running
from xception_flax.reproduction.claims import SEARCH_SEED, Table, read_table
from xception_flax.reproduction.results import Results, Run
from xception_flax.text.errors import UserError

TINY = Path(__file__).parents[1] / "reproduction" / "tiny.py"


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Calls the command on the tiny table, with all its files in `tmp_path`."""

    def call(*arguments: object) -> tuple[int, str, str]:
        places = {"--results": "results.jsonl", "--output": "docs", "--workdir": "runs"}
        given = [word for option, name in places.items() for word in (option, tmp_path / name)]
        return shell.call(monkeypatch, capsys, reproduce.main, "--config", TINY, *given, *arguments)

    return call


def plant(path: Path, *, seeds: int, searched: tuple[str, ...] = ("base",)) -> None:
    results = Results(read_table(TINY), [])
    for setting in searched:
        for rate, accuracy in ((0.025, 0.5), (0.05, 0.6), (0.1, 0.5)):
            rows.append(path, planted.row(results, Run("digits", setting, rate, SEARCH_SEED), accuracy))
    for seed in range(seeds):
        rows.append(path, planted.row(results, Run("digits", "base", 0.05, seed), 0.6))


def test_what_is_there_is_not_run_again(call, tmp_path):
    plant(tmp_path / "results.jsonl", seeds=3)
    before = (tmp_path / "results.jsonl").read_bytes()
    code, out, err = call("--only", "averaging")
    assert (code, err) == (0, "")
    assert (tmp_path / "results.jsonl").read_bytes() == before
    assert out.splitlines()[0] == str(tmp_path / "docs" / "miniature.md")
    assert "| Averaged weights are better (nowhere) | agree |" in (tmp_path / "docs" / "miniature.md").read_text()


def test_no_run_begins_that_would_end_after_the_budget(call, tmp_path):
    """The planted runs took 10 seconds each, so one does not fit into 6."""
    plant(tmp_path / "results.jsonl", seeds=1)
    code, _, err = call("--only", "averaging", "--budget", 0.1)
    assert code == 0
    assert err == "no run fits into the budget; 2 runs or more are missing, about 1 min\n"
    assert "too few seeds" in (tmp_path / "docs" / "miniature.md").read_text()


def test_the_page_alone(call, tmp_path):
    (tmp_path / "results.jsonl").touch()
    code, out, err = call("--report")
    assert (code, out, err) == (0, f"{tmp_path / 'docs' / 'miniature.md'}\n", "")
    assert not (tmp_path / "runs").exists()


def test_no_page_takes_the_place_of_another(monkeypatch, capsys, tmp_path):
    """Neither by a misspelt file of results, nor by one's own results without a folder for their page."""
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        (["--report"], "there are no results at results/miniature.jsonl"),
        (["--report", "--results", "mine.jsonl"], "--results mine.jsonl needs --output DIR too"),
        (["--results", "mine.jsonl", "--budget", "1"], "--results mine.jsonl needs --output DIR too"),
    ):
        code, _, err = shell.call(monkeypatch, capsys, reproduce.main, *arguments)
        assert code == 2
        assert message in err
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "digit"], "unknown data set 'digit'; did you mean 'digits'?"),
        (["--only", "momentun"], "unknown claim 'momentun'; did you mean 'momentum'?"),
        (["--budget", "0"], "must be a positive number of minutes, got '0'"),
        (["--budget", "nan"], "must be a positive number of minutes, got 'nan'"),
        (["--seeds", "0"], "must be a positive integer, got '0'"),
        (["--jobs", "99999"], "--jobs 99999: each needs a CPU, and there are "),
    ],
)
def test_mistakes_are_refused(call, tmp_path, arguments, message):
    code, _, err = call(*arguments)
    assert code == 2
    assert message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--output", "--workdir", "--results"])
def test_what_cannot_be_written_is_found_before_anything_is_run(call, tmp_path, option):
    (tmp_path / "file").touch()
    code, _, err = call(option, tmp_path / "file" / "x")
    assert code == 2
    assert re.match(rf"error: {tmp_path / 'file'}.* cannot be made: ", err)


def test_a_second_one_beside_it_is_refused(call, tmp_path):
    (tmp_path / "runs").mkdir()
    with (tmp_path / "runs" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = call()
    assert code == 2
    assert "another `reproduce` runs in" in err


# Runs at once -------------------------------------------------------------------------------------


@pytest.fixture
def searched(tmp_path, monkeypatch) -> Path:
    """Results of both searches of the claim 'momentum', so that one seed of it is a run of each setting."""
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"))
    path = tmp_path / "results.jsonl"
    plant(path, seeds=0, searched=("base", "no_momentum"))
    return path


def measured(path: Path) -> dict[str, dict]:
    """Returns the rows that were not planted, by setting."""
    return {row["setting"]: row for row in rows.read(path) if row["seed"] != SEARCH_SEED}


def test_runs_at_once_have_the_numbers_of_those_one_after_the_other(call, searched):
    planted_rows, numbers = searched.read_bytes(), ("validation", "test", "losses", "accuracies", "steps")
    code, _, err = call("--only", "momentum", "--seeds", 1, "--jobs", 2)
    assert code == 0, err
    beside = measured(searched)
    assert beside.keys() == {"base", "no_momentum"}
    ended = [datetime.datetime.fromisoformat(row["machine"]["date"]).timestamp() for row in beside.values()]
    assert max(ended) - min(ended) < max(row["seconds"] for row in beside.values()), "neither waits for the other"
    assert {row["machine"]["cpus"] for row in beside.values()} == {usable_cpus() // 2}

    searched.write_bytes(planted_rows)
    code, _, err = call("--only", "averaging", "--seeds", 1, "--jobs", 2)
    assert code == 0, err
    alone = measured(searched)["base"]
    assert {name: alone[name] for name in numbers} == {name: beside["base"][name] for name in numbers}


def test_a_signal_or_a_failure_of_one_stops_all_at_a_checkpoint_and_they_go_on_next_time(call, searched, tmp_path):
    runs = tmp_path / "runs"

    def process_of(setting: str) -> int | None:
        """The number of a run's process, when it has begun to train or is about to."""
        for lock in runs.glob(f"*-{setting}-*/.lock"):
            if found := re.search(r"process (\d+)", lock.read_text()):
                return int(found[1])
        return None

    def when_both_train(do: Callable[[], None]) -> threading.Thread:
        def wait() -> None:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline:
                if process_of("base") and process_of("no_momentum"):
                    do()
                    return
                time.sleep(0.02)

        thread = threading.Thread(target=wait)
        thread.start()
        return thread

    def kill() -> None:
        os.kill(process_of("no_momentum"), signal.SIGKILL)

    both = ("--only", "momentum", "--seeds", 1, "--jobs", 2)
    thread = when_both_train(lambda: os.kill(os.getpid(), signal.SIGTERM))
    code, _, err = call(*both)
    thread.join()
    assert code == 128 + signal.SIGTERM
    assert "asked to stop: after this step or batch a checkpoint is written" in err
    assert "stopped after 0 runs; the same command goes on from there" in err
    steps = [max((record["step"] for record in workdirs.records(path)), default=0) for path in runs.glob("*/")]
    assert len(steps) == 2
    assert max(steps) < 157
    for lock in runs.glob("*/.lock"):
        lock.unlink()

    thread = when_both_train(kill)
    code, _, err = call(*both)
    thread.join()
    assert code == 2
    assert "digits, no_momentum, seed 0: train.py ended with signal 9" in err
    assert measured(searched) == {}
    code, _, err = call(*both)
    assert code == 0, err
    assert err.count("rate 0.05, seed 0, from its last checkpoint; ") == 2
    assert {row["steps"] for row in measured(searched).values()} == {157}
    assert not list(runs.glob("*/"))


def test_a_run_that_goes_on_is_written_though_the_next_one_could_not_begin(call, searched, monkeypatch):
    going = threading.Event()

    def perform(run: Run, table: Table, results: Results, *others: object) -> dict:
        going.wait(60)
        return planted.row(results, run, 0.6)

    def say(text: str) -> None:
        if text.startswith("digits, base"):
            going.set()
            raise UserError("nobody reads what is said")

    monkeypatch.setattr(running, "perform", perform)
    monkeypatch.setattr(reproduce, "_say", say)
    code, _, err = call("--only", "momentum", "--seeds", 1, "--jobs", 2)
    assert code == 2
    assert "nobody reads what is said" in err
    assert measured(searched).keys() == {"no_momentum"}


@pytest.mark.parametrize(("jobs", "minutes"), [(1, 4), (2, 2), (3, 2), (8, 2)])
def test_the_time_left_is_at_least_that_of_the_longest_run(monkeypatch, jobs, minutes):
    monkeypatch.setattr(reproduce, "_expected_seconds", lambda found, run: {"a": 60.0, "b": 120.0, "c": 60.0}[run])
    assert reproduce._left(None, ["a", "b", "c"], jobs) == f"about {minutes} min"
