"""Starting a command: arguments every command has, several hosts, quiet logs, errors in a line, stopping by signal."""

import argparse
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from absl import logging as absl_logging

# JAX is imported inside functions: the environment below must be set before.


class _Parser(argparse.ArgumentParser):
    """Errors as every other mistake of a user's: one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help shows what there is.")


def directory(text: str) -> Path:
    """The type of an argument that names a folder."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is no path of a file system; mount the bucket and give its path")
    return Path(text)


def parser(description: str | None, examples: str) -> argparse.ArgumentParser:
    """Returns a parser with the arguments about several hosts, which every command takes."""
    arguments = _Parser(
        description=description,
        epilog="examples:\n" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    hosts = arguments.add_argument_group("several hosts (run the same command on each)")
    hosts.add_argument(
        "--distributed", action="store_true", help="find the other hosts by the cluster's own means (TPU pod, Slurm)"
    )
    hosts.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, where there is no such means")
    hosts.add_argument("--num-processes", type=int, metavar="N", help="with --coordinator: processes in all")
    hosts.add_argument("--process-id", type=int, metavar="I", help="with --coordinator: number of this one, from 0")
    return arguments


def start(arguments: argparse.Namespace) -> None:
    """Connects the hosts and quiets the libraries. To be called before JAX touches a device."""
    absl_logging.set_verbosity(absl_logging.ERROR)
    logging.getLogger("jax").setLevel(logging.ERROR)
    import jax

    if arguments.coordinator is not None:
        if arguments.num_processes is None or arguments.process_id is None:
            raise ValueError("--coordinator needs --num-processes and --process-id.")
        jax.distributed.initialize(arguments.coordinator, arguments.num_processes, arguments.process_id)
    elif arguments.distributed:
        jax.distributed.initialize()
    try:
        jax.devices()
    except RuntimeError as error:
        raise ValueError(f"JAX finds no device to run on: {str(error).splitlines()[0]}") from None


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Runs a command and exits with its code; a user's mistake is one message and code 2.

    A ValueError that this project raises is about what the user gave; anything else is a defect
    and keeps its traceback, as everything does with XCEPTION_FLAX_TRACEBACK=1.
    """
    # TensorStore, gloo and XLA write to stderr at start, each in a format of its own.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        code = main(sys.argv[1:])
    except ValueError as error:
        if os.environ.get("XCEPTION_FLAX_TRACEBACK") or not _raised_by_us(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    sys.stdout.flush()
    sys.exit(code)


def _raised_by_us(error: BaseException) -> bool:
    file = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    package = Path(__file__).resolve().parent
    return package in file.parents or file == package.parent / "train.py"


class StopRequest:
    """Whether SIGTERM or Ctrl-C has asked to stop; a context manager, for a run of one process.

    The first signal lets the step in hand end and a checkpoint be written; the second stops at
    once. With several processes JAX has its own handler, which makes all hosts stop at one step.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._old: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
