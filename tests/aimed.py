"""Trains as train.py does, and strikes itself at a moment that nobody outside could aim at.

python tests/aimed.py MOMENT ARGUMENTS of train.py
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import train
from shell import children
from xception_flax.commands import cli
from xception_flax.host.watchdog import Watchdog
from xception_flax.runs.progress import RunProgress
from xception_flax.training import checkpoint

HELD_SECONDS = 1.5  # all processes wait so long there, so that the notice reaches all


def ask_here() -> None:
    """Asks process 0 to stop, and holds all processes for a while."""
    if "--process-id=0" in sys.argv:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(HELD_SECONDS)


def in_a_save() -> None:
    begin = checkpoint._Handler.async_save
    begun: list[int] = []

    async def async_save(*arguments: Any, **options: Any) -> Any:
        begun.append(1)
        if len(begun) == 1:
            ask_here()
        return await begin(*arguments, **options)

    checkpoint._Handler.async_save = async_save


def before_the_first_step() -> None:
    resume = train.begin_or_resume

    def begin_or_resume(*arguments: Any) -> Any:
        ask_here()
        return resume(*arguments)

    train.begin_or_resume = begin_or_resume


def in_an_evaluation(number: int) -> None:
    """Sends `number` to the readers of the evaluation after step 11, and after SIGSTOP asks this process to stop."""
    again, at = Watchdog.again, "the evaluation after step 11"
    signs: list[str] = []

    def strike(watchdog: Watchdog, *batch: object) -> None:
        again(watchdog)
        signs.append(watchdog._sign[0])
        if signs.count(at) == 1:  # before the readers have all batches ready
            for reader in sorted(children(os.getpid()))[-2:]:  # the newest
                os.kill(reader, number)
            if number == signal.SIGSTOP:
                shell = f"sleep 2; kill -TERM {os.getpid()}"
                subprocess.Popen(["sh", "-c", shell])

    Watchdog.again = strike


def where_the_input_ends(*, renamed: bool) -> None:
    """Kills the readers at step 3; then renames the workdir, or asks to stop in the save that follows."""
    advance, save = RunProgress.advance, checkpoint.save
    workdir = Path(sys.argv[sys.argv.index("--workdir") + 1])

    def strike(report: RunProgress, step: int) -> None:
        advance(report, step)
        if step == 3:
            for reader in children(os.getpid()):
                os.kill(reader, signal.SIGKILL)
            if renamed:
                workdir.rename(f"{workdir}-elsewhere")

    def asked(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save(*arguments)

    RunProgress.advance = strike
    checkpoint.save = asked


MOMENTS = {
    "save": in_a_save,
    "begin": before_the_first_step,
    "readers killed": lambda: in_an_evaluation(signal.SIGKILL),
    "readers killed, asked in the save": lambda: where_the_input_ends(renamed=False),
    "readers killed, workdir renamed": lambda: where_the_input_ends(renamed=True),
    "readers stopped": lambda: in_an_evaluation(signal.SIGSTOP),
}

if __name__ == "__main__":
    MOMENTS[sys.argv.pop(1)]()
    cli.run(train.main)
