"""Tables, progress bars and messages on a terminal."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

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

from xception_flax.text import naming
from xception_flax.text.counting import counted, plural

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
    """Prints a row of a table whose first column is `width` terminal cells wide."""
    name = naming.harmless(name)
    print(f"  {name}{' ' * (width - cell_len(name))}  {naming.harmless(value)}", flush=True)


def show_columns(title: str, columns: Mapping[str, Sequence[str]]) -> None:
    """Prints a table on standard output, its columns by header. The first is aligned left, the others right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, header in enumerate(columns):
        table.add_column(header, justify="right" if i else "left", no_wrap=True)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*(Text(naming.harmless(cell)) for cell in row))
    show_title(title)
    # As wide as its content: a narrow terminal may wrap a line, but no number is cut.
    Console(width=10_000).print(table)


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Shows on standard error that `what` is running, and at its end prints a line with the time it took."""
    console, begun, what = stderr_console(), time.monotonic(), naming.harmless(what)
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
    """Shows progress on standard error: how much is done, how fast, and the time left.

    A terminal gets a bar; anything else gets a line every half minute.

    Args:
      what: the name of the work.
      total: the whole amount.
      unit: of the amount: 'bytes', or what is counted, such as 'image'.
      done: the amount done by an earlier start.

    Yields:
      A function to call, from any thread, with the amount done since its last call.
    """
    console, begun, lock = stderr_console(), time.monotonic(), threading.Lock()
    now_done, told, what = done, begun, naming.harmless(what)

    def amount(number: int) -> str:
        return f"{number / 1e9:.2f} GB" if unit == "bytes" else counted(number, unit)

    def advance(number: int) -> None:
        nonlocal now_done, told
        with lock:
            now_done += number
            rate = (now_done - done) / max(time.monotonic() - begun, 1e-9)
            if console.is_terminal:
                per_second = f"{rate / 1e6:,.0f} MB/s" if unit == "bytes" else f"{rate:,.0f} {plural(unit)}/s"
                bar.update(task, completed=now_done, state=f"{amount(now_done)}  {per_second}  left")
            elif time.monotonic() - told > 30:
                told = time.monotonic()
                left = duration((total - now_done) / rate)
                console.print(f"{what}: {amount(now_done)} of {amount(total)}, {left} left", soft_wrap=True)

    what_column, state_column = (
        TextColumn(f"{{task.{key}}}", markup=False) for key in ("description", "fields[state]")
    )
    columns = what_column, BarColumn(), state_column, TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total, completed=done, state="")
        yield advance
    seconds = time.monotonic() - begun
    console.print(f"{what}: {amount(now_done - done)} in {duration(seconds)}", soft_wrap=True)


def stepping(what: str, steps: Sequence[T]) -> Iterator[T]:
    """Yields the steps. If standard error is a terminal, shows there how many are done."""
    console = stderr_console()
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    # While the bar is shown, Rich can redirect standard output to its own console, here standard error. That keeps
    # the bar below the output on a terminal, but would lose output that goes to a file.
    bar = Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal, redirect_stdout=sys.stdout.isatty()
    )
    with bar:
        yield from bar.track(steps, description=naming.harmless(what))


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Goes on in silence where the reader has gone (`2>&1 | tee log`, and Ctrl-C); Rich would end the process."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def stderr_console() -> Console:
    """Returns a console on standard error that prints text as it is: `[red]` and `:cat:` are names, not markup."""
    return _Console(stderr=True, markup=False, emoji=False, highlight=False)


def say(text: str) -> None:
    """Prints a line on standard error."""
    stderr_console().print(naming.harmless(text), soft_wrap=True)


def percent(share: float) -> str:
    """0.99444 -> '99.44 %'."""
    return f"{100 * share:.2f} %"


def duration(seconds: float) -> str:
    """61 -> '1:01', 3661 -> '1:01:01'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
