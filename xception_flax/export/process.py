"""Runs a program in a process of its own, away from this one's accelerators and libraries."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

TIMEOUT_SECONDS = 1800

# This process may hold all memory of an accelerator.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}

# So that it does not live on, if this process is killed. 1 is PR_SET_PDEATHSIG, linux/prctl.h.
_TIED = """\
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != {parent}:
        os._exit(1)
"""


def run(program: str, *arguments: Path) -> str | None:
    """Returns None, or where the program fails the line that says why: the first with 'error: ', or the last.

    Args:
      program: in Python, with what this Python can import, but for this project.
      arguments: of the program; its `sys.argv` has them absolute.
    """
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                _TIED.format(parent=os.getpid()) + program,
                *(path.absolute() for path in arguments),
            ],
            cwd=folder,
            env=os.environ | ENVIRONMENT,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    if not done.returncode:
        return None
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    # TensorFlow's converter goes on for pages, with places in front that are nobody's.
    found = next((line.rpartition(" error: ")[2] for line in lines if " error: " in line), lines[-1])
    return found.strip()[:300]
