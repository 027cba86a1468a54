"""The cache of compiled programs: a folder of the user's that outlives the process."""

import contextlib
import functools
import glob
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jaxlib

MAX_BYTES = 2 * 2**30
MIN_FREE_BYTES = 2**30  # of the disk; a cache must not fill it


def enable() -> Path | None:
    """Sets up JAX's cache of compiled programs.

    Call it before anything is compiled, and after the processes of a run have been connected.

    JAX's own settings come first: JAX_COMPILATION_CACHE_DIR names another folder; an empty name or
    JAX_ENABLE_COMPILATION_CACHE=false turns the cache off. Where the folder cannot be written or the disk is nearly
    full there is no cache, and no error.

    The key of an entry covers the program, the versions, the flags and the features of the devices and the CPU, so
    many machines can share one folder.

    With several processes, all must run the same program, and only the first writes entries. On CPUs there is no
    cache then: JAX's key differs by process there, so the first would read what all others compile, and a program
    that was read starts its collectives in another order. On other devices the cache is used only where JAX was given
    a folder, which all hosts must share: the user's own folder may differ between hosts.

    Returns:
      The folder of the cache, or None without one.
    """
    if not jax.config.jax_enable_compilation_cache:
        return None
    if getattr(warnings.showwarning, "func", None) is not _mend:
        warnings.showwarning = functools.partial(_mend, warnings.showwarning)
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # By default JAX leaves out programs that compile within a second. There are many: the first checkpoint on
        # eight devices alone takes two hundred, which compile in eight seconds and take 2 MB.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if (chosen := jax.config.jax_compilation_cache_dir) is not None:
        if not chosen:  # from an empty name JAX would make folders in the working directory
            jax.config.update("jax_compilation_cache_dir", None)
        return Path(chosen) if chosen else None
    if jax.process_count() > 1:
        return None
    if sys.platform == "darwin" and jaxlib.version.__version_info__ < (0, 10):
        return None  # reading a large program from the cache crashes there
    try:
        folder = _default_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # only for this user: its content is executed
        if not os.access(folder, os.W_OK | os.X_OK) or shutil.disk_usage(folder).free < MIN_FREE_BYTES:
            return None
        if jax.config.jax_compilation_cache_max_size == -1:
            prune(folder, MAX_BYTES)
    except (OSError, RuntimeError):  # RuntimeError: no home folder
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


def _mend(show: Callable[..., None], message: Warning | str, *args: Any, **options: Any) -> None:
    """Shows a warning. Where it is JAX's of an entry that cannot be read, removes the entry: JAX writes it anew then.

    A process that is killed while it writes leaves a part of an entry. JAX itself keeps it, and would warn and compile
    at every start.
    """
    found = re.match(r"Error reading persistent compilation cache entry for '([^'/]+)'", str(message))
    folder = jax.config.jax_compilation_cache_dir
    if found is None or not folder:
        show(message, *args, **options)
        return
    for entry in Path(folder).glob(f"{glob.escape(found[1])}-*-cache"):  # its key begins with the program's name
        with contextlib.suppress(OSError):
            entry.unlink()


def _default_folder() -> Path:
    caches = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification says to ignore a relative path.
    return (Path(caches) if os.path.isabs(caches) else Path.home() / ".cache") / "xception_flax" / "jax"


def prune(folder: Path, max_bytes: int) -> None:
    """Removes the least recently used entries until at most `max_bytes` are left.

    JAX's own limit (`jax_compilation_cache_max_size`) needs another package and a lock around every read, and it
    refuses all writes for good after a process was killed between two of its files. On Linux the time of the last
    access is precise to a day, which is enough; where it is not kept, the age of an entry counts.
    """
    entries = []
    for path in folder.glob("*-cache"):
        try:
            stat = path.stat()
        except OSError:  # another process has removed it
            continue
        entries.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
    excess = sum(size for _, size, _ in entries) - max_bytes
    for _, size, path in sorted(entries):
        if excess <= 0:
            return
        path.unlink(missing_ok=True)
        excess -= size
