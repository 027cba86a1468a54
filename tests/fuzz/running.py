"""Gives inputs to worker processes, and tells what became of each. A crash or a hang is a result like others."""

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
SECONDS = 180  # after which a worker is ended; in the time of the processor an input has `worker.CPU_SECONDS`
START_SECONDS = 120  # the first input of a worker imports the program, and makes the originals


class Input(NamedTuple):
    """An input by its seed, or one that is kept in a folder."""

    kind: str
    seed: int = 0
    path: Path | None = None

    @property
    def request(self) -> dict[str, Any]:
        return {"kind": self.kind} | ({"seed": self.seed} if self.path is None else {"path": str(self.path)})


class Result(NamedTuple):
    """What became of an input.

    Attributes:
      outcome: 'accepted', 'refused' or 'finding'.
      message: of the error; '' where it was accepted.
      seconds: that it took.
      digest: SHA-256 of its files.
      folder: where it was.
    """

    input: Input
    outcome: str
    message: str
    seconds: float
    digest: str = ""
    folder: str = ""


class _Worker:
    """A process, with a folder of its own."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.scratch = Path(tempfile.mkdtemp(prefix="fuzz_", dir=memory))
        self.errors = (self.scratch / "stderr").open("w+")
        self.process: subprocess.Popen[str] | None = None
        self.input: Input | None = None
        self.until = 0.0
        self._fresh = True

    def give(self, item: Input) -> None:
        if self.process is None:
            environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "PYTHONHASHSEED": "0"}
            self.errors.truncate(0)
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz.worker", str(self.scratch)],
                cwd=ROOT,
                env=environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                start_new_session=True,
            )
            self._fresh = True
        self.input, self.until = item, time.monotonic() + self.seconds + START_SECONDS * self._fresh
        self._fresh = False
        with contextlib.suppress(BrokenPipeError):  # it has just crashed; its answer says so
            self.process.stdin.write(json.dumps(item.request) + "\n")
            self.process.stdin.flush()

    def answer(self) -> Result:
        """Called when there is an answer, or the process has ended."""
        line = self.process.stdout.readline()
        if line.endswith("\n"):
            return Result(self.input, **json.loads(line))
        code = self.process.wait()
        name = signal.Signals(-code).name if code < 0 else f"code {code}"
        self.errors.seek(0)
        said = self.errors.read()[-1500:]
        self.end()
        return Result(self.input, "finding", f"the process ended with {name}: {said}", 0.0)

    def late(self) -> Result:
        self.end()
        return Result(self.input, "finding", f"it was not done after {self.seconds:g} s", self.seconds)

    def end(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # with the readers that it started
            self.process.communicate()
            self.process = None

    def close(self) -> None:
        self.end()
        self.errors.close()
        shutil.rmtree(self.scratch, ignore_errors=True)


def run(
    inputs: Iterable[Input], num_workers: int, keep: Path | None = None, seconds: float = SECONDS
) -> Iterator[Result]:
    """Yields what became of each input, in the order in which they end.

    Args:
      inputs: to try; taken one by one.
      num_workers: processes at the same time.
      keep: the folder where the files of a finding are kept, in KIND/SEED.
      seconds: after which an input is a finding.
    """
    waiting, workers = iter(inputs), [_Worker(seconds) for _ in range(num_workers)]
    idle, selector = list(workers), selectors.DefaultSelector()
    try:
        while True:
            while idle and (item := next(waiting, None)) is not None:
                worker = idle.pop()
                worker.give(item)
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            if len(idle) == len(workers):
                return
            ready = [key.data for key, _ in selector.select(timeout=1.0)]
            late = [w for w in workers if w not in idle and w not in ready and time.monotonic() > w.until]
            for worker in (*ready, *late):
                selector.unregister(worker.process.stdout)
                result = worker.late() if worker in late else worker.answer()
                if result.outcome == "finding" and keep is not None and result.input.path is None:
                    place = keep / result.input.kind / str(result.input.seed)
                    shutil.copytree(worker.scratch / "input", place, dirs_exist_ok=True)
                idle.append(worker)
                yield result
    finally:
        for worker in workers:
            worker.close()
        selector.close()
