"""The host's memory allocator, set for arrays as large as a network on a CPU has."""

import ctypes
import os
import re
import sys
from pathlib import Path

# Of malloc.h: parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Has the process keep the memory that it frees, instead of giving it back to the system each time.

    By default glibc maps each large array anew and unmaps it when it is freed, and the kernel clears every
    page again at its first touch: two fifths of a training step on a CPU (benchmarks/README.md). All threads
    allocate from one heap, where free memory of one is of use to the next. The process keeps its peak.

    As the environment variables MALLOC_MMAP_MAX_=0, MALLOC_TRIM_THRESHOLD_=1000000000000 and MALLOC_ARENA_MAX=1 before
    a start have it, which other frameworks gain from too.

    Returns:
      Whether it took effect: on Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt  # glibc's name; musl has another, and no mallopt
    except (OSError, AttributeError):
        return False
    return all([mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, -1), mallopt(_M_ARENA_MAX, 1)])


def free_memory_bytes() -> int:
    """Memory of this host that is free, in bytes, as far as Linux and a container's limit say; elsewhere all of it."""
    try:
        available = int(re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024
    except (OSError, TypeError):
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(available, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # there is none: 'max'
        return available


def release_free_memory() -> bool:
    """Gives the system back what is free now, once: to be called when a large program has run for the first time.

    Its compilation leaves garbage, and what lives on from the first run (threads, caches) lies above its
    temporary memory, which the second run then cannot take again: without this a training step of 2.6 GB
    temporary memory keeps 2.6 GB more than it uses, for good.

    Returns:
      Whether there was something to release.
    """
    try:
        return bool(ctypes.CDLL("libc.so.6").malloc_trim(0)) if sys.platform.startswith("linux") else False
    except (OSError, AttributeError):
        return False
