"""Python imports this at its start if its folder is on the path: the process then says where it is when asked.

On SIGUSR2 the stack of the main thread is appended to the file that CHAOS_STACK names, by C code, so at any moment. On
the signal CHAOS_RAISE a ValueError is raised in the main thread.
"""

import faulthandler
import os
import signal

if path := os.environ.pop("CHAOS_STACK", None):  # worker processes must not have it
    # At its end Python takes faulthandler's handler away, and what was before is there again: by default, the signal
    # would then kill the process.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    # A descriptor, which stays open to the end of the process. The file gets its name when there is who answers.
    answers = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    faulthandler.register(signal.SIGUSR2, answers, all_threads=False)
    os.rename(f"{path}.new", path)

if number := os.environ.pop("CHAOS_RAISE", None):

    def fail(number: int, frame: object) -> None:
        raise ValueError("an error that one host alone has")

    signal.signal(int(number), fail)
