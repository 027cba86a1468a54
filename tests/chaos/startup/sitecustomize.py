"""Python imports this at its start if its folder is on the path: the process then says where it is when asked.

On SIGUSR2 the stack of the main thread is appended to the file that CHAOS_STACK names, by C code, so at any moment. On
the signal CHAOS_RAISE a ValueError is raised in the main thread.
"""

import faulthandler
import os
import signal

if path := os.environ.pop("CHAOS_STACK", None):  # worker processes must not have it
    # It stays open to the end of the process, as faulthandler needs it.
    faulthandler.register(signal.SIGUSR2, open(path, "a"), all_threads=False)  # noqa: SIM115

if number := os.environ.pop("CHAOS_RAISE", None):

    def fail(number: int, frame: object) -> None:
        raise ValueError("an error that one host alone has")

    signal.signal(int(number), fail)
