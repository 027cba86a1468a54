"""A process that computes for the benchmark, and its handle: lines of JSON over pipes, a reply to each request.

A worker is stopped (SIGSTOP, with all of its threads and children) whenever it has nothing to do. Thread pools wait
for their next task by spinning, some for milliseconds and some without end, and while one contender is timed no other
may run.

It needs Linux: for CPU affinity, peak memory, and the end of a process with its parent.
"""

import contextlib
import ctypes
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parent.parent

# Variables that change how fast a library is. No contender gets those of the user's shell.
SETTINGS = re.compile(
    "(JAX|XLA|TF|KERAS|TORCH|TORCHINDUCTOR|PYTORCH|INDUCTOR|ORT|OV|OPENVINO|ONEDNN|DNNL|MKL|OMP|GOMP|KMP|OPENBLAS|"
    "MALLOC|GLIBC|LD|PYTHON)_?.*"
)


def clean_environment() -> dict[str, str]:
    """Returns this process's variables without `SETTINGS`; JAX uses the CPU, TensorFlow logs only errors."""
    kept = {name: value for name, value in os.environ.items() if not SETTINGS.fullmatch(name)}
    return kept | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}


class WorkerError(Exception):
    """A worker could not do what it was asked; the message is one line."""


class Worker:
    """A process, idle until it is asked; a context manager that ends it.

    Args:
      python: interpreter of its environment.
      threads: number of CPUs that it may run on, the first ones of this process.
      folder: for the caches of its libraries, which must be empty for every run of the benchmark.
      environment: further variables.
    """

    def __init__(self, python: Path, threads: int, folder: Path, environment: Mapping[str, str]) -> None:
        always = {
            "JAX_ENABLE_COMPILATION_CACHE": "false",  # compile time is measured
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        }
        self._log = tempfile.TemporaryFile(mode="w+", dir=folder)  # noqa: SIM115 (closed by `end`)
        self._process = subprocess.Popen(
            [str(python), "-m", "benchmarks.worker", str(threads)],
            cwd=ROOT,
            env=clean_environment() | always | dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # Ctrl-C must reach only the parent, and a signal to the worker its children too
        )

    def ask(self, request: str, **arguments: Any) -> Any:
        """Wakes the worker until it replies, and returns the reply.

        Raises:
          WorkerError: the worker raised an exception, or ended.
        """
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # it has ended, which is reported below
            self._process.stdin.write(json.dumps([request, arguments]) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            hint = " (out of memory?)" if code == -signal.SIGKILL else ""
            name = signal.Signals(-code).name if code < 0 else f"code {code}"
            raise WorkerError(f"its process ended by {name}{hint}. {self._last_words()}".strip())
        self._signal(signal.SIGSTOP)
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply["result"]

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()

    def end(self) -> None:
        """Ends the process and its children; a second time does nothing."""
        if self._log.closed:
            return
        self._signal(signal.SIGKILL)  # a stopped process receives no other signal
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _last_words(self) -> str:
        self._log.seek(0)
        return " ".join(self._log.read().split("\n")[-3:])[-300:].strip()


# In the process --------------------------------------------------------------------------------------


class _Requests:
    """The requests that a worker answers: its methods."""

    def __init__(self) -> None:
        self._run: Any = None

    def write_inputs(self, job: dict[str, Any], readings: list[str]) -> dict[str, Any]:
        from benchmarks import inputs
        from benchmarks.job import Job

        return inputs.write(Job(**job), readings)

    def write_onnx(self, job: dict[str, Any]) -> None:
        from benchmarks import contenders
        from benchmarks.job import Job

        contenders.write_onnx(Job(**job))

    def write_our_onnx(self, job: dict[str, Any]) -> None:
        from benchmarks import contenders
        from benchmarks.job import Job

        contenders.write_our_onnx(Job(**job))

    def build(self, contender: str, job: dict[str, Any]) -> dict[str, Any]:
        """Makes the function that is timed, and calls it once; in training twice, as the second loss shows the update.

        Returns:
          `versions` of what was imported; `build_seconds` of making the network with its weights, and
          `first_seconds` of the first call, compilation included; resident memory `imported_mb` after the
          imports and `build_peak_mb` up to here, of the whole process; `difference` from the expected result.
        """
        import numpy as np

        from benchmarks import contenders, readers
        from benchmarks.job import Job

        job = Job(**job)
        known = (
            readers.READERS
            if job.mode in readers.MODES
            else contenders.CONTENDERS | contenders.CEILINGS | contenders.EXPORTED
        )
        entry = known[contender]
        modules = [importlib.import_module(name) for name in entry.imports]
        reply: dict[str, Any] = {"versions": {m.__name__: m.__version__ for m in modules}}
        reply["imported_mb"] = _memory_mb("VmRSS")
        start = time.perf_counter()
        self._run = entry.build(job)
        reply["build_seconds"] = time.perf_counter() - start
        start = time.perf_counter()
        value = self._run()
        reply["first_seconds"] = time.perf_counter() - start
        if job.mode == "train":
            value = np.stack([value, self._run()])
        reply["build_peak_mb"] = _memory_mb("VmHWM")
        expected = Path(job.folder) / f"expected_{entry.reading}.npy"
        if expected.exists():
            reply["difference"] = difference(value, job.load(expected.name))
        reset_peak = "5"  # Documentation/filesystems/proc.rst: VmHWM is now the present size
        Path("/proc/self/clear_refs").write_text(reset_peak)
        return reply

    def turn(self, seconds: float) -> dict[str, Any]:
        """Runs once untimed, then until `seconds` have passed, and at least once.

        Returns:
          `lap_seconds` of each run; `lap_cpu_seconds`, the CPU time that its threads took, without that of other
          processes; `run_peak_mb` of the whole process since it was built; `last_value`, the
          mean of the last result: in training, its loss.
        """
        import numpy as np

        self._run()  # caches and threads are cold after the others' turns
        laps: list[float] = []
        cpu: list[float] = []
        while sum(laps) < seconds or not laps:
            start, start_cpu = time.perf_counter(), time.process_time()
            value = self._run()
            laps.append(time.perf_counter() - start)
            cpu.append(time.process_time() - start_cpu)
        return {
            "lap_seconds": laps,
            "lap_cpu_seconds": cpu,
            "run_peak_mb": _memory_mb("VmHWM"),
            "last_value": float(np.mean(value)),
        }


def difference(value: Any, expected: Any) -> float:
    """Returns the largest difference: of logits, as a share of their spread over images (of one image, over classes);
    of losses `[steps]`, as a share of the first loss.
    """
    import numpy as np

    if value.shape != expected.shape or not np.isfinite(value).all():
        raise ValueError(f"expected finite numbers of shape {expected.shape}, got {value.shape}: {value}")
    scale = expected[0] if value.ndim == 1 else np.ptp(expected, axis=0 if len(expected) > 1 else 1).max()
    return float(np.abs(value - expected).max() / scale)


def _memory_mb(field: str) -> float:
    """Returns VmRSS, resident memory, or VmHWM, its peak, in MB (10^6 bytes)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)[1]) * 1024 / 1e6


def end_with_parent() -> None:
    """Has the kernel end this process when its parent ends."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG, linux/prctl.h
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def take_output() -> TextIO:
    """Returns standard output for replies alone; what libraries print goes to standard error from now on."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return output


def one_line(error: BaseException) -> str:
    """Returns the error's type and the first line of its message."""
    words = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {words[0]}"[:300]


def main(threads: int) -> None:
    end_with_parent()
    # Before any library counts the CPUs: XLA, OpenBLAS and Eigen make as many threads as they find.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    replies = take_output()
    requests = _Requests()
    for line in sys.stdin:
        request, arguments = json.loads(line)
        try:
            reply = {"result": getattr(requests, request)(**arguments)}
        except Exception as error:
            traceback.print_exc()
            reply = {"error": one_line(error)}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
