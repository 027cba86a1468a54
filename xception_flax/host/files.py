"""Files of a run: written whole or not at all, even in a power cut. An error is one line that names the file."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from xception_flax.text.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)  # what a full disk, and a full quota, say


@contextlib.contextmanager
def file_errors(path: Path, what: str) -> Iterator[None]:
    """Turns an OSError inside the block into one line that names the file and the reason.

    Args:
      path: the file that is read or written.
      what: is done to it, such as 'read' or 'written'.

    Raises:
      UserError: the block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        full = "; make room, then give the same command" if error.errno in FULL else ""
        raise UserError(f"{path} cannot be {what}: {error.strerror or error}{full}.") from error


def write_whole(path: Path, content: Iterable[bytes]) -> None:
    """Writes a file whole or not at all: it gets its name when all of it is on the disk.

    Raises:
      UserError: it cannot be written. A file that had this name before is unchanged.
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


def check_new(path: Path) -> None:
    """Raises UserError unless `path` does not exist yet and the folder for it does."""
    if os.path.lexists(path):
        raise UserError(f"{path} is there already; nothing was written. Remove it, or take another name.")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path.absolute().parent} is no folder; make it, or take another one for {path.name}.")


@contextlib.contextmanager
def beside(output: Path) -> Iterator[Path]:
    """A place in the same folder, of the same suffix, which becomes `output` when all of it is on the disk.

    Raises:
      UserError: it cannot be written. After an error, any error, there is no `output`.
    """
    with file_errors(output, "written"):
        scratch = Path(tempfile.mkdtemp(prefix=".", suffix=".partial", dir=output.absolute().parent))
        try:
            partial = scratch / output.name
            yield partial
            (sync_tree if partial.is_dir() else sync)(partial)
            os.rename(partial, output)
            sync(output.absolute().parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def check_kind(path: Path, *, folder: bool = False, access: int = os.R_OK | os.W_OK) -> None:
    """Raises UserError unless `path` is a file (or a folder) that can be used, or does not exist.

    Args:
      path: of the file or folder.
      folder: expect a folder, not a file.
      access: what is needed of a file, as for `os.access`. A folder must also be writable.
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


def check_writable(path: Path) -> None:
    """Raises UserError unless a file can be written to `path`. It changes nothing."""
    try:
        is_new = not path.exists()
        path.open("ab").close()
        if is_new:
            path.resolve().unlink()  # the file itself, if `path` is a link to it
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}; name another file.") from None


# On the disk ---------------------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Waits until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems do not support it for folders. There is nothing to wait for then.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Waits until `folder` and all files and folders below it are on the disk."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            sync(path)
    sync(folder)


def forget(folder: Path) -> None:
    """Drops the files below `folder` from the system's cache, so that reading them reads the disk."""
    if not hasattr(os, "posix_fadvise"):  # macOS
        return
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
