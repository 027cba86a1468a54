"""Stopping by signal. It imports very little, so that a command can handle Ctrl-C before its slow imports."""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

# `timeout` and some job managers signal a process and, at the same moment, its whole group. The process gets the
# signal twice, but one is meant. A second signal within this time is ignored.
ECHO_SECONDS = 0.1

PATIENCE_SECONDS = 5.0  # how long a batch may take after a signal: a disk may stand still

ASKED = "asked to stop: after this step or batch a checkpoint is written; a second signal ends the run without it"
LEFT = "the same command goes on from the last checkpoint that is whole, if there is one"

# What asks a run to save and stop: a terminal, a batch system or a person, and Slurm's notice (`--signal=USR1@120`). A
# batch system sends them to a whole process group.
REQUESTS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))


def stop_at_once(number: int, frame: FrameType | None = None, *, left: str = "") -> NoReturn:
    """Handles a signal by ending the process at once, with code 128 + N and no traceback; `left` is said of its work.

    An exception would be lost inside a callback, and can crash native code. Files on the disk are whole at every
    moment, so ending here is as safe as SIGKILL.
    """
    show_cursor = "\x1b[?25h" if os.isatty(2) else ""  # the progress bar hides it
    with contextlib.suppress(OSError):  # nobody reads it
        if select.select([], [2], [], 0)[1]:  # there is room in the pipe: to wait for it could be for ever
            os.write(2, f"{show_cursor}\ninterrupted{left and f'; {left}'}\n".encode())
    os._exit(128 + number)


def handle_before_imports() -> None:
    """Sets what Ctrl-C does before the imports, which take seconds; for process 1 all of `REQUESTS`.

    The first process of a container is not ended by a signal that it has no handler for.
    """
    for number in REQUESTS if os.getpid() == 1 else (signal.SIGINT,):
        signal.signal(number, stop_at_once)


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """Within, SIGINT and SIGTERM are a KeyboardInterrupt, so that what is half done is removed; then the process ends.

    It ends as `stop_at_once` does, which the second signal calls. For what has little native code in its own process.
    """
    first: list[tuple[int, float]] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if not first:
            first.append((number, time.monotonic()))
            raise KeyboardInterrupt
        if time.monotonic() - first[0][1] > ECHO_SECONDS:
            stop_at_once(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if first:  # whatever the exception became on its way
            stop_at_once(first[0][0])
        for number, handler in before.items():
            signal.signal(number, handler)


class Stopped(Exception):
    """Signal `number` has asked to stop, and what was waited for did not come; `left` says what is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number, self.left = number, ""


class StopRequest:
    """A context manager that records in `signal` which of `REQUESTS` has asked to stop.

    After the first signal the caller can finish its step and save a checkpoint; the second ends the process at once.
    What may wait for ever, and may be broken off, is done within `patience()`.
    With several processes JAX handles SIGTERM itself, in C++, and makes all hosts stop at the same step. There the
    first of the others is passed on to JAX as SIGTERM, and the second ends the process.
    """

    def __init__(self, *, several_processes: bool = False, say: Callable[[str], None] | None = None) -> None:
        """Does nothing yet.

        Args:
          several_processes: whether this is one of several.
          say: shows a line. It is called once, in a thread of its own, when the first signal comes: what is done about
            it may take a while, and who sees nothing asks again, and loses what the first would have saved.
        """
        self.signal: int | None = None
        self._say = say
        self._waiting, self._until = False, 0.0
        self._several = several_processes
        self._numbers = tuple(n for n in REQUESTS if not several_processes or n != signal.SIGTERM)
        self._old: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        # Python runs handlers only between two of its own instructions, and compiling is one call that may take
        # minutes. A thread that reads the wakeup pipe sees a second signal during that call.
        told, self._tell = os.pipe()
        os.set_blocking(self._tell, False)
        self._watcher = threading.Thread(target=self._watch, args=(told,), daemon=True)
        self._watcher.start()
        self._old_tell = signal.set_wakeup_fd(self._tell)
        for number in self._numbers:
            self._old[number] = signal.signal(number, self._handle)
        if hasattr(signal, "SIGALRM"):
            self._old[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._break_off)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.set_wakeup_fd(self._old_tell)
        os.close(self._tell)  # ends the thread, which may be sending SIGALRM
        self._watcher.join()
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None and self._several:
            os.kill(os.getpid(), signal.SIGTERM)
        self.signal, self._until = number, time.monotonic() + PATIENCE_SECONDS
        if self._waiting:
            signal.setitimer(signal.ITIMER_REAL, PATIENCE_SECONDS)

    @contextlib.contextmanager
    def patience(self) -> Iterator[None]:
        """A block that is broken off if it goes on for `PATIENCE_SECONDS` after a signal.

        One of several processes cannot stop alone, so there the block goes on.

        Raises:
          Stopped: the block was broken off.
        """
        self._waiting = not self._several and hasattr(signal, "setitimer")
        if self._waiting and self.signal is not None:  # it came since the caller has asked
            signal.setitimer(signal.ITIMER_REAL, PATIENCE_SECONDS)
        try:
            yield
        finally:
            if self._waiting:
                self._waiting = False
                if self.signal is not None:
                    signal.setitimer(signal.ITIMER_REAL, 0)

    def _break_off(self, number: int, frame: FrameType | None) -> None:
        # It also comes from `_watch`, at once, and its handler may run before that of the request.
        if self._waiting and self.signal is not None and time.monotonic() >= self._until - ECHO_SECONDS:
            raise Stopped(self.signal)

    def _watch(self, told: int) -> None:
        with open(told, "rb", buffering=0) as pipe:
            numbers = (byte[0] for byte in iter(lambda: pipe.read(1), b""))
            requests = (number for number in numbers if number in self._numbers)
            if next(requests, None) is None:
                return
            first = time.monotonic()
            if self._say is not None:  # which waits while nobody reads, and a second signal must not
                threading.Thread(target=self._say, args=(ASKED,), daemon=True).start()
            # The main thread may hold requests back, as while processes that read are started, and wait for a lock or a
            # pipe: Python handles the request when that is interrupted.
            if hasattr(signal, "SIGALRM"):
                signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)
            for second in requests:
                if time.monotonic() - first > ECHO_SECONDS:
                    stop_at_once(second, left=LEFT if self._say is not None else "")
