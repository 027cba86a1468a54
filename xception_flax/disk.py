"""Writing that a power cut does not undo: a file counts as written when the disk has it, and its folder too."""

import errno
import os
from pathlib import Path


def sync(path: Path) -> None:
    """Waits until the disk has what is in a file, or the names that are in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems know no such call for folders: there is nothing to wait for there.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Waits until the disk has all files and folders in and below `folder`, and itself."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            sync(path)
    sync(folder)


def replace_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all, whatever happens meanwhile."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def forget(folder: Path) -> None:
    """Drops from memory what the disk has of the files below `folder`, so that reading them reads the disk."""
    if not hasattr(os, "posix_fadvise"):  # macOS
        return
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
