"""What the commands of this folder share: arguments, progress, tables, Ctrl-C."""

import argparse
import datetime
import json
import os
import platform
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.worker import ROOT, WorkerError
from xception_flax.host import processor
from xception_flax.text.lookup import suggest

CONTENDERS_PYTHON = ROOT / ".venv-contenders" / "bin" / "python"


def parser(name: str, description: str, examples: str, *, timed: bool = True) -> argparse.ArgumentParser:
    """Returns a parser, with the arguments of every benchmark that is `timed`; `name` is its module's."""
    arguments = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if not timed:
        return arguments
    arguments.add_argument("--json", type=Path, metavar="FILE", help="write every number to this file too")
    arguments.add_argument(
        "--threads", type=positive(int), default=cpu_count(), metavar="N", help="CPUs that each may use (all)"
    )
    return arguments


def add_turns(arguments: argparse.ArgumentParser) -> None:
    """Adds the arguments of a benchmark whose contenders take turns."""
    arguments.add_argument("--rounds", type=positive(int), default=5, metavar="N", help="turns of each (5)")
    arguments.add_argument(
        "--seconds-per-turn",
        type=positive(float),
        default=3.0,
        metavar="S",
        help="length of a turn, at least one run (3)",
    )


def add_contenders_python(arguments: argparse.ArgumentParser) -> None:
    """Adds the argument of a benchmark that runs other libraries."""
    arguments.add_argument(
        "--contenders-python",
        type=Path,
        default=CONTENDERS_PYTHON,
        metavar="PATH",
        help="Python of the environment with the other libraries (that of `make contenders`)",
    )


def check(arguments: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends with an error if this machine does not fit the options."""
    if options.json and not options.json.absolute().parent.is_dir():
        arguments.error(f"--json: there is no folder {options.json.absolute().parent}.")
    if options.json:
        try:
            options.json.open("a").close()  # before minutes of measuring
        except OSError as error:
            arguments.error(f"--json: {options.json} cannot be written: {error.strerror}.")
    if sys.platform != "linux":
        arguments.error("the benchmarks need Linux, for CPU affinity and peak memory.")
    if options.threads > cpu_count():
        arguments.error(f"--threads must be at most {cpu_count()}, the CPUs that this process may use.")


def add_only(arguments: argparse.ArgumentParser) -> None:
    """Adds the argument that chooses some of a benchmark's contenders."""
    arguments.add_argument("--only", metavar="NAME,...", help="these contenders (all)")


def chosen(arguments: argparse.ArgumentParser, options: argparse.Namespace, table: Mapping[str, Any]) -> list[str]:
    """Returns the names of `--only`, each once, or all names of `table`; ends with an error if a name is unknown."""
    names = list(dict.fromkeys(options.only.split(","))) if options.only else list(table)
    for name in names:
        if name not in table:
            arguments.error(f"unknown contender {name!r}; {suggest(name, table)}")
    return names


def check_contenders(
    arguments: argparse.ArgumentParser, options: argparse.Namespace, need: Sequence[str], without: str
) -> None:
    """Ends with an error if the environment of the contenders `need` is missing.

    Args:
      need: names of contenders that run in it.
      without: arguments with which it is not needed, for the message.
    """
    if need and not options.contenders_python.exists():
        arguments.error(
            f"{', '.join(need)}: there is no {options.contenders_python}; make the contenders' environment by "
            f"`make contenders`, or measure without it ({without})."
        )


def cpu_count() -> int:
    """Returns the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def positive(kind: type) -> Callable[[str], Any]:
    """Returns the type of an argument that is a number above 0."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be positive, got {text}")
        return value

    parse.__name__ = kind.__name__  # for argparse's messages
    return parse


class Progress:
    """Shows progress on standard error: on a terminal in one line that changes, elsewhere in a line each."""

    def __init__(self, prefix: str) -> None:
        self._prefix, self._terminal = prefix, sys.stderr.isatty()

    def show(self, text: str, seconds_left: float | None = None) -> None:
        """Shows `text` until the next call; `seconds_left` may be unknown."""
        left = "" if seconds_left is None else f", about {max(seconds_left, 0):.0f} s left"
        self._write(f"{self._prefix}: {text}{left}", end="" if self._terminal else "\n")

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        self._write(f"{self._prefix}: {text}\n")

    def end(self) -> None:
        """Clears the line."""
        self._write("")

    def _write(self, text: str, end: str = "") -> None:
        clear = "\r\x1b[K" if self._terminal else ""
        print(f"{clear}{text}", end=end, file=sys.stderr, flush=True)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown: its first column is aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return f"| {' | '.join((first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)))} |"

    return "\n".join(map(line, (header, rule, *rows)))


def write_json(path: Path | None, options: argparse.Namespace, results: Mapping[str, Any]) -> None:
    """Writes the machine, the options and the results, if `path` is given."""
    if path:
        content = {"machine": machine(), "options": to_json(options), **results}
        path.write_text(json.dumps(content, indent=1) + "\n")


def to_json(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the options as values that JSON can write."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


def machine() -> dict[str, Any]:
    """Returns a description of this machine, and the date."""
    return {
        "cpu": processor.name(),
        "cpus": cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Runs a benchmark and exits with its code; Ctrl-C and SIGTERM unwind it, which ends the workers."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        code = main(sys.argv[1:])
    except WorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    sys.exit(code)
