"""A trace of chosen steps: what host and devices did in them, moment by moment."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from xception_flax.runs.progress import RunProgress


class Profile:
    """Traces some steps of a run; a context manager, which also ends a trace that is under way.

    The folder gets a sub-folder a trace, as XProf and TensorBoard's profile plug-in read it; the
    `.trace.json.gz` in it is for ui.perfetto.dev.
    """

    def __init__(self, steps: range, folder: Path, report: RunProgress, *, enabled: bool) -> None:
        """Prepares the trace.

        Args:
          steps: to trace, without a gap; empty for none.
          folder: made when the first of them comes.
          report: of the run; what the trace itself costs is kept out of its rates.
          enabled: on one host only. All run the same program, and none gets further than the next
            collective without the others: what one waits for shows in its trace.
        """
        self._steps = steps if enabled else range(0)
        self._folder, self._report = folder, report
        self._tracing = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._tracing:  # stopped, or failed, between the first and the last of the steps
            jax.profiler.stop_trace()

    @contextlib.contextmanager
    def step(self, step: int, pending: Iterable[Any]) -> Iterator[None]:
        """Goes around a step; begins and ends the trace, and names the step in it.

        Args:
          step: its number.
          pending: results that the devices may not have ready yet (any iterable of arrays), at the end with
            those of this step: a trace has all of its steps, and nothing of the others.
        """
        if self._steps and step == self._steps[0]:
            jax.block_until_ready(list(pending))
            with self._report.pause("profile"):
                jax.profiler.start_trace(self._folder)
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        if self._tracing and step == self._steps[-1]:
            jax.block_until_ready(list(pending))
            self._tracing = False
            with self._report.pause("profile"):
                jax.profiler.stop_trace()
            self._report.say(
                f"profile of steps {self._steps[0]} to {step} in {self._folder}; to look at it: pip install xprof, "
                f"xprof --logdir {self._folder}, or open its .trace.json.gz in ui.perfetto.dev"
            )
