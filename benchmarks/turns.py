"""Workers that take turns: A B C A B C ..., so that other load on the machine affects all alike."""

import contextlib
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.command import Progress
from benchmarks.worker import Worker, WorkerError

Row = dict[str, Any]  # of a table: `title`, what its worker replied, and `error` where it failed


class Turns:
    """Workers and the rows of their results, by name; a context manager that ends all workers."""

    def __init__(self, progress: Progress) -> None:
        self.rows: dict[str, Row] = {}
        self._workers: dict[str, Worker] = {}
        self._progress = progress
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Turns":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def add(self, name: str, title: str, worker: Worker, **request: Any) -> None:
        """Adds a worker, and has it build what it will run; `request` are the arguments of its `build`."""
        self._progress.show(f"building {title}")
        self.rows[name] = {"name": name, "title": title}
        self._workers[name] = self._stack.enter_context(worker)
        with self._failing(name):
            self.rows[name] |= worker.ask("build", **request)

    def fail(self, name: str, error: str) -> None:
        """Ends the worker; its row keeps the error."""
        self.rows[name]["error"] = error
        self._workers.pop(name).end()
        self._progress.say(f"{self.rows[name]['title']}: {error}")

    def take(self, rounds: int, seconds_per_turn: float) -> None:
        """Fills the rows: `lap_seconds` and `lap_cpu_seconds`, a list a round each; their medians `seconds` and
        `cpu_seconds`; `run_peak_mb`; `last_value`.
        """
        start, taken = time.monotonic(), 0
        for number in range(1, rounds + 1):
            for name in list(self._workers):
                left = rounds * len(self._workers) - taken
                known = number > 1  # every one has had a turn
                seconds_left = (time.monotonic() - start) / taken * left if known else None
                row = self.rows[name]
                self._progress.show(f"round {number} of {rounds}, {row['title']}", seconds_left)
                taken += 1
                with self._failing(name):
                    turn = self._workers[name].ask("turn", seconds=seconds_per_turn)
                    for what in ("lap_seconds", "lap_cpu_seconds"):
                        row.setdefault(what, []).append(turn[what])
                    row |= {"run_peak_mb": turn["run_peak_mb"], "last_value": turn["last_value"]}
                    if not math.isfinite(turn["last_value"]):
                        raise WorkerError("its results are not finite")
        for name in self._workers:
            row = self.rows[name]
            for what in ("seconds", "cpu_seconds"):
                row[what] = statistics.median(lap for laps in row[f"lap_{what}"] for lap in laps)

    @contextlib.contextmanager
    def _failing(self, name: str) -> Iterator[None]:
        """Ends only this worker if it fails; the others go on."""
        try:
            yield
        except WorkerError as error:
            self.fail(name, str(error))
