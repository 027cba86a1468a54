"""Ties a process to the one that started it, so that it does not live on alone, where Linux can."""

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

PARENT = "XCEPTION_FLAX_PARENT"  # in the environment of a process that is to end with its parent: the parent's number

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def named() -> dict[str, str]:
    """Returns the environment of a process that this one starts, and that calls `end_with_named`."""
    return os.environ | {PARENT: str(os.getpid())}


def end_with_named() -> None:
    """Asks for SIGTERM when the parent that the environment names has ended; without a name it does nothing."""
    if (parent := os.environ.pop(PARENT, "")).isdecimal():
        end_with(int(parent), signal.SIGTERM)


def end_spawned() -> None:
    """Kills the processes that this one has started by `multiprocessing`, before it ends itself without waiting.

    One that is just being started would else print a traceback, because it finds nobody who tells it what to do.
    """
    spawned: list[str] = []
    for listed in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            spawned += listed.read_text().split()
    for child in spawned:
        with contextlib.suppress(OSError):  # it has ended
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(int(child), signal.SIGKILL)


def end_with(parent: int, number: int) -> None:
    """Sends signal `number` to this process as soon as its parent, process `parent`, has ended.

    A parent that has ended before this call counts too.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os.kill(os.getpid(), number)
