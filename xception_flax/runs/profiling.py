"""A trace of chosen steps: what the host and the devices did in them, moment by moment."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from xception_flax.runs.progress import RunProgress


class Profile:
    """Traces some steps of a run: a context manager, which at its end also ends a trace that is under way.

    Each trace is a sub-folder in the format of XProf and TensorBoard's profile plug-in. The `.trace.json.gz` in it is
    for ui.perfetto.dev.
    """

    def __init__(self, steps: range, folder: Path, report: RunProgress, *, enabled: bool) -> None:
        """Prepares the trace.

        Args:
          steps: to trace, without gaps; empty for none. Those that an earlier start has done are left out.
          folder: of the traces; created at the first of these steps.
          report: of the run; the cost of the trace itself is left out of its rates.
          enabled: true on one host only. All hosts run the same program, and none passes a collective without the
            others, so the trace of one host shows when it waits for another.
        """
        self._steps = steps if enabled else range(0)
        self._folder, self._report = folder, report
        self._first: int | None = None  # step of the trace that is under way

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._first is not None:  # the run was stopped or failed between the first and the last of the steps
            jax.profiler.stop_trace()

    @contextlib.contextmanager
    def step(self, step: int, pending: Iterable[Any]) -> Iterator[None]:
        """Wraps a step: begins and ends the trace, and names the step in it.

        Args:
          step: its number.
          pending: results that devices may still be computing (any iterable of arrays). It is read before the first
            step, and after the last, whose results it then includes. So a trace has all of its steps, and no others.
        """
        if self._first is None and step in self._steps:
            jax.block_until_ready(list(pending))
            with self._report.pause("profile"):
                jax.profiler.start_trace(self._folder)
            self._first = step
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        if self._first is not None and step == self._steps[-1]:
            jax.block_until_ready(list(pending))
            first, self._first = self._first, None
            with self._report.pause("profile"):
                jax.profiler.stop_trace()
            self._report.say(
                f"profile of steps {first} to {step} in {self._folder}; to look at it: pip install xprof, "
                f"xprof --logdir {self._folder}, or open its .trace.json.gz in ui.perfetto.dev"
            )
