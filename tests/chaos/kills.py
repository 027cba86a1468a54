"""A run that is killed or stopped again and again at random moments, and ends as an untouched one."""

import dataclasses
import itertools
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.chaos import phases, run
from tests.chaos.run import Failure, Setting

STOPPED = {
    signal.SIGTERM: 128 + signal.SIGTERM,
    signal.SIGINT: 128 + signal.SIGINT,
    signal.SIGUSR1: 128 + signal.SIGUSR1,
}
STOP_SECONDS = 60  # from the signal to the exit: a step, which may be compiling, and a checkpoint
AT_ONCE_SECONDS = 5  # from a second signal
RUN_SECONDS = 300  # a start that takes longer hangs
WARM = 0.55  # a start that compiles nothing takes so much of the time of one that compiles all

# Where the ten kills of a trial are aimed at: a moment that is drawn over the whole run rarely meets what is short. The
# last kill is near the end, after which nothing is left to kill.
AIMS = ["begin", "begin", "begin", "resume", "resume", "step", "evaluation", "save", "save"]
LAST_AIM = "end"


@dataclasses.dataclass(frozen=True)
class Kill:
    """One signal, drawn before the start.

    Attributes:
      signal: sent to the trainer alone.
      again: seconds to a second signal; None for no second one.
      aim: one of `AIMS` or `LAST_AIM`.
      after: a fraction of the time in which the aim lasts.
      count: which evaluation or save of this start is aimed at.
      workers: whether a process reads the data, or threads.
      each_record: whether checkpoints are written by the clock too, here at each record.
    """

    signal: int
    again: float | None
    aim: str
    after: float
    count: int
    workers: bool
    each_record: bool

    @property
    def arguments(self) -> list[str]:
        return [*(run.WORKERS if self.workers else run.THREADS), *(run.EACH_RECORD if self.each_record else [])]


def draw(rng: random.Random) -> list[Kill]:
    """Returns the kills of a trial."""
    return [draw_one(rng, aim) for aim in [*rng.sample(AIMS, len(AIMS)), LAST_AIM]]


def draw_one(rng: random.Random, aim: str) -> Kill:
    number = rng.choice(list(STOPPED)) if rng.random() < 0.3 else signal.SIGKILL
    again = rng.uniform(0.15, 0.6) if number in STOPPED and rng.random() < 0.2 else None
    return Kill(number, again, aim, rng.random(), rng.randint(1, 2), rng.random() < 0.25, rng.random() < 0.3)


@dataclasses.dataclass
class Outcome:
    """What one kill did.

    Attributes:
      seed, number: of the trial, and of the kill in it.
      aim: as of `Kill`.
      signal: its name; with '+' if there was a second.
      phase: one of `phases.PHASES`, of the main thread; 'finished' if the run was over before.
      saving: whether a checkpoint was being written meanwhile.
      workers: as of `Kill`.
      code: with which the process ended.
      seconds: from the signal to the exit.
      saved: step of the newest checkpoint then.
    """

    seed: int
    number: int
    aim: str
    signal: str
    phase: str
    saving: bool
    workers: bool
    code: int
    seconds: float
    saved: int


@dataclasses.dataclass(frozen=True)
class Untouched:
    """An untouched run.

    Attributes:
      workdir: of the run.
      cache: of its compiled programs.
      seconds: that it took, with an empty cache.
    """

    workdir: Path
    cache: Path
    seconds: float


def trial(
    seed: int, setting: Setting, untouched: Untouched, folder: Path, *, kills: int = 10, cold: bool = False
) -> Iterator[Outcome]:
    """Kills a run `kills` times, lets it finish, and compares; yields what each kill did.

    Args:
      seed: everything random follows from it, but for how long the machine takes.
      setting: of the run.
      untouched: of the same setting.
      folder: new; it is removed if all is well.
      kills: how many must meet a run before it is over.
      cold: whether it begins with an empty cache of compiled programs.

    Raises:
      Failure: a promise was not kept. `folder` is left.
    """
    rng = random.Random(f"{seed} {setting}")
    folder.mkdir(parents=True)
    cache, log = folder / "cache" if cold else untouched.cache, folder / "log"
    drawn = itertools.chain.from_iterable(draw(rng) for _ in itertools.count())
    struck, number = 0, 0
    try:
        while struck < kills:  # a run may be over before it is killed so often: then another begins
            workdir = folder / f"workdir {number}"
            while struck < kills and not run.is_over(workdir):
                number += 1
                if number > 3 * kills:
                    raise Failure(f"of {number} kills only {struck} have met a run that was not over")
                kill = next(drawn)
                outcome = strike(kill, number, setting, untouched.seconds, cache, workdir, log)
                struck += outcome[1] != "finished"
                yield Outcome(seed, number, kill.aim, *outcome)
            code = start_and_wait(setting, cache, workdir, log)
            if code != 0:
                raise Failure(f"the last start ended with code {code}")
            run.check_same(untouched.workdir, workdir)
    except Failure as failure:
        raise Failure(f"{failure}\n{tail(log)}") from None
    shutil.rmtree(folder)


def start_and_wait(setting: Setting, cache: Path, workdir: Path, log: Path) -> int:
    """Starts the run, and returns the code with which it ends."""
    begun, saved = log.stat().st_size, run.saved_steps(workdir)
    process = run.start(run.command(setting, workdir, *run.THREADS), run.environment(setting.devices, cache), log)
    try:
        code = process.wait(RUN_SECONDS)
    except subprocess.TimeoutExpired:
        raise Failure(f"the last start has not ended after {RUN_SECONDS} s") from None
    finally:
        run.end([process])
    check_resumed(log.read_text(errors="replace")[begun:], saved)
    return code


def strike(
    kill: Kill, number: int, setting: Setting, seconds: float, cache: Path, workdir: Path, log: Path
) -> tuple[str, str, bool, bool, int, float, int]:
    """Starts the run and kills it; returns the last seven fields of an `Outcome`.

    Raises:
      Failure: it ended with another code, too late, or without its checkpoint.
    """
    answers = log.with_name("stacks")
    answers.unlink(missing_ok=True)
    killed = phases.unfinished(workdir)
    begun, saved = log.stat().st_size if log.exists() else 0, run.saved_steps(workdir)
    environment = run.environment(setting.devices, cache, CHAOS_STACK=str(answers))
    process = run.start(run.command(setting, workdir, *kill.arguments), environment, log)
    name = signal.Signals(kill.signal).name + ("+" if kill.again else "")
    try:
        wait_for_aim(kill, seconds, workdir, process)
        phase, saving = phases.ask(process, answers), bool(phases.unfinished(workdir) - killed)
        sent = time.monotonic()
        process.send_signal(kill.signal)
        if kill.again:
            time.sleep(kill.again)
            process.send_signal(kill.signal)
        try:
            code = process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise Failure(f"kill {number}, {name} while in {phase}: it has not ended after {STOP_SECONDS} s") from None
        took = time.monotonic() - sent
    finally:
        run.end([process])
    said, now = log.read_text(errors="replace")[begun:], run.saved_steps(workdir)
    try:
        check_resumed(said, saved)
        if code == 0 and run.is_over(workdir):  # it was over before the signal, or in its last step
            phase = "finished"
        else:
            check_end(kill, code, took, said, phase, saved, now)
    except Failure as failure:
        raise Failure(f"kill {number}, {name} while in {phase}: {failure}") from None
    return name, phase, saving, kill.workers, code, took, (now or [0])[-1]


def wait_for_aim(kill: Kill, seconds: float, workdir: Path, process: subprocess.Popen) -> None:
    """Waits for the moment that `kill` is drawn for, or until the run is over."""
    begin = time.monotonic()

    def wait(condition: Callable[[], bool]) -> None:
        while process.poll() is None and not condition():
            if time.monotonic() - begin > RUN_SECONDS:
                raise Failure(f"no {kill.aim} has come within {RUN_SECONDS} s")
            time.sleep(0.001)

    def sleep(seconds: float) -> None:
        until = time.monotonic() + seconds
        wait(lambda: time.monotonic() >= until)

    if kill.aim == "step":
        first = phases.last_step(workdir)
        wait(lambda: phases.last_step(workdir) not in (0, first))
        sleep(kill.after * 0.3)
    elif kill.aim == "begin":  # imports, and what is prepared, restored and compiled before the first step
        sleep(kill.after * seconds * WARM / 2)
    elif kill.aim == "resume":  # from when it holds the workdir
        lock = workdir / ".lock"
        wait(lambda: lock.exists() and str(process.pid) in lock.read_text())
        sleep(kill.after * seconds * WARM / 8)
    elif kill.aim == "evaluation":  # it begins when the record of its step is written
        first = phases.last_step(workdir)
        target = first
        for _ in range(kill.count):
            wait(lambda after=target: phases.last_step(workdir) > after and is_evaluated(phases.last_step(workdir)))
            target = phases.last_step(workdir)
        sleep(kill.after * 0.1)
    elif kill.aim == "save":
        for _ in range(kill.count):
            known = phases.unfinished(workdir)
            wait(lambda known=known: bool(phases.unfinished(workdir) - known))
        sleep(kill.after * 0.1)
    else:
        wait(lambda: phases.last_step(workdir) == run.STEPS)
        sleep(kill.after * 0.9)


def is_evaluated(step: int) -> bool:
    return step % 8 == 0 or step == run.STEPS  # of 47 steps: 0.1 epochs are 7.86 steps


def check_resumed(said: str, saved: list[int]) -> None:
    """Raises Failure if a start has not gone on from the newest checkpoint that was there, or has found one damaged."""
    found = re.search(r"going on from the checkpoint of step (\d+)", said)
    if found and int(found[1]) != (saved or [0])[-1]:
        raise Failure(f"it went on from step {found[1]}, but step {(saved or [0])[-1]} was saved")
    if not found and saved and re.search(r"^step \d", said, re.MULTILINE):
        raise Failure(f"it began anew, but step {saved[-1]} was saved")


def check_end(kill: Kill, code: int, took: float, said: str, phase: str, saved: list[int], now: list[int]) -> None:
    """Raises Failure unless a start that was killed has ended as promised."""
    # A worker whose trainer is gone while Python starts it says so, in Python's own words.
    at_once = kill.signal == signal.SIGKILL or kill.again is not None
    if "error:" in said or ("Traceback" in said and not at_once):
        raise Failure("it printed an error")
    if saved and (not now or now[-1] < saved[-1]):
        raise Failure(f"the newest checkpoint was of step {saved[-1]}, and now there are {now}")
    stopped = re.search(r"stopped at step (\d+), checkpoint written", said)
    # With the last checkpoint a run leaves its loop, perhaps since it was asked for its phase; a second signal may come
    # after a checkpoint on request.
    in_loop = phase in phases.STOPS_WITH_A_SAVE and now[-1:] != [run.STEPS] and not (kill.again and stopped)
    expected = {STOPPED.get(kill.signal, -kill.signal)}
    if not in_loop:  # without a handler the signal itself ends the process; a shell reports the same code
        expected.add(-kill.signal)
    if code not in expected:
        raise Failure(f"it ended with code {code}, expected one of {sorted(expected)}")
    if kill.again and took > kill.again + AT_ONCE_SECONDS:
        raise Failure(f"it took {took - kill.again:.1f} s from the second signal to the exit")
    if stopped and now[-1] != int(stopped[1]):
        raise Failure(f"it stopped at step {stopped[1]}, but the newest checkpoint is of step {now[-1]}")
    if kill.signal in STOPPED and not kill.again and in_loop and not stopped:
        raise Failure("it stopped without a checkpoint")


def tail(log: Path) -> str:
    """Returns the last lines of a log."""
    return "\n".join(f"  | {line}" for line in log.read_text(errors="replace").splitlines()[-12:])
