"""What a person sees of a run: a progress bar, lines of metrics, metrics.jsonl, TensorBoard events."""

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
)

from xception_flax.display.console import duration, percent, stderr_console
from xception_flax.host.files import file_errors
from xception_flax.runs.history import open_metrics
from xception_flax.runs.workdir import HISTORY, TENSORBOARD
from xception_flax.text import naming
from xception_flax.text.errors import UserError
from xception_flax.training.metrics import SHARES

BLOCKING = "checkpoint/blocking_seconds"  # of the record of each checkpoint


class RunProgress:
    """Shows and records one run; on hosts other than the first it does nothing.

    A terminal shows a bar with step, images/s, loss and the time that is left; other outputs get a line per record.
    `metrics.jsonl` and the events in `tensorboard/` go on from the checkpoint: records of later steps, from a run that
    was cut off, are removed. Other lines of `metrics.jsonl` stay as they are.

    All time of a run is recorded exactly once. `train/first_step_seconds` is mostly compilation.
    `train/step_seconds` is the time of each later step, and `train/input_wait_seconds` the part of it in which the host
    waited for a batch. Training stands still for `eval/seconds` and `checkpoint/blocking_seconds` (a checkpoint's files
    are written in the background). The host runs a few steps ahead of the devices, so times are means over the steps
    between two records. At a record the devices have finished all steps.

    The time that is left counts the steps to come at the mean time of a step, and evaluations and checkpoints in
    proportion to those so far: it does not rise at each of them and fall until the next.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        start_step: int,
        total_steps: int,
        batch_size: int,
        num_images: int,
        enabled: bool,
        unevaluated: bool = False,
        peak_images_per_second: float | None = None,
    ) -> None:
        """Begins the run; its clock starts here.

        Args:
          workdir: of the run.
          start_step: number of steps that are done already.
          total_steps: of the whole run.
          batch_size: images per step.
          num_images: images per epoch.
          enabled: true on the first host only.
          unevaluated: whether `start_step` is evaluated anew; a record of that is removed too.
          peak_images_per_second: the rate at which all devices would train if they did only the network's
            multiply-adds, at their peak. `train/mfu` is the share of it that is reached. None if it is not known.

        Raises:
          UserError: a file cannot be read or written; the methods that record raise it too.
        """
        self._enabled = enabled
        self._total_steps, self._batch_size, self._num_images = total_steps, batch_size, num_images
        self._peak_images_per_second = peak_images_per_second
        self._began = self._last = (time.monotonic(), start_step)
        self._first_step_seconds: float | None = None
        self._input_wait_seconds = 0.0
        self._pauses: Counter[str] = Counter()  # seconds by reason, until they are recorded
        self._paused_seconds = 0.0  # of all reasons, since the last record of training
        self._step, self._paused_step = start_step, start_step  # done, and when the last evaluation or checkpoint was
        self._left_out_seconds = self._repeated_seconds = 0.0  # of all pauses; of evaluations and checkpoints
        self._shown = "compiling"
        if not enabled:
            return
        from xception_flax.runs.events import Events  # here: --help needs none of the extra 'train'

        self._console = stderr_console()
        self._path = workdir / HISTORY
        self._file, strange = open_metrics(self._path, start_step, unevaluated=unevaluated)
        try:
            self._events = Events(workdir / TENSORBOARD, start_step)
        except UserError:
            self._file.close()
            raise
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("training", total=total_steps, completed=start_step, state=self._shown)
        self._bar.start()
        if strange:
            lines = (
                "a line that is not a record" if len(strange) == 1 else f"{len(strange):,} lines that are not records"
            )
            self.say(f"{self._path} has {lines}, the first is line {strange[0]:,}; left as they are.")

    def __enter__(self) -> "RunProgress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if not self._enabled:
            return
        self._bar.stop()
        try:
            self.sync()
        except UserError:
            if kind is None:  # otherwise it would hide the exception that is being handled
                raise
        finally:
            for file in (self._events, self._file):
                with contextlib.suppress(OSError):  # closing writes what `sync` could not
                    file.close()

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._enabled:
            self._console.print(naming.harmless(text), soft_wrap=True)

    def advance(self, step: int) -> None:
        """Moves the bar. This takes no time to speak of."""
        self._step = step
        if self._enabled:
            self._bar.update(self._task, completed=step, state=self._state())

    def compiled(self, step: int) -> None:
        """Starts the clock of the rate. The time until now, at the end of `step`, was compilation."""
        now, (then, _) = time.monotonic(), self._last
        self._first_step_seconds = now - then - self._paused_seconds
        self._began = self._last = (now, step)
        self._paused_seconds = self._input_wait_seconds = 0.0
        self._left_out_seconds = self._repeated_seconds = 0.0
        self._shown = ""
        if self._enabled:
            self._bar.update(self._task, state="")

    @contextlib.contextmanager
    def input_wait(self) -> Iterator[None]:
        """Wraps the wait for the next batch."""
        begin = time.monotonic()
        yield
        self._input_wait_seconds += time.monotonic() - begin

    @contextlib.contextmanager
    def pause(self, reason: str) -> Iterator[None]:
        """Leaves the time of this block out of the rate, since it does not train. The devices must have finished.

        Args:
          reason: 'evaluation' or 'checkpoint', whose next record gets this time; or another, which is not recorded.
        """
        begin = time.monotonic()
        yield
        seconds = time.monotonic() - begin
        self._pauses[reason] += seconds
        self._paused_seconds += seconds
        self._left_out_seconds += seconds
        if reason in ("evaluation", "checkpoint"):
            self._repeated_seconds += seconds
            self._paused_step = self._step

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the training metrics of the steps since the last record, with the rate and the times."""
        now, (then, last_step) = time.monotonic(), self._last
        seconds, steps = max(now - then - self._paused_seconds, 1e-9), step - last_step
        rate, input_wait_seconds = steps * self._batch_size / seconds, self._input_wait_seconds
        self._last, self._paused_seconds, self._input_wait_seconds = (now, step), 0.0, 0.0
        self._step = step
        if not self._enabled:
            return
        record = {f"train/{k}": v for k, v in metrics.items()}
        shown = f"loss {metrics['loss']:.4f}" if "loss" in metrics else "no loss"  # where all steps were skipped
        if self._first_step_seconds is not None:
            record["train/first_step_seconds"], self._first_step_seconds = self._first_step_seconds, None
        if steps:  # the first step alone has none of these: it was compilation
            record["train/images_per_second"] = rate
            record["train/step_seconds"] = seconds / steps
            record["train/input_wait_seconds"] = input_wait_seconds / steps
            shown += f"  {rate:,.0f} images/s"
            if self._peak_images_per_second is not None:
                record["train/mfu"] = rate / self._peak_images_per_second
                shown += f"  MFU {100 * record['train/mfu']:.0f} %"
            shown += f"  input {100 * input_wait_seconds / seconds:.0f} %"
        self._record(step, record)
        self._shown = shown
        self._bar.update(self._task, completed=step, state=self._state())
        if not self._console.is_terminal:
            self.say(f"step {step}/{self._total_steps}  {self._state()}")

    def _state(self) -> str:
        """Returns what the last record had, and the time that is left."""
        began, first_step = self._began
        steps = self._step - first_step
        if not self._shown or steps < 1:
            return self._shown
        seconds = (time.monotonic() - began - self._left_out_seconds) / steps
        seconds += self._repeated_seconds / max(self._paused_step - first_step, 1)
        left = seconds * (self._total_steps - self._step)
        return f"{self._shown}  {duration(left)} left" if left else self._shown

    def evaluation(self, step: int, metrics: Mapping[str, float], weights: str) -> None:
        """Records an evaluation of the `weights` 'raw' or 'ema'."""
        if not self._enabled:
            return
        seconds = {"eval/seconds": self._pauses.pop("evaluation")} if "evaluation" in self._pauses else {}
        self._record(step, {f"eval/{k}": v for k, v in metrics.items()} | seconds | {"eval/weights": weights})
        epoch = step * self._batch_size / self._num_images
        shares = "  ".join(f"{k} {percent(v)}" for k, v in metrics.items() if k in SHARES)
        self.say(f"epoch {epoch:5.1f}  evaluation ({weights}): {shares}  loss {metrics['loss']:.4f}")

    def checkpoint(self, step: int) -> None:
        """Records how long training stood still for the checkpoint of `step`."""
        if self._enabled:
            self._record(step, {BLOCKING: self._pauses.pop("checkpoint")})

    def sync(self) -> None:
        """Waits until the records are on the disk. Call it before the checkpoint of the same step is saved."""
        if self._enabled:
            with file_errors(self._path, "written"):
                self._file.flush()
                os.fsync(self._file.fileno())

    def _record(self, step: int, values: Mapping[str, Any]) -> None:
        with file_errors(self._path, "written"):
            self._file.write(naming.to_json_line({"step": step, **values}).encode() + b"\n")
            self._file.flush()
        self._events.add(step, {name: value for name, value in values.items() if not isinstance(value, str)})
