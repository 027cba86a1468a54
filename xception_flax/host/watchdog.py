"""Finds a run that stands still, writes what each of its threads does there, and ends it on request."""

import contextlib
import datetime
import faulthandler
import os
import threading
import time
from pathlib import Path

from xception_flax.host import processes

LOOKS = 20  # in the time that is allowed
WRITE_SECONDS = 20.0  # that the file may take: its file system may be what stands still


class Watchdog:
    """A context manager with a thread that looks whether the run moves.

    After `minutes` without a sign of it the thread writes the stack of every thread of this process to a file, and on
    standard error what was being waited for: once for each time that the run stands still.
    """

    def __init__(self, minutes: float, path: Path, *, stop: bool) -> None:
        """Begins to count.

        Args:
          minutes: without a sign.
          path: of the file; later reports are appended.
          stop: whether to end the process then, with exit code `processes.TRY_AGAIN`; of several processes it ends all.
            Files on the disk are whole at every moment.
        """
        self._seconds, self._path, self._stop = 60 * minutes, path, stop
        self._sign = ("the beginning", time.monotonic())
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._left.set()
        self._thread.join()

    def sign(self, waiting_for: str) -> None:
        """Says that the run moves, and what it waits for from now on. It costs nothing to speak of."""
        self._sign = (waiting_for, time.monotonic())

    def again(self, *anything: object) -> None:
        """Says that the run moves, and waits for the next of the same; a callback of any arguments."""
        self.sign(self._sign[0])

    def _watch(self) -> None:
        reported, pause, looked = None, min(self._seconds / LOOKS, threading.TIMEOUT_MAX), time.monotonic()
        while not self._left.wait(pause):
            before, looked = looked, time.monotonic()
            if looked - before > processes.AWAY_LOOKS * pause:  # this process was suspended, or the whole machine
                self.again()
            sign = self._sign
            if sign is reported or time.monotonic() - sign[1] <= self._seconds:
                continue
            reported, sentence = sign, self._write(sign[0])
            if not self._stop:
                _say(f"WARNING: {sentence}. It goes on if that comes; watchdog_action=stop would end it.")
                continue
            message = (
                f"error: {sentence}. The same command goes on from the last checkpoint, if there is one; give more "
                "watchdog_minutes where this takes longer."
            )
            processes.end(processes.TRY_AGAIN, message)
            _say(message)
            os._exit(processes.TRY_AGAIN)

    def _write(self, waiting_for: str) -> str:
        """Writes the stacks; returns a sentence about it."""
        still = f"the run has stood still for {self._seconds:g} seconds, waiting for {waiting_for}"
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        wrong: list[str | None] = []

        def write() -> None:
            try:
                with open(self._path, "a") as file:
                    print(f"\n{now}, process {os.getpid()}: {still}", file=file, flush=True)
                    faulthandler.dump_traceback(file, all_threads=True)
                wrong.append(None)
            except OSError as error:
                wrong.append(error.strerror)

        writing = threading.Thread(target=write, daemon=True)
        writing.start()
        writing.join(WRITE_SECONDS)
        reason = wrong[0] if wrong else "its file system stands still"
        if reason is None:
            return f"{still}; the stack of every thread is in {self._path}"
        faulthandler.dump_traceback(2, all_threads=True)
        return f"{still}; the stack of every thread is above, since {self._path} cannot be written: {reason}"


def _say(text: str) -> None:
    """Prints a line, whatever locks the threads that stand still may hold."""
    behind_bar = "\n" if os.isatty(2) else ""
    with contextlib.suppress(OSError):  # nobody reads it
        os.write(2, f"{behind_bar}{text}\n".encode(errors="backslashreplace"))
