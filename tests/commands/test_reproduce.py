"""`reproduce` around the runs, which tests/reproduction/test_running.py makes: what it begins, and says."""

import fcntl
from pathlib import Path

import pytest

import shell
from tests.reproduction import planted
from xception_flax.commands import reproduce
from xception_flax.reproduction import results as rows
from xception_flax.reproduction.claims import SEARCH_SEED, read_table
from xception_flax.reproduction.results import Results, Run

TINY = Path(__file__).parents[1] / "reproduction" / "tiny.py"


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Calls the command on the tiny table, with all its files in `tmp_path`."""

    def call(*arguments: object) -> tuple[int, str, str]:
        places = {"--results": "results.jsonl", "--output": "docs", "--workdir": "runs"}
        given = [word for option, name in places.items() for word in (option, tmp_path / name)]
        return shell.call(monkeypatch, capsys, reproduce.main, "--config", TINY, *given, *arguments)

    return call


def plant(path: Path, *, seeds: int) -> None:
    results = Results(read_table(TINY), [])
    for rate, accuracy in ((0.025, 0.5), (0.05, 0.6), (0.1, 0.5)):
        rows.append(path, planted.row(results, Run("digits", "base", rate, SEARCH_SEED), accuracy))
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
    assert err == "the budget is used up; 2 runs or more are missing, about 1 min\n"
    assert "too few seeds" in (tmp_path / "docs" / "miniature.md").read_text()


def test_the_page_alone(call, tmp_path):
    code, out, err = call("--report")
    assert (code, out, err) == (0, f"{tmp_path / 'docs' / 'miniature.md'}\n", "")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "momentun"], "unknown claim 'momentun'; did you mean 'momentum'?"),
        (["--budget", "0"], "must be a positive number of minutes, got '0'"),
        (["--budget", "nan"], "must be a positive number of minutes, got 'nan'"),
        (["--seeds", "0"], "must be a positive integer, got '0'"),
    ],
)
def test_mistakes_are_refused(call, tmp_path, arguments, message):
    code, _, err = call(*arguments)
    assert code == 2
    assert message in err
    assert not list(tmp_path.iterdir())


def test_a_second_one_beside_it_is_refused(call, tmp_path):
    (tmp_path / "runs").mkdir()
    with (tmp_path / "runs" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = call()
    assert code == 2
    assert "another `reproduce` runs in" in err
