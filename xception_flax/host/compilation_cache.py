"""Compiled programs are kept from one process to the next, in a folder of the user's."""

import os
import shutil
import sys
from pathlib import Path

import jax
import jaxlib

MAX_BYTES = 2 * 2**30
MIN_FREE_BYTES = 2**30  # on the disk: the last of it is not for a cache


def enable() -> Path | None:
    """Sets JAX's cache of compiled programs up, before anything is compiled; returns its folder, None for none.

    To be called when the processes of a run have been connected.

    What JAX itself has been told has precedence: JAX_COMPILATION_CACHE_DIR names another folder, and
    JAX_ENABLE_COMPILATION_CACHE=false, or an empty name, switches it off. A cache is never worth an
    error: there is none where the folder cannot be written or the disk is nearly full.

    JAX's key of an entry has the program, the versions, the flags and the features of devices and of
    the CPU, so that one folder serves every machine that shares it.

    The processes of a run must have one program, and only the first writes entries. On CPUs JAX's key is another in
    each process, so that the first would read what all others compile; and a program that was read starts its
    collectives in another order: there several processes have no cache. Elsewhere they have the one that JAX was told
    of, which is to be shared by all; a user's own folder may be another on each host.
    """
    if not jax.config.jax_enable_compilation_cache:
        return None
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # JAX's own second leaves out small programs, and there are many: the first checkpoint of eight devices
        # alone has two hundred, which compile in eight seconds and are 2 MB.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if (chosen := jax.config.jax_compilation_cache_dir) is not None:
        if not chosen:  # JAX would make no cache of an empty name, but folders in the working directory
            jax.config.update("jax_compilation_cache_dir", None)
        return Path(chosen) if chosen else None
    if jax.process_count() > 1:
        return None
    if sys.platform == "darwin" and jaxlib.version.__version_info__ < (0, 10):
        return None  # reading a large program back crashes there
    try:
        folder = _default_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # what is in it is executed: nobody else's business
        if not os.access(folder, os.W_OK | os.X_OK) or shutil.disk_usage(folder).free < MIN_FREE_BYTES:
            return None
        if jax.config.jax_compilation_cache_max_size == -1:
            prune(folder, MAX_BYTES)
    except (OSError, RuntimeError):  # RuntimeError: no home folder
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


def _default_folder() -> Path:
    caches = os.environ.get("XDG_CACHE_HOME", "")
    # By the XDG base directory specification a relative path is to be ignored.
    return (Path(caches) if os.path.isabs(caches) else Path.home() / ".cache") / "xception_flax" / "jax"


def prune(folder: Path, max_bytes: int) -> None:
    """Removes entries, those first that were not used for longest, until at most `max_bytes` are left.

    JAX's own limit (`jax_compilation_cache_max_size`) takes a further package and a lock around every
    read, and refuses all writes for good after a process was killed between two of its files. The time
    of the last access is good enough to a day on Linux; where it is not kept, age counts.
    """
    entries = []
    for path in folder.glob("*-cache"):
        try:
            stat = path.stat()
        except OSError:  # another process was faster
            continue
        entries.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
    excess = sum(size for _, size, _ in entries) - max_bytes
    for _, size, path in sorted(entries):
        if excess <= 0:
            return
        path.unlink(missing_ok=True)
        excess -= size
