"""Tries the paper's claims in miniature: runs what is missing, and writes a page that says what the results support.

It goes on where it was stopped. Ctrl-C or SIGTERM stops it after a checkpoint; nothing measured is lost.
"""

import argparse
import contextlib
import math
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

import jax

from xception_flax.commands import cli
from xception_flax.data.pipeline import usable_cpus
from xception_flax.display import console
from xception_flax.host import files, signals
from xception_flax.host.locks import try_lock
from xception_flax.host.project import RECIPES
from xception_flax.reproduction import plan, report, results, running
from xception_flax.reproduction.claims import MIN_SEEDS, Claim, Table, read_table
from xception_flax.reproduction.results import Results, Run
from xception_flax.text.counting import counted
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import lookup

EXAMPLES = """\
  xception-flax reproduce --budget 10
  xception-flax reproduce --only residual,order --seeds 5
  xception-flax reproduce --data digits --jobs 2
  xception-flax reproduce --budget 10 --results mine.jsonl --output mine
  xception-flax reproduce --data-dir /data/fashion-mnist
  xception-flax reproduce --report"""

RESULTS, PAGES = Path(report.RESULTS), Path("docs")  # of the project

UNKNOWN_SECONDS = 60.0  # of a run of which no like one is known


def main(argv: list[str]) -> int:
    parser = cli.parser("xception-flax reproduce", __doc__, EXAMPLES, hosts=False)
    _add_arguments(parser)
    arguments = parser.parse_args(argv)
    if arguments.output is None:
        if arguments.results != RESULTS:
            raise UserError(
                f"--results {arguments.results} needs --output DIR too: its page would take the place of {PAGES}'s."
            )
        arguments.output = PAGES
    table = read_table(arguments.config)
    claims = _chosen(table.claims, arguments.only)
    if arguments.report and not arguments.results.exists():
        raise UserError(f"there are no results at {arguments.results}; run some first, without --report.")
    found = Results(table, results.read(arguments.results))
    if arguments.report:
        _write(found, table, arguments)
        return 0
    if arguments.jobs > (cpus := usable_cpus()):
        raise UserError(f"--jobs {arguments.jobs}: each needs a CPU, and there are {cpus}; give at most {cpus}.")
    data_sets = _data_sets(table, arguments)
    for folder in (arguments.results.parent, arguments.output, arguments.workdir):
        with files.file_errors(folder, "made"):
            folder.mkdir(parents=True, exist_ok=True)
    files.check_writable(arguments.results)
    jax.config.update("jax_platforms", "cpu")  # of this process, which computes nothing; an accelerator is for the runs
    cli.start(arguments)
    begun, before = time.monotonic(), len(found.rows)
    with (arguments.workdir / ".lock").open("w") as lock, signals.StopRequest(say=_say) as stop:
        if not try_lock(lock):
            raise UserError(f"another `reproduce` runs in {arguments.workdir}; wait for its end, or give --workdir.")
        try:
            _run_all(found, table, claims, data_sets, arguments, begun, stop)
        except running.Stopped as stopped:
            done = counted(len(found.rows) - before, "run")
            _say(f"stopped after {done}; the same command goes on from there")
            _write(found, table, arguments)
            return 128 + stopped.number
    _write(found, table, arguments)
    return 0


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--budget", type=_minutes_given, metavar="MINUTES", help="begin no run that would end later")
    parser.add_argument("--only", metavar="CLAIM,...", help="these claims (all)")
    parser.add_argument("--data", metavar="NAME,...", help="on these data sets (all)")
    parser.add_argument(
        "--seeds",
        type=cli.positive,
        default=MIN_SEEDS,
        metavar="N",
        help=f"runs of each setting ({MIN_SEEDS}, and more where they do not decide)",
    )
    parser.add_argument(
        "--jobs",
        type=cli.positive,
        default=1,
        metavar="N",
        help="runs at once, each on its share of the CPUs (1); several cannot share an accelerator",
    )
    parser.add_argument("--data-dir", metavar="DIR", help="of the files of Fashion-MNIST, if not where Debian has them")
    parser.add_argument("--report", action="store_true", help="only write the page from the results")
    parser.add_argument(
        "--config", type=Path, default=RECIPES / "miniature.py", metavar="FILE", help="the table of claims"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        metavar="FILE",
        help="a JSON line for each run (results/miniature.jsonl)",
    )
    parser.add_argument(
        "--output", type=cli.directory, metavar="DIR", help="of miniature.md (docs; to be given with --results)"
    )
    parser.add_argument(
        "--workdir",
        type=cli.directory,
        default=Path("runs", "miniature"),
        metavar="DIR",
        help="of runs that are not at their end (runs/miniature)",
    )


def _minutes_given(text: str) -> float:
    """The type of `--budget`."""
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < 1e6:
        raise argparse.ArgumentTypeError(f"must be a positive number of minutes, got {text!r}")
    return minutes


def _chosen(claims: Sequence[Claim], only: str | None) -> Sequence[Claim]:
    by_name = {claim.name: claim for claim in claims}
    names = by_name if only is None else dict.fromkeys(only.split(","))
    return [lookup(by_name, name, "claim") for name in names]


def _data_sets(table: Table, arguments: argparse.Namespace) -> list[str]:
    """Returns the chosen data sets that are on this machine, and says what is missing of the others."""
    names = table.data_sets if arguments.data is None else dict.fromkeys(arguments.data.split(","))
    for name in names:
        lookup(table.data_sets, name, "data set")
    there, reasons = [], []
    for data_set in names:
        try:
            running.check_data(table, data_set, arguments.data_dir)
            there.append(data_set)
        except UserError as error:
            reasons.append(f"{data_set} is left out: {error}")
    if not there:
        raise UserError("\n".join(reasons))
    for reason in reasons:
        _say(reason.replace("--config.data.data_dir=DATA", "--data-dir DIR"))
    return there


def _run_all(
    found: Results,
    table: Table,
    claims: Sequence[Claim],
    data_sets: Sequence[str],
    arguments: argparse.Namespace,
    begun: float,
    stop: signals.StopRequest,
) -> None:
    """Runs what is missing until nothing is, or the budget is used up.

    Raises:
      running.Stopped: a signal came.
      UserError: a run failed.
    """
    budget, before = math.inf if arguments.budget is None else 60 * arguments.budget, len(found.rows)
    going: dict[Future[dict[str, Any]], Run] = {}
    failures: list[Exception] = []

    def asked() -> int | None:
        # A run that failed stops the others as a signal does, so that its message does not wait for their end.
        return stop.signal or (signal.SIGTERM if failures else None)

    def missing() -> list[Run]:
        return [r for r in plan.missing(found, claims, data_sets, arguments.seeds) if r not in going.values()]

    def begin() -> None:
        runs = missing()
        for i, run in enumerate(runs[: arguments.jobs - len(going)]):
            if asked() is not None or time.monotonic() - begun + _expected_seconds(found, run) > budget:
                return
            count, left = counted(len(runs) - i, "run"), _left(found, [*runs[i:], *going.values()], arguments.jobs)
            how = ", from its last checkpoint" if running.is_begun(run, found, arguments.workdir) else ""
            _say(f"{_shown(run)}{how}; {count} or more to go, {left}")
            given = (run, table, found, arguments.workdir, arguments.data_dir, asked)
            going[pool.submit(running.perform, *given)] = run

    def gather() -> None:
        future = wait(going, return_when=FIRST_COMPLETED).done.pop()
        run = going.pop(future)
        row = future.result()
        results.append(arguments.results, row)
        found.add(row)
        running.remove(run, found, arguments.workdir)
        _say(f"{_shown(run)}: {_outcome(row)}")

    with running.at_once(arguments.jobs) as pool:
        with _kept(failures):
            begin()
        while going:
            with _kept(failures):
                gather()
            with _kept(failures):
                begin()
    if errors := [failure for failure in failures if not isinstance(failure, running.Stopped)]:
        for error in errors[1:]:
            _say(f"error: {error}")
        raise errors[0]
    if runs := missing():
        if stop.signal is not None:
            raise running.Stopped(stop.signal)
        left = _left(found, runs, arguments.jobs)
        used = "the budget is used up" if len(found.rows) > before else "no run fits into the budget"
        _say(f"{used}; {counted(len(runs), 'run')} or more are missing, {left}")


@contextlib.contextmanager
def _kept(failures: list[Exception]) -> Iterator[None]:
    """Keeps an exception for later, since other runs go on, and are to be written when they end."""
    try:
        yield
    except Exception as failure:
        failures.append(failure)


def _shown(run: Run) -> str:
    kind = "search" if run.is_search else f"seed {run.seed}"
    return f"{run.data_set}, {run.setting}, rate {run.learning_rate:g}, {kind}"


def _outcome(row: dict) -> str:
    if row["validation"] is None:
        return "diverged"
    seconds = "" if row["seconds"] is None else f", {row['seconds']:.0f} s"
    test = "" if row["test"] is None else f", test {console.percent(row['test']['ema']['top1'])}"
    return f"validation {console.percent(row['validation']['top1'])}{test}{seconds}"


def _expected_seconds(found: Results, run: Run) -> float:
    """Returns how long a run takes, by those of its setting, else of its data set, else of all."""
    for fields in (2, 1, 0):
        alike = [row["seconds"] for other, row in found.rows.items() if other[:fields] == run[:fields]]
        if known := [seconds for seconds in alike if seconds is not None]:
            return statistics.fmean(known)
    return UNKNOWN_SECONDS


def _left(found: Results, runs: Sequence[Run], jobs: int) -> str:
    """Returns in words how long runs take, `jobs` at once."""
    seconds = [_expected_seconds(found, run) for run in runs]
    return f"about {max(1, round(max(max(seconds), sum(seconds) / jobs) / 60)):,} min"


def _write(found: Results, table: Table, arguments: argparse.Namespace) -> None:
    for path in report.write(found, table, arguments.output, arguments.results):
        print(path, flush=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
