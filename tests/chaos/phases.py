"""In which phase a run is: asked of the process itself, and of its folder of checkpoints."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

from tests.chaos.run import ROOT

PHASES = ("imports", "preparation", "compilation", "restoring", "step", "evaluation", "save", "end")

# A request to stop in one of these is answered by a checkpoint and 128 + N. Before the loop, no handler is there for
# SIGTERM and SIGUSR1, and 'compilation' may be that of the initial state.
STOPS_WITH_A_SAVE = ("step", "evaluation", "save")

ASK_SECONDS = 0.3  # it answers within milliseconds, unless it has just ended

FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)

# A phase is that of the first row of which the stack has a function of this file.
ROWS = (
    ("imports", "importlib._bootstrap", "_find_and_load"),
    ("evaluation", "training/evaluation.py", "evaluate"),
    ("save", "training/checkpoint.py", "save"),
    ("save", "training/checkpoint.py", "check_saves"),
    ("restoring", "training/checkpoint.py", "restore_state"),
    ("restoring", "training/checkpoint.py", "open_manager"),
    ("compilation", "_src/compiler.py", "compile_or_get_cached"),
    ("end", "train.py", "show_results"),
)


def lines(*texts: str) -> list[int]:
    source = (ROOT / "train.py").read_text().splitlines()
    return [next(number for number, line in enumerate(source, 1) if text in line) for text in texts]


def ask(process: subprocess.Popen, answers: Path) -> str:
    """Returns the phase of a process that was started with CHAOS_STACK=`answers`."""
    if not answers.exists():  # Python itself is starting
        return "imports"
    before = answers.stat().st_size
    process.send_signal(signal.SIGUSR2)
    text, deadline = "", time.monotonic() + ASK_SECONDS
    while time.monotonic() < deadline:
        last, text = text, answers.read_bytes()[before:].decode(errors="replace")
        if text and text == last:
            break
        time.sleep(0.001)
    return of_stack(text)


def of_stack(text: str) -> str:
    """Returns the phase of a stack, as `faulthandler` writes it: the most recent call first."""
    frames = FRAME.findall(text)
    for phase, file, function in ROWS:
        if any(path.rstrip(">").endswith(file) and name == function for path, _, name in frames):
            return phase
    loop, finish = lines("for step in range(first_step", "# Finish.")
    for i, (path, line, name) in enumerate(frames):
        if path.endswith("train.py") and name == "train":
            if i and frames[i - 1][2] == "result":  # of the thread that compiles
                return "compilation"
            return "step" if loop <= int(line) < finish else "preparation" if int(line) < loop else "end"
    # Stacks are cut after 100 calls: only tracing, in the preparation, is so deep.
    return "preparation" if len(frames) >= 100 or any(name == "main" for _, _, name in frames) else "end"


def unfinished(workdir: Path) -> set[tuple[str, int]]:
    """Returns the checkpoints that are being written, or were when a run was killed, by name and inode."""
    try:
        found = [path for path in (workdir / "checkpoints").iterdir() if not path.name.isdecimal()]
        return {(path.name, path.stat().st_ino) for path in found}
    except FileNotFoundError:  # one has just got its name
        return set()


def last_step(workdir: Path) -> int:
    """Returns the step of the newest record, 0 without one."""
    try:
        with open(workdir / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            found = re.findall(rb'^\{"step": (\d+),.*\}$', file.read(), re.MULTILINE)
    except FileNotFoundError:
        return 0
    return int(found[-1]) if found else 0
