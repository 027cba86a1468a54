"""Files of a run: written whole or not at all, which no power cut undoes; an error is a line that names the file."""

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from xception_flax.text.errors import UserError


@contextlib.contextmanager
def file_errors(path: Path, what: str) -> Iterator[None]:
    """Makes one line of what the file system refuses within: which file, and why.

    Args:
      path: of the file that is read or written.
      what: it cannot be: 'read' or 'written'.

    Raises:
      ValueError: an OSError was raised.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be {what}: {error.strerror or error}.") from error


def write_whole(path: Path, content: Iterable[bytes]) -> None:
    """Writes a file whole or not at all: all of it is on the disk before it takes the name.

    Raises:
      ValueError: it cannot be written; what had the name before still has it.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with file_errors(path, "written"):
            with partial.open("wb") as file:
                file.writelines(content)
            sync(partial)
            os.replace(partial, path)
            sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def check_kind(path: Path, *, folder: bool = False, access: int = os.R_OK | os.W_OK) -> None:
    """Raises ValueError where there is something else of that name than a file, or folder, that can be used.

    Args:
      path: where nothing may be as well.
      folder: whether it is to be one.
      access: that is needed to a file, as for `os.access`.
    """
    if not os.path.lexists(path):
        return
    expected = "folder" if folder else "file"
    if not (path.is_dir() if folder else path.is_file()):
        found = "a link to nothing" if not path.exists() else "a folder" if path.is_dir() else f"no {expected}"
        raise UserError(f"{path} is {found}, expected a {expected} or nothing; move it away.")
    if not os.access(path, access | (os.W_OK | os.X_OK if folder else 0)):
        needed = "read and written" if folder or access & os.W_OK else "read"
        raise UserError(f"{path} cannot be {needed} by this user; change its permissions or its owner.")


# On the disk ---------------------------------------------------------------------------------------


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


def forget(folder: Path) -> None:
    """Drops from memory what the disk has of the files below `folder`, so that reading them reads the disk."""
    if not hasattr(os, "posix_fadvise"):  # macOS
        return
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
