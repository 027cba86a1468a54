"""Starts a command again when it ends by something that may pass: a killed process, a lost device, a dead host."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

from xception_flax.host import parents, signals
from xception_flax.text.counting import counted
from xception_flax.text.errors import TRY_AGAIN

FIRST_WAIT, LONGEST_WAIT = 2.0, 120.0  # seconds before a start; each is twice as long as the one before

PASSED_ON = (*signals.REQUESTS, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


def run(command: Sequence[str], restarts: int, progress: Callable[[], int]) -> int:
    """Runs a command until it succeeds, is stopped, fails for good, or has failed too often.

    It is started again after a signal that nobody sends to stop it (SIGKILL, SIGSEGV, SIGABRT), an exception (code 1)
    and `TRY_AGAIN`; not after a user's mistake or a full disk (code 2), and not once this process was told to stop.
    Signals that ask it to stop are passed on to it. If this process is killed, a command that calls
    `parents.end_with_named` is asked to stop.

    Args:
      command: program and arguments.
      restarts: how often it is started again without progress in between.
      progress: returns a number that grows with what is safe, such as the step of the newest checkpoint.

    Returns:
      The exit code of the last start; 128 + N if signal N ended it.
    """
    failures, reached = 0, progress()
    with _passed_on() as told:
        while True:
            code = told.wait(subprocess.Popen(command, start_new_session=True, env=parents.named()))
            if told.signal is not None or not may_pass(code):
                break
            before, reached = reached, progress()
            failures = 1 if reached > before else failures + 1
            if failures > restarts:
                of = f"after {counted(restarts, 'start')} without a new checkpoint"
                _say(f"the run ended with {_named(code)}, {of}: not started again; the same command goes on")
                break
            seconds = min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT)
            of = f"start {failures} of {restarts} without a new checkpoint"
            _say(f"the run ended with {_named(code)}; {of}, in {seconds:g} s")
            if told.stopped.wait(seconds):
                return 128 + told.signal
    return code if code >= 0 else 128 - code


def may_pass(code: int) -> bool:
    """Whether the same command may succeed where it ended with this code, negative for a signal."""
    return code in (1, TRY_AGAIN) or (code < 0 and -code not in PASSED_ON)


class _Told:
    """Which signal this process got, and the process that it goes to."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.stopped = threading.Event()
        self._process: subprocess.Popen | None = None

    def wait(self, process: subprocess.Popen) -> int:
        self._process = process
        if self.signal is not None:  # it came just before
            process.send_signal(self.signal)
        return process.wait()

    def handle(self, number: int, frame: object) -> None:
        self.signal = number
        self.stopped.set()
        if self._process is not None:
            self._process.send_signal(number)


@contextlib.contextmanager
def _passed_on() -> Iterator[_Told]:
    """Passes signals on to the process that is waited for, which is in a session of its own and gets each once."""
    told = _Told()
    heeded = [number for number in PASSED_ON if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, told.handle) for number in heeded}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _named(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _say(text: str) -> None:
    print(f"{os.path.basename(sys.argv[0])}: {text}", file=sys.stderr, flush=True)
