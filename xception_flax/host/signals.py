"""Stopping by signal. Imports next to nothing: a command handles Ctrl-C by it before it imports all else."""

import os
import signal
import threading
import time
from types import FrameType
from typing import NoReturn

# `timeout` and some job managers signal a process, and at once its whole group: to the process that is
# twice, and meant once.
ECHO_SECONDS = 0.1


def stop_at_once(number: int, frame: FrameType | None = None) -> NoReturn:
    """Handles a signal by ending the process there and then: code 128 + N, no traceback.

    An exception would be lost where it comes into a callback, and can end in a crash where it comes
    into native code. What lies on disk is whole at every moment, as for SIGKILL.
    """
    show_cursor = "\x1b[?25h" if os.isatty(2) else ""  # the progress bar hides it
    os.write(2, f"{show_cursor}\ninterrupted\n".encode())
    os._exit(128 + number)


class StopRequest:
    """Whether SIGTERM or Ctrl-C has asked to stop; a context manager.

    The first signal lets the step in hand end and a checkpoint be written; the second stops at
    once. With several processes JAX has its own handler of SIGTERM, in C++, which makes all hosts
    stop at one step: there Ctrl-C is handed to it, and only a second Ctrl-C is seen here.
    """

    def __init__(self, *, several_processes: bool = False) -> None:
        self.signal: int | None = None
        self._numbers = (signal.SIGINT,) if several_processes else (signal.SIGTERM, signal.SIGINT)
        self._old: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        # Python runs handlers between two lines of Python, and compiling is one call that may take minutes: only a
        # thread, told by the pipe, sees a second signal in it.
        told, self._tell = os.pipe()
        os.set_blocking(self._tell, False)
        threading.Thread(target=self._watch, args=(told,), daemon=True).start()
        self._old_tell = signal.set_wakeup_fd(self._tell)
        for number in self._numbers:
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_tell)
        os.close(self._tell)  # ends the thread

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None and signal.SIGTERM not in self._numbers:
            os.kill(os.getpid(), signal.SIGTERM)
        self.signal = number

    def _watch(self, told: int) -> None:
        with open(told, "rb", buffering=0) as pipe:
            numbers = (byte[0] for byte in iter(lambda: pipe.read(1), b""))
            requests = (number for number in numbers if number in self._numbers)
            if next(requests, None) is None:
                return
            first = time.monotonic()
            for second in requests:
                if time.monotonic() - first > ECHO_SECONDS:
                    stop_at_once(second)
