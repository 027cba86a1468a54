"""A lock on a file, which keeps other processes out of the folder that it stands for."""

import fcntl
from typing import IO


def try_lock(file: IO) -> bool:
    """Locks an open file until it is closed; False where another process holds the lock.

    The kernel releases the lock when the process ends, in whatever way. On a file system without locks, as many shared
    ones are, nobody is kept out.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no such locks here
        pass
    return True
