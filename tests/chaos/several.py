"""A run of several processes of which one is killed, stopped, starved, broken or asked to stop, and how all end."""

import contextlib
import dataclasses
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.chaos import phases, run
from tests.chaos.kills import RUN_SECONDS, STOP_SECONDS, tail
from tests.chaos.run import Failure, Setting

FAIL = signal.SIGRTMIN + 1  # on it, a process raises a ValueError: see `startup/sitecustomize.py`
FULL_BYTES = 1000  # no file may become larger: such a limit stands for a full disk, which needs no mount
SPARE_SECONDS = 30  # beside `silent_seconds`, for the others to end: a look, the farewell and a busy machine

# The arrays of a wider network are large enough to be split.
SPLIT = ["--config.mesh.fsdp=2", "--config.model.width=1"]

FAULTS = ("kill", "stop", "stop for good", "full disk", "error", "ask")


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens to which process, and when.

    Attributes:
      kind: one of `FAULTS`. 'stop' lasts less than the others wait, 'stop for good' longer; 'ask' is a signal that asks
        to save and stop.
      victim: the process.
      step: when a record of this step is there; 0: when the run begins, as all have found each other.
      after: a fraction of the seconds from then on.
    """

    kind: str
    victim: int
    step: int
    after: float


def draw(seed: int, processes: int, kinds: Sequence[str] = FAULTS) -> Fault:
    """Returns the fault of a seed: the `kinds` take turns, all else is random."""
    rng, kind = random.Random(seed), kinds[seed % len(kinds)]
    # A disk that is full from the start is another matter: the run does not begin.
    step = rng.choice([2, 8, 16, 24, 32] if kind in ("full disk", "error") else [0, 2, 8, 16, 24, 32])
    return Fault(kind, rng.randrange(processes), step, rng.random())


@dataclasses.dataclass
class Outcome:
    """What one fault did.

    Attributes:
      seed, kind, victim, step: of the fault.
      codes: with which the processes ended, that of a victim too.
      seconds: from the fault to the end of the last of the others; after a stop that was borne, to the end of the run.
      said: the line in which another process says why it ended.
      late: whether the run was over before the fault could reach it.
    """

    seed: int
    kind: str
    victim: int
    step: int
    codes: list[int]
    seconds: float
    said: str
    late: bool = False


def command(setting: Setting, workdir: Path, processes: int, silent_seconds: int) -> list[list[str]]:
    """Returns the command of each process. The state is split (FSDP), so each writes a part of every checkpoint."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = [f"--coordinator=127.0.0.1:{port}", f"--num-processes={processes}", *SPLIT]
    return [
        run.command(setting, workdir, *together, f"--process-id={i}", f"--silent-seconds={silent_seconds}")
        for i in range(processes)
    ]


@contextlib.contextmanager
def started(
    setting: Setting, folder: Path, workdir: Path, processes: int, silent_seconds: int
) -> Iterator[list[subprocess.Popen]]:
    """Starts the processes, and kills what is left of them at the end."""
    environment = run.environment(1, folder / "cache", CHAOS_RAISE=str(int(FAIL)))
    commands = command(setting, workdir, processes, silent_seconds)
    begun = [run.start(each, environment, folder / f"log {i}") for i, each in enumerate(commands)]
    try:
        yield begun
    finally:
        run.end(begun)


def train(setting: Setting, folder: Path, workdir: Path, processes: int) -> float:
    """Trains without a fault, to the end; returns the seconds.

    Raises:
      Failure: a process ended with an error, or not in time.
    """
    begin = time.monotonic()
    with started(setting, folder, workdir, processes, silent_seconds=75) as begun:
        codes = [ended(process, begin + RUN_SECONDS) for process in begun]
    if codes != [0] * processes:
        raise Failure(f"a start without a fault ended with codes {codes}")
    return time.monotonic() - begin


def ended(process: subprocess.Popen, until: float) -> int:
    try:
        return process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise Failure("it has not ended in time") from None


def trial(
    seed: int,
    fault: Fault,
    setting: Setting,
    untouched: Path,
    seconds: float,
    folder: Path,
    *,
    processes: int,
    silent_seconds: int,
    stop_seconds: float,
) -> Outcome:
    """Starts a run, makes a fault, looks at how the others end, starts it again, and compares the end.

    Args:
      seed: for the outcome.
      fault: what happens.
      setting: of the run.
      untouched: workdir of a run of as many processes without a fault.
      seconds: that it took.
      folder: new; it is removed if all is well.
      processes: of the run.
      silent_seconds: the others wait so long for a process that is silent.
      stop_seconds: how long a 'stop' lasts.

    Raises:
      Failure: a promise was not kept. `folder` is left.
    """
    folder.mkdir(parents=True)
    workdir = folder / "workdir"
    try:
        with started(setting, folder, workdir, processes, silent_seconds) as begun:
            outcome = strike(seed, fault, begun, folder, workdir, seconds, silent_seconds, stop_seconds)
        # A process may have finished before the fault reached it.
        if not run.is_over(workdir):
            train(setting, folder, workdir, processes)
        run.check_same(untouched, workdir)
    except Failure as failure:
        logs = "".join(f"\nprocess {i}:\n{tail(folder / f'log {i}')}" for i in range(processes))
        raise Failure(f"{fault}: {failure}{logs}") from None
    shutil.rmtree(folder)
    return outcome


def strike(
    seed: int,
    fault: Fault,
    begun: list[subprocess.Popen],
    folder: Path,
    workdir: Path,
    seconds: float,
    silent_seconds: int,
    stop_seconds: float,
) -> Outcome:
    """Makes the fault, and checks how the processes end.

    Raises:
      Failure: one ended with another code, too late or without the reason.
    """
    wait_for(lambda: (workdir / "config.json").exists() and phases.last_step(workdir) >= fault.step, begun)
    time.sleep(fault.after * (0.3 if fault.step else seconds / 4))
    victim, others = begun[fault.victim], [each for each in begun if each is not begun[fault.victim]]
    struck, until = time.monotonic(), time.monotonic() + silent_seconds + SPARE_SECONDS
    if fault.kind == "kill":
        victim.kill()
    elif fault.kind == "full disk":
        resource.prlimit(victim.pid, resource.RLIMIT_FSIZE, (FULL_BYTES, FULL_BYTES))
        until += RUN_SECONDS  # it is noticed at the next record or checkpoint
    elif fault.kind == "error":
        victim.send_signal(FAIL)
    elif fault.kind == "ask":
        victim.terminate()
        until = struck + STOP_SECONDS
    else:
        victim.send_signal(signal.SIGSTOP)
        if fault.kind == "stop":
            time.sleep(stop_seconds)
            victim.send_signal(signal.SIGCONT)
            until += RUN_SECONDS
    codes = {each.pid: ended(each, until) for each in others}
    took = time.monotonic() - struck
    if fault.kind == "stop for good":
        victim.send_signal(signal.SIGCONT)
    codes[victim.pid] = ended(victim, time.monotonic() + silent_seconds + SPARE_SECONDS)

    logs = [(folder / f"log {i}").read_text(errors="replace") for i in range(len(begun))]
    said = [re.findall(r"^error: .*", text, re.MULTILINE)[-1:] for text in logs]
    of_others = {line for i, lines in enumerate(said) if i != fault.victim for line in lines}
    codes_of_others = {codes[each.pid] for each in others}
    in_order = [codes[each.pid] for each in begun]
    outcome = Outcome(seed, fault.kind, fault.victim, fault.step, in_order, round(took, 1), " | ".join(of_others))
    if codes_of_others == {0}:
        if fault.kind == "stop":
            return outcome  # it was borne
        if run.is_over(workdir):
            return dataclasses.replace(outcome, late=True)
    if fault.kind == "ask":
        found = re.search(r"^stopped at step (\d+), checkpoint written.*$", logs[0], re.MULTILINE)
        if set(in_order) != {128 + signal.SIGTERM} or not found:
            raise Failure(f"codes {in_order}, expected {128 + signal.SIGTERM} of all, and where it stopped")
        if (saved := run.saved_steps(workdir)[-1:]) != [int(found[1])]:
            raise Failure(f"it stopped at step {found[1]}, but the newest checkpoint is of step {saved}")
        return dataclasses.replace(outcome, said=found[0])
    expected = {"kill": {75}, "stop for good": {75}, "full disk": {2}, "error": {1}, "stop": set()}[fault.kind]
    if not codes_of_others <= expected:
        raise Failure(f"codes {in_order}, expected {sorted(expected)} of the others")
    if not of_others or not all(re.search(rf"\bprocess {fault.victim}\b", line) for line in of_others):
        raise Failure(f"the others do not say that it was process {fault.victim}: {sorted(of_others)}")
    return outcome


def wait_for(condition: Callable[[], bool], begun: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + RUN_SECONDS
    while not condition() and all(each.poll() is None for each in begun):
        if time.monotonic() > deadline:
            raise Failure(f"it has not come so far in {RUN_SECONDS} s")
        time.sleep(0.01)
