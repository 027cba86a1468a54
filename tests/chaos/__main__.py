"""Kills, stops and starves real runs, and checks that what they promise holds.

The usual kills, at random moments in every phase, each run then compared with an untouched one:

    python -m tests.chaos --kills 200

Several processes as one run, of which one is killed, stopped, starved or broken:

    python -m tests.chaos --processes 2 --starts 20

The same run on other devices, one after the other; and started by `mpirun`, and as Slurm starts it:

    python -m tests.chaos --meshes
    python -m tests.chaos --launchers
"""

import argparse
import collections
import dataclasses
import datetime
import json
import os
import random
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported, which reads the checkpoints here

from tests.chaos import kills, launchers, meshes, phases, run, several
from tests.chaos.kills import Outcome, Untouched
from tests.chaos.run import Failure, Setting

KILLS_IN_A_TRIAL = 10
MOST_FAILURES = 5


class Report:
    """What has happened so far, on the terminal and in a file of JSON."""

    def __init__(self, argv: Sequence[str], file: Path | None, minutes: float) -> None:
        self._file, self._begin, self._minutes = file, time.monotonic(), minutes
        self.values: dict[str, Any] = {
            "command": shlex.join(["python", "-m", "tests.chaos", *argv]),
            "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        }
        self.failures: list[str] = []

    @property
    def is_over(self) -> bool:
        return self.minutes > self._minutes

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self._begin) / 60

    def progress(self, done: int, wanted: int, text: str) -> None:
        rate = max(done, 1) / self.minutes
        print(f"{done:4} of {wanted}  {text}  {rate:.1f} a minute, {(wanted - done) / rate:.0f} min left", flush=True)

    def fail(self, text: str) -> None:
        self.failures.append(text)
        print(f"FAILED: {text}", flush=True)
        self.write()

    def write(self, **values: Any) -> None:
        """Adds values, and writes all of them."""
        self.values |= values | {"minutes": round(self.minutes, 1), "failures": self.failures}
        if self._file is not None:
            new = self._file.with_name(self._file.name + ".new")
            new.write_text(json.dumps(self.values, indent=1) + "\n")
            os.replace(new, self._file)

    def end(self) -> int:
        """Returns the exit code."""
        self.write()
        print(f"{len(self.failures)} failures in {self.minutes:.1f} minutes")
        return 1 if self.failures else 0


def draw_setting(seed: int) -> tuple[Setting, bool]:
    """Returns the setting of a trial, and whether its cache of compiled programs is empty."""
    rng = random.Random(seed)
    network = rng.choices(list(run.NETWORKS), [3, 1])[0]
    return Setting(network, rng.choice([1, 8])), rng.random() < 0.2


def kill(wanted: int, seed: int, folder: Path, report: Report) -> None:
    """Kills runs `wanted` times: trials of `KILLS_IN_A_TRIAL` kills, each with a seed of its own."""
    untouched: dict[Setting, Untouched] = {}
    outcomes: list[Outcome] = []
    identical = 0
    while (done := len(struck(outcomes))) < wanted and not report.is_over:
        setting, cold = draw_setting(seed)
        count = min(KILLS_IN_A_TRIAL, wanted - done)
        print(f"seed {seed}: {setting}{', cold cache' if cold else ''}", flush=True)
        try:
            if setting not in untouched:
                untouched[setting] = Untouched(*run.untouched(setting, folder / str(setting)))
            trial = kills.trial(seed, setting, untouched[setting], folder / f"seed {seed}", kills=count, cold=cold)
            for outcome in trial:
                outcomes.append(outcome)
                text = f"{outcome.signal:8} in {outcome.phase:11} {'and a save ' if outcome.saving else 11 * ' '}"
                report.progress(len(struck(outcomes)), wanted, text)
            identical += 1
        except Failure as failure:
            report.fail(f"seed {seed} (--seed {seed} --kills {count}), {setting}: {failure}\n  kept: {folder}")
        report.write(**summary(outcomes, identical), kills=[dataclasses.asdict(each) for each in outcomes])
        seed += 1
        if len(report.failures) == MOST_FAILURES:
            print("too many failures: it ends here")
            break
    for name, value in summary(outcomes, identical).items():
        print(f"{name}: {value}")


def starve(
    starts: int,
    processes: int,
    seed: int,
    folder: Path,
    report: Report,
    *,
    faults: Sequence[str],
    silent_seconds: int,
    stop_seconds: float,
) -> None:
    """Makes so many faults, each in a run of several processes; one that came too late is made up for."""
    setting = Setting("lenet", processes)  # of one device each
    untouched, outcomes = folder / "untouched" / "workdir", []
    untouched.parent.mkdir(parents=True)
    seconds = several.train(setting, untouched.parent, untouched, processes)
    print(f"an untouched run of {processes} processes takes {seconds:.0f} s", flush=True)
    while (met := sum(not each.late for each in outcomes)) + len(report.failures) < starts:
        if report.is_over or len(report.failures) == MOST_FAILURES or len(outcomes) > 2 * starts:
            break
        fault = several.draw(seed, processes, faults)
        try:
            outcome = several.trial(
                seed,
                fault,
                setting,
                untouched,
                seconds,
                folder / f"seed {seed}",
                processes=processes,
                silent_seconds=silent_seconds,
                stop_seconds=stop_seconds,
            )
        except Failure as failure:
            report.fail(f"seed {seed} (--processes {processes} --starts 1): {failure}\n  kept: {folder}")
        else:
            outcomes.append(outcome)
            text = f"{fault.kind:13} of process {fault.victim}: codes {outcome.codes} after {outcome.seconds} s"
            report.progress(met + 1, starts, text + (", too late" if outcome.late else ""))
        by_kind = {kind: [each.seconds for each in outcomes if each.kind == kind and not each.late] for kind in faults}
        report.write(
            **{
                "number of starts": len(outcomes) + len(report.failures),
                "that ended as an untouched run": len(outcomes),
                "of these too late for the fault": sum(each.late for each in outcomes),
                "most seconds to the end of the others": {
                    kind: max(all_, default=None) for kind, all_ in by_kind.items()
                },
                "starts": [dataclasses.asdict(each) for each in outcomes],
            }
        )
        seed += 1


def change_meshes(folder: Path, report: Report) -> None:
    """Changes devices and processes on the way, and compares with a run of two processes."""
    setting, untouched = Setting("lenet", 2), folder / "untouched" / "workdir"
    untouched.parent.mkdir(parents=True)
    several.train(setting, untouched.parent, untouched, processes=2)
    try:
        steps, share = meshes.walk(untouched, setting, folder / "cache", folder / "meshes")
    except Failure as failure:
        report.fail(f"meshes: {failure}\n  kept: {folder}")
        return
    print(f"changed after steps {steps}; parameters differ by at most {share:.2g} of the largest")
    report.write(meshes={"changed after steps": steps, "largest difference": share})


def launch(folder: Path, report: Report) -> None:
    """Compares runs of two processes that launchers have started with one that was started by hand."""
    setting, untouched = Setting("lenet", 2), folder / "untouched" / "workdir"
    untouched.parent.mkdir(parents=True)
    several.train(setting, untouched.parent, untouched, processes=2)
    for launcher in ("mpirun", "slurm"):
        try:
            run.check_same(untouched, launchers.train(launcher, setting, folder / launcher, tasks=2))
        except Failure as failure:
            report.fail(f"{launcher}: {failure}\n  kept: {folder}")
        else:
            print(f"{launcher}: the same bits")
            report.write(**{launcher: "the same bits"})


def struck(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Returns those that met the run before its end."""
    return [outcome for outcome in outcomes if outcome.phase != "finished"]


def summary(outcomes: Sequence[Outcome], identical: int) -> dict[str, Any]:
    met = struck(outcomes)
    by_phase = collections.Counter(outcome.phase for outcome in met)
    by_phase["save in flight"] = sum(outcome.saving for outcome in met)
    names = [*phases.PHASES, "save in flight"]
    stops = [
        each.seconds
        for each in met
        if each.code > 0 and not each.signal.endswith("+") and each.phase in phases.STOPS_WITH_A_SAVE
    ]
    return {
        "number of kills": len(met),
        "trials that ended as an untouched run": identical,
        "by phase": {phase: by_phase[phase] for phase in names},
        "phases missed": [phase for phase in names if not by_phase[phase]],
        "by signal": dict(collections.Counter(outcome.signal for outcome in met)),
        "with workers": sum(outcome.workers for outcome in met),
        "seconds to stop": {"median": round(statistics.median(stops), 2), "most": round(max(stops), 2)}
        if stops
        else {},
    }


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="kill runs of one process N times")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="with --starts: 2 or 4")
    parser.add_argument("--starts", type=int, default=0, metavar="N", help="start several processes N times")
    parser.add_argument("--faults", nargs="+", choices=several.FAULTS, help="with --starts: these alone, in turn")
    parser.add_argument("--silent-seconds", type=int, default=75, help="with --starts: of train.py")
    parser.add_argument("--stop-seconds", type=float, default=60, help="with --starts: how long one stands still")
    parser.add_argument("--meshes", action="store_true", help="change devices and processes on the way")
    parser.add_argument("--launchers", action="store_true", help="start by mpirun, and as Slurm does")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial; the next ones count on")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no trial after so many")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, as they come")
    parser.add_argument("--folder", type=Path, help="of the runs; what has failed stays in it (a new temporary one)")
    arguments = parser.parse_args(argv)
    if not (arguments.kills or arguments.starts or arguments.meshes or arguments.launchers):
        parser.error("say what to do, such as --kills 200")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # each `finally` ends its trainers
    report = Report(argv, arguments.json, arguments.minutes)
    folder = (arguments.folder or Path(tempfile.mkdtemp(prefix="chaos-"))).absolute()
    if arguments.kills:
        kill(arguments.kills, arguments.seed, folder, report)
    if arguments.starts:
        starve(
            arguments.starts,
            arguments.processes,
            arguments.seed,
            folder,
            report,
            faults=arguments.faults or several.FAULTS,
            silent_seconds=arguments.silent_seconds,
            stop_seconds=arguments.stop_seconds,
        )
    if arguments.meshes:
        change_meshes(folder / "meshes", report)
    if arguments.launchers:
        launch(folder / "launchers", report)
    return report.end()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
