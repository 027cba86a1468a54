"""What the commands of this folder share: arguments, progress, tables, Ctrl-C."""

import argparse
import datetime
import json
import os
import platform
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.worker import ROOT, WorkerError
from xception_flax.text.lookup import suggest

CONTENDERS_PYTHON = ROOT / ".venv-contenders" / "bin" / "python"


def parser(name: str, description: str, examples: str) -> argparse.ArgumentParser:
    """Returns a parser with the arguments that every benchmark takes; `name` is its module's."""
    arguments = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    arguments.add_argument("--json", type=Path, metavar="FILE", help="write every number to this file too")
    arguments.add_argument(
        "--threads", type=positive(int), default=cpu_count(), metavar="N", help="CPUs that each may use (all)"
    )
    return arguments


def add_turns(arguments: argparse.ArgumentParser) -> None:
    """Adds the arguments of a benchmark whose sides take turns."""
    arguments.add_argument("--rounds", type=positive(int), default=5, metavar="N", help="turns of each (5)")
    arguments.add_argument(
        "--seconds-per-turn",
        type=positive(float),
        default=3.0,
        metavar="S",
        help="length of a turn, which is one run at least (3)",
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
    """Ends with an error where the machine is not as `options` want it."""
    if options.json and not options.json.absolute().parent.is_dir():
        arguments.error(f"--json: there is no folder {options.json.absolute().parent}.")
    if options.json:
        try:
            options.json.open("a").close()  # before minutes of measuring
        except OSError as error:
            arguments.error(f"--json: {options.json} cannot be written: {error.strerror}.")
    if sys.platform != "linux":
        arguments.error("the benchmarks need Linux: CPU affinity and peak memory are read as it has them.")
    if options.threads > cpu_count():
        arguments.error(f"--threads must be at most {cpu_count()}, the CPUs that this process may use.")


def add_only(arguments: argparse.ArgumentParser) -> None:
    """Adds the argument of a benchmark that some of its contenders can be chosen of."""
    arguments.add_argument("--only", metavar="NAME,...", help="these contenders (all)")


def chosen(arguments: argparse.ArgumentParser, options: argparse.Namespace, table: Mapping[str, Any]) -> list[str]:
    """Returns the names of `--only`, each once, or all of `table`; ends with an error where it has no such name."""
    names = list(dict.fromkeys(options.only.split(","))) if options.only else list(table)
    for name in names:
        if name not in table:
            arguments.error(f"unknown contender {name!r}; {suggest(name, table)}")
    return names


def check_contenders(
    arguments: argparse.ArgumentParser, options: argparse.Namespace, need: Sequence[str], without: str
) -> None:
    """Ends with an error where `need`, contenders by name, cannot run for want of their environment.

    Args:
      without: the argument with which none is needed.
    """
    if need and not options.contenders_python.exists():
        arguments.error(
            f"{', '.join(need)}: there is no {options.contenders_python}; make the contenders' environment by "
            f"`make contenders`, or measure what needs none ({without})."
        )


def cpu_count() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def positive(kind: type) -> Callable[[str], Any]:
    """The type of an argument that is a number above 0."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be positive, got {text}")
        return value

    parse.__name__ = kind.__name__  # what argparse calls it where it is none
    return parse


class Progress:
    """Says on standard error what goes on: on a terminal in one line, elsewhere in a line each."""

    def __init__(self, prefix: str) -> None:
        self._prefix, self._terminal = prefix, sys.stderr.isatty()

    def show(self, text: str, seconds_left: float | None = None) -> None:
        """Says it until the next; `seconds_left` may be unknown."""
        left = "" if seconds_left is None else f", about {max(seconds_left, 0):.0f} s left"
        self._write(f"{self._prefix}: {text}{left}", end="" if self._terminal else "\n")

    def say(self, text: str) -> None:
        """Says it for good."""
        self._write(f"{self._prefix}: {text}\n")

    def end(self) -> None:
        """Leaves the line empty."""
        self._write("")

    def _write(self, text: str, end: str = "") -> None:
        clear = "\r\x1b[K" if self._terminal else ""
        print(f"{clear}{text}", end=end, file=sys.stderr, flush=True)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, its columns as wide as they must be: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return f"| {' | '.join((first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)))} |"

    return "\n".join(map(line, (header, rule, *rows)))


def write_json(path: Path | None, options: argparse.Namespace, results: Mapping[str, Any]) -> None:
    """Writes what was asked, the machine and the results, if `path` is given."""
    if path:
        shown = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        path.write_text(json.dumps({"machine": machine(), "options": shown, **results}, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cpus": cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Runs a benchmark and exits with its code; Ctrl-C and SIGTERM unwind it, and so end the workers."""

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
