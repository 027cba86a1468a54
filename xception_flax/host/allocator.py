"""The host's memory: an allocator set for large arrays, and how much is free."""

import ctypes
import os
import re
import sys
from pathlib import Path

# Parameters of mallopt(3), from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Makes the process keep the memory that it frees, instead of returning it to the system each time.

    By default glibc maps each large array anew and unmaps it when it is freed. The kernel then clears every page
    at its first use, which takes two fifths of a training step on a CPU (benchmarks/README.md). All threads share
    one heap, so that one can use what another has freed. The process keeps its peak memory until it ends.

    The environment variables MALLOC_MMAP_MAX_=0, MALLOC_TRIM_THRESHOLD_=1000000000000 and MALLOC_ARENA_MAX=1 do the
    same; other frameworks gain from them too.

    Returns:
      Whether it took effect, as it does on Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt  # glibc's name; musl has another, and no mallopt
    except (OSError, AttributeError):
        return False
    return all([mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, -1), mallopt(_M_ARENA_MAX, 1)])


def free_memory_bytes() -> int:
    """Returns the free memory of this host in bytes: on Linux at most the container's limit, elsewhere all memory.

    Example:
      >>> from xception_flax import allocator
      >>> hundred_photos = 100 * 299 * 299 * 3
      >>> allocator.free_memory_bytes() > hundred_photos
      True
    """
    try:
        found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    available = int(found[1]) * 1024 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(available, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no limit: no such file, or 'max'
        return available


def release_free_memory() -> bool:
    """Returns free memory to the system. Call it once, after a large program has run for the first time.

    Compiling leaves garbage. What the first run allocates for good (threads, caches) lies above its temporary memory,
    and the second run then cannot reuse that. Without this call, a training step with 2.6 GB of temporary memory
    holds 2.6 GB more than it uses, for good.

    Returns:
      Whether there was something to release.
    """
    try:
        return bool(ctypes.CDLL("libc.so.6").malloc_trim(0)) if sys.platform.startswith("linux") else False
    except (OSError, AttributeError):
        return False
