"""What a person sees of a run: a progress bar, lines of metrics, metrics.jsonl, TensorBoard events."""

import contextlib
import json
import math
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text
from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from xception_flax import naming
from xception_flax.files import file_errors, write_whole

T = TypeVar("T")


def show_table(title: str, rows: Mapping[str, str]) -> None:
    """Prints a table of two columns on standard output."""
    width = max(map(cell_len, rows))
    show_title(title)
    for name, value in rows.items():
        show_row(name, value, width)


def show_title(title: str) -> None:
    """Prints the title of a table; the rows that follow come one by one."""
    print(f"\n{naming.harmless(title)}", flush=True)


def show_row(name: str, value: str, width: int) -> None:
    """Prints a row of a table whose first column is so many columns of a terminal wide."""
    name = naming.harmless(name)
    print(f"  {name}{' ' * (width - cell_len(name))}  {naming.harmless(value)}", flush=True)


def show_columns(title: str, columns: Mapping[str, Sequence[str]]) -> None:
    """Prints a table of columns by their headers on standard output: the first to the left, the others to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, header in enumerate(columns):
        table.add_column(header, justify="right" if i else "left", no_wrap=True)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*(Text(naming.harmless(cell)) for cell in row))
    show_title(title)
    # As wide as what is in it: a narrow terminal may break a line, but no number is cut.
    Console(width=10_000).print(table)


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Shows that `what` goes on and for how long, and leaves a line of it; on standard error."""
    console, begun, what = _console(), time.monotonic(), naming.harmless(what)
    spinner = SpinnerColumn("line" if console.options.ascii_only else "dots")
    columns = spinner, TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    if not console.is_terminal:
        console.print(f"{what} ...", soft_wrap=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        bar.add_task(what, total=None)
        yield
    console.print(f"{what}: {time.monotonic() - begun:.0f} s", soft_wrap=True)


@contextlib.contextmanager
def counting(what: str, total: int, unit: str, *, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Shows how much is done, how fast, and the time that is left; on standard error.

    On a terminal there is a bar, elsewhere a line each half minute.

    Args:
      what: goes on.
      total: of it.
      unit: 'bytes', or what is counted.
      done: of it, by an earlier start.

    Yields:
      What is told how much more is done; by any thread.
    """
    console, begun, lock = _console(), time.monotonic(), threading.Lock()
    now_done, told, what = done, begun, naming.harmless(what)

    def amount(number: float) -> str:
        return f"{number / 1e9:.2f} GB" if unit == "bytes" else f"{number:,.0f} {unit}"

    def advance(number: int) -> None:
        nonlocal now_done, told
        with lock:
            now_done += number
            rate = (now_done - done) / max(time.monotonic() - begun, 1e-9)
            if console.is_terminal:
                per_second = f"{rate / 1e6:,.0f} MB/s" if unit == "bytes" else f"{rate:,.0f} {unit}/s"
                bar.update(task, completed=now_done, state=f"{amount(now_done)}  {per_second}  left")
            elif time.monotonic() - told > 30:
                told = time.monotonic()
                left = _duration((total - now_done) / rate)
                console.print(f"{what}: {amount(now_done)} of {amount(total)}, {left} left", soft_wrap=True)

    what_column, state_column = (
        TextColumn(f"{{task.{key}}}", markup=False) for key in ("description", "fields[state]")
    )
    columns = what_column, BarColumn(), state_column, TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total, completed=done, state="")
        yield advance
    seconds = time.monotonic() - begun
    console.print(f"{what}: {amount(now_done - done)} in {_duration(seconds)}", soft_wrap=True)


def stepping(what: str, steps: Sequence[T]) -> Iterator[T]:
    """Yields the steps, and on a terminal shows how many are done; on standard error."""
    console = _console()
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    # Rich sends to its own console, here standard error, what is printed meanwhile: right on a terminal, where the
    # bar goes below it, and a loss where standard output goes to a file.
    bar = Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal, redirect_stdout=sys.stdout.isatty()
    )
    with bar:
        yield from bar.track(steps, description=naming.harmless(what))


def _console() -> Console:
    """Standard error, where what is printed is text as it stands: `[red]` and `:cat:` are names."""
    return Console(stderr=True, markup=False, emoji=False, highlight=False)


NO_SHARES = ("loss", "count", "bad_images")  # of what an evaluation returns; all else is a share of 1


def percent(share: float) -> str:
    """0.99444 -> '99.44 %'."""
    return f"{100 * share:.2f} %"


class RunProgress:
    """Shows and records one run; on hosts other than the first it does nothing.

    On a terminal there is a bar with step, images/s, loss and the time that is left; elsewhere a
    line at each record. `metrics.jsonl` and the events in `tensorboard/` go on where the checkpoint
    does: records of steps after it, from a run that was cut off, are removed. What else is in
    `metrics.jsonl` stays as it is.

    Of the time of a run all is recorded once: `train/first_step_seconds`, which is compilation for the
    most part; then, for each step, `train/step_seconds`, of which the host waited
    `train/input_wait_seconds` for a batch; and what training stood still for, `eval/seconds` and
    `checkpoint/blocking_seconds` (a checkpoint's files are written in the background). The host runs
    a few steps ahead of the devices: times are means over the steps between two records, at whose
    ends the devices have nothing left to do.
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
        peak_images_per_second: float | None = None,
    ) -> None:
        """Begins the run; its clock starts here.

        Args:
          workdir: of the run.
          start_step: done already.
          total_steps: of the whole run.
          batch_size: images a step.
          num_images: of an epoch.
          enabled: on the first host.
          peak_images_per_second: that all devices could train on, if they did nothing but the network's
            multiply-adds at their peak; the rate's share of it is recorded as `train/mfu`. None where it
            is not known.

        Raises:
          ValueError: a file cannot be read or written. So does whatever records.
        """
        self._enabled = enabled
        self._total_steps, self._batch_size, self._num_images = total_steps, batch_size, num_images
        self._peak_images_per_second = peak_images_per_second
        self._began = self._last = (time.monotonic(), start_step)
        self._first_step_seconds: float | None = None
        self._input_wait_seconds = 0.0
        self._pauses: Counter[str] = Counter()  # seconds by reason, until they are recorded
        self._paused_seconds = 0.0  # of all reasons, since the last record of training
        if not enabled:
            return
        self._console = _console()
        self._path = workdir / "metrics.jsonl"
        self._events = Events(workdir / "tensorboard", start_step)
        self._file, strange = open_metrics(self._path, start_step)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("training", total=total_steps, completed=start_step, state="compiling")
        self._bar.start()
        if strange:
            lines = "a line that is no record" if len(strange) == 1 else f"{len(strange):,} lines that are no records"
            self.say(f"{self._path} has {lines}, the first is line {strange[0]:,}; left as they are.")

    def __enter__(self) -> "RunProgress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if not self._enabled:
            return
        self._bar.stop()
        try:
            self.sync()
        except ValueError:  # which is not to take the place of an error that is under way
            if kind is None:
                raise
        finally:
            for file in (self._events, self._file):
                with contextlib.suppress(OSError):  # of what `sync` has failed to write
                    file.close()

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._enabled:
            self._console.print(naming.harmless(text), soft_wrap=True)

    def advance(self, step: int) -> None:
        """Moves the bar; costs nothing worth a measurement."""
        if self._enabled:
            self._bar.update(self._task, completed=step)

    def compiled(self, step: int) -> None:
        """Starts the clock of the rate: the time before, up to the end of `step`, was compilation."""
        now, (then, _) = time.monotonic(), self._last
        self._first_step_seconds = now - then - self._paused_seconds
        self._began = self._last = (now, step)
        self._paused_seconds = self._input_wait_seconds = 0.0

    @contextlib.contextmanager
    def input_wait(self) -> Iterator[None]:
        """Goes around the wait for the next batch."""
        begin = time.monotonic()
        yield
        self._input_wait_seconds += time.monotonic() - begin

    @contextlib.contextmanager
    def pause(self, reason: str) -> Iterator[None]:
        """Leaves the time spent in it out of the rate: no training is done. The devices have nothing left to do.

        Args:
          reason: 'evaluation' or 'checkpoint', whose record then has this time, or another.
        """
        begin = time.monotonic()
        yield
        seconds = time.monotonic() - begin
        self._pauses[reason] += seconds
        self._paused_seconds += seconds

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the training metrics of the steps since the last record, with the rate and where the time went."""
        now, (then, last_step) = time.monotonic(), self._last
        seconds, steps = max(now - then - self._paused_seconds, 1e-9), step - last_step
        rate, input_wait_seconds = steps * self._batch_size / seconds, self._input_wait_seconds
        self._last, self._paused_seconds, self._input_wait_seconds = (now, step), 0.0, 0.0
        if not self._enabled:
            return
        record, shown = {f"train/{k}": v for k, v in metrics.items()}, f"loss {metrics['loss']:.4f}"
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
        self._bar.update(self._task, completed=step, state=f"{shown}  left")
        if not self._console.is_terminal:
            began, first_step = self._began  # evaluations and checkpoints since then come again
            left = (self._total_steps - step) * (now - began) / max(step - first_step, 1)
            self.say(f"step {step}/{self._total_steps}  {shown}" + (f"  {_duration(left)} left" if left else ""))

    def evaluation(self, step: int, metrics: Mapping[str, float], weights: str) -> None:
        """Records an evaluation; `weights` says of which weights, 'raw' or 'ema'."""
        if not self._enabled:
            return
        seconds = {"eval/seconds": self._pauses.pop("evaluation")} if "evaluation" in self._pauses else {}
        self._record(step, {f"eval/{k}": v for k, v in metrics.items()} | seconds | {"eval/weights": weights})
        epoch = step * self._batch_size / self._num_images
        shares = "  ".join(f"{k} {percent(v)}" for k, v in metrics.items() if k not in NO_SHARES)
        self.say(f"epoch {epoch:5.1f}  evaluation ({weights}): {shares}  loss {metrics['loss']:.4f}")

    def checkpoint(self, step: int) -> None:
        """Records how long training stood still for the checkpoint of `step`."""
        if self._enabled:
            self._record(step, {"checkpoint/blocking_seconds": self._pauses.pop("checkpoint")})

    def sync(self) -> None:
        """Has the records on the disk, and not in the system's memory alone: to go before what they are of is kept."""
        if self._enabled:
            with file_errors(self._path, "written"):
                self._file.flush()
                os.fsync(self._file.fileno())

    def _record(self, step: int, values: Mapping[str, Any]) -> None:
        with file_errors(self._path, "written"):
            self._file.write(to_json({"step": step, **values}).encode() + b"\n")
            self._file.flush()
        self._events.add(step, {name: value for name, value in values.items() if not isinstance(value, str)})


class Events:
    """A file of events, as TensorBoard reads them, written by who adds them.

    tensorboardX's own `SummaryWriter` writes by a thread, which dies of a full disk: the queue before it then
    fills, and the run waits for ever.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        """Begins a file in `folder`; what older ones have of steps after `start_step` counts no more.

        Raises:
          ValueError: it cannot be written. So does `add`.
        """
        now = time.time()
        # Absolute: of a relative name tensorboardX may take the beginning for a protocol.
        self._path = folder.absolute() / f"events.out.tfevents.{now:.0f}.{socket.gethostname()}.{os.getpid()}"
        with file_errors(self._path, "written"):
            folder.mkdir(exist_ok=True)
            self._file = RecordWriter(str(self._path))
        self._write(
            Event(wall_time=now, file_version="brain.Event:2"),
            Event(wall_time=now, step=start_step + 1, session_log=SessionLog(status=SessionLog.START)),
        )

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of a step by their names."""
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        self._file.close()

    def _write(self, *events: Event) -> None:
        with file_errors(self._path, "written"):
            for event in events:
                self._file.write(event.SerializeToString())
            self._file.flush()


def to_json(values: Mapping[str, Any]) -> str:
    """One line of JSON; NaN and infinity, which JSON does not have, become null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return naming.to_json(finite, allow_nan=False)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


TEXTS = ("eval/weights",)  # values of a record that are no numbers


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a metrics.jsonl: values by their names, numbers or None but for `TEXTS`.

    Lines that are no records are left out: the last one may have been cut off, and the file is the user's too.

    Raises:
      ValueError: it cannot be read.
    """
    return [record for line in _lines(path) if (record := _parse_record(line)) is not None]


def open_metrics(path: Path, start_step: int) -> tuple[Any, list[int]]:
    """Opens metrics.jsonl to go on after `start_step`, where later records, of a run cut off, are removed.

    A last line that was cut off goes too. All else stays as it is, byte for byte.

    Returns:
      The file, and the numbers of the lines that stay and are no records.

    Raises:
      ValueError: it cannot be read or written.
    """
    strange: list[int] = []

    def kept() -> Iterator[bytes]:
        for number, line in enumerate(_lines(path), 1):
            record, is_whole = _parse_record(line), line.endswith(b"\n")
            if record is None and is_whole:
                strange.append(number)
            if is_whole if record is None else record["step"] <= start_step:
                yield line if is_whole else line + b"\n"

    if path.exists():
        write_whole(path, kept())
    with file_errors(path, "written"):
        return path.open("ab"), strange


def _lines(path: Path) -> Iterator[bytes]:
    with file_errors(path, "read"), path.open("rb") as file:
        yield from file


def _parse_record(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None where there is none."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int or record["step"] < 0:
        return None

    def is_right(name: str, value: Any) -> bool:
        if isinstance(value, str):
            return name in TEXTS
        return value is None or (type(value) in (int, float) and abs(value) <= sys.float_info.max)

    return record if all(is_right(name, value) for name, value in record.items()) else None
