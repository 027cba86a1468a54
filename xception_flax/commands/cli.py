"""What all commands share: arguments, the start on one host or several, quiet logs, errors in one line."""

import argparse
import contextlib
import difflib
import errno
import io
import itertools
import logging
import os
import re
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import logging as absl_logging

from xception_flax.host import allocator, compilation_cache, processes
from xception_flax.text import naming, sizes, values
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import MAX_SHOWN, written

# No data set has more images, and the bytes of so many fit in 64 bits. A larger count is refused as such.
MAX_COUNT = 10**10


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are UserErrors, of one line, and for which options may stand between positionals."""

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        if not any(action.nargs == argparse.PARSER for action in self._actions):  # else the words are of another parser
            self._check_spelling(itertools.takewhile(lambda word: word != "--", words))
        words, overrides = self._in_order(words)
        arguments, unknown = super().parse_known_args(words, namespace)
        return arguments, [*unknown, *overrides]

    def _check_spelling(self, words: Iterable[str]) -> None:
        """Raises UserError for an unknown option that is like one that exists; of others the caller knows what to say.

        Before argparse looks: to it, an option in another spelling is one that is missing.
        """
        for option in (word.partition("=")[0] for word in words if word.startswith("--")):
            if option in self._option_string_actions or option.startswith("--config."):
                continue
            if close := difflib.get_close_matches(option[:MAX_SHOWN], self._option_string_actions, n=1, cutoff=0.75):
                self.error(f"unknown option {written(option)}; did you mean {close[0]!r}?")

    def _in_order(self, args: Sequence[str]) -> tuple[list[str], list[str]]:
        """Returns the arguments with the positionals side by side, and the overrides.

        argparse fills `nargs="*"` and "?" at once, with what stands before the next option, and refuses what comes
        after it. `parse_intermixed_args` does not, but still stops at an override, an option that it does not know.
        """
        positionals = [action for action in self._actions if not action.option_strings]
        if not positionals or any(action.nargs == argparse.PARSER for action in positionals):
            return list(args), []
        left, words, options, overrides = list(args), [], [], []
        while left and left[0] != "--":
            word = left.pop(0)
            if word.startswith("--config."):
                overrides.append(word)
                if "=" not in word:  # the next word was meant for its value, as the error says
                    overrides += left[:1]
                    del left[:1]
            elif not _is_option(word):
                words.append(word)
            else:
                options.append(word)
                count = _count_values(self._option_string_actions.get(word), left)
                options += left[:count]
                del left[:count]
        return ([*options, "--", *words, *left[1:]] if left else [*words, *options]), overrides

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}{'' if message.endswith('?') else ';'} --help shows what there is.")

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file, flush=True)  # argparse's own ignores that a disk is full


def _is_option(word: str) -> bool:
    """Returns whether argparse takes a word for an option; '-' alone, a number and what has a space are none."""
    return len(word) > 1 and word[0] == "-" and " " not in word.partition("=")[0] and not _is_of_type(float, word)


def _count_values(action: argparse.Action | None, words: Sequence[str]) -> int:
    """Returns how many of the words behind an option are its values: of `nargs="+"` those that are of its type."""
    if action is None or action.nargs == 0:
        return 0
    values = list(itertools.takewhile(lambda word: word != "--" and not _is_option(word), words))
    most = len(values) if action.nargs == "+" else 1
    of_type = list(itertools.takewhile(lambda word: _is_of_type(action.type, word), values[1:most]))
    return len(values[:1]) + len(of_type)  # whether the first is of the type is for argparse to say


def _is_of_type(kind: Any, word: str) -> bool:
    try:
        kind(word)
    except (ValueError, TypeError):
        return False
    return True


def directory(text: str) -> Path:
    """The type of an argument that names a folder."""
    if not text:  # from an unset variable in a script; Path('') would be the working directory
        raise argparse.ArgumentTypeError("must be a path, got ''")
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is no path of a file system; mount the bucket and give its path")
    return Path(text)


def positive(text: str) -> int:
    """The type of an argument that counts something."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {written(text)}")
    if number > MAX_COUNT:
        raise argparse.ArgumentTypeError(f"must be at most {MAX_COUNT:,}, got {written(text)}")
    return number


def _silent_seconds(text: str) -> int:
    """The type of `--silent-seconds`."""
    if (seconds := positive(text)) < processes.LEAST_SILENT_SECONDS:
        raise argparse.ArgumentTypeError(
            f"must be at least {processes.LEAST_SILENT_SECONDS}, since a process gives a sign of life each "
            f"{processes.LOOK_SECONDS} s, got {seconds}"
        )
    return seconds


def image_size(text: str) -> int | tuple[int, int]:
    """The type of an argument that is an image size: 299, or 224x320 for height x width."""
    try:
        size = values.parse("", text, sizes.ImageSize)
    except UserError:
        raise argparse.ArgumentTypeError(f"must be {sizes.EXPECTED}, got {written(text)}") from None
    if not 1 <= min(sizes.sides(size)) <= max(sizes.sides(size)) <= MAX_COUNT:
        raise argparse.ArgumentTypeError(f"must be positive and at most {MAX_COUNT:,}, got {written(text)}")
    return size


def parser(prog: str, description: str | None, examples: str, *, hosts: bool = True) -> argparse.ArgumentParser:
    """Returns a parser; `hosts` adds the arguments for a run on several hosts."""
    arguments = _Parser(
        prog=prog,
        description=description,
        epilog="examples:\n" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if not hosts:
        arguments.set_defaults(
            distributed=False, coordinator=None, num_processes=None, process_id=None, silent_seconds=None
        )
        return arguments
    group = arguments.add_argument_group("several hosts (run the same command on each)")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="find the other hosts by the cluster's own means (TPU pod, Slurm, mpirun)",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, where there is no such means")
    group.add_argument("--num-processes", type=int, metavar="N", help="with --coordinator: processes in all")
    group.add_argument("--process-id", type=int, metavar="I", help="with --coordinator: number of this one, from 0")
    group.add_argument(
        "--silent-seconds",
        type=_silent_seconds,
        default=processes.SILENT_SECONDS,
        metavar="S",
        help="a process of which nothing is heard for so long is dead, and all others end "
        f"({processes.SILENT_SECONDS}; at least {processes.LEAST_SILENT_SECONDS})",
    )
    return arguments


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Adds which checkpoint of a run, and which of its weights. The default is one for all commands, and `load`'s."""
    parser.add_argument(
        "--checkpoint", default="best", metavar="WHICH", help="best (default), latest, or the number of a step"
    )
    parser.add_argument("--weights", choices=("raw", "ema"), help="default: ema if the recipe keeps them, else raw")


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Adds `--config` and the section of the help about its overrides, which `parse_known_args` leaves over."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:ARG]",
        help="the recipe, a file or the name of one of this project's, and its argument",
    )
    add_overrides(parser)


def add_overrides(
    parser: argparse.ArgumentParser, key: str = "KEY", what: str = "override a key of the recipe"
) -> None:
    """Adds a section to the help: `--config.KEY=VALUE`. To argparse such arguments are unknown."""
    parser.add_argument_group("overrides", f"--config.{key}=VALUE  {what}")


# What a command on a trained network says, if it runs out of memory.
LOWER_BATCH_SIZE = "Take a smaller --batch-size; the result does not depend on it."


def start(arguments: argparse.Namespace) -> None:
    """Connects the hosts, enables the compilation cache, sets the allocator and quiets the libraries.

    Must be called before JAX opens a device.

    Raises:
      UserError: the arguments about hosts do not go together, another host is missing, or there is no device.
    """
    absl_logging.set_verbosity(absl_logging.ERROR)
    if not _wants_traceback():
        _say_failed_saves_once()
    logging.getLogger("jax").setLevel(logging.ERROR)
    by_hand = (arguments.coordinator, arguments.num_processes, arguments.process_id)
    if any(value is not None for value in by_hand):
        if None in by_hand or arguments.distributed:
            raise UserError("--coordinator, --num-processes and --process-id go together, without --distributed.")
        processes.connect(*by_hand, arguments.silent_seconds)
    elif arguments.distributed:
        processes.connect_cluster(arguments.silent_seconds)
    try:
        platform = jax.devices()[0].platform
    except RuntimeError as error:
        raise UserError(f"JAX finds no device to run on: {str(error).splitlines()[0]}") from None
    compilation_cache.enable()
    if platform == "cpu":
        allocator.keep_freed_memory()
    if platform == "cpu" and os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "1":  # set by JAX, not by the user
        # For many Intel CPUs XLA notes that gather and scatter are slow. When it loads a program from the cache, it
        # takes the note for a feature that the CPU lacks, and logs kilobytes about it, though nothing is wrong
        # (jax-ml/jax#38445). Real errors are raised as well as logged.
        jax.config.update("jax_logging_level", "CRITICAL")


def _say_failed_saves_once() -> None:
    """Silences the thousand lines that threads print when a save fails; the error is raised once in any case.

    Orbax logs it in each thread, and asyncio for each task whose result was not read. TensorStore delivers results to
    event loops that are closed, or to an interpreter that is shutting down.
    """
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)

    def unraisable(what: "sys.UnraisableHookArgs") -> None:
        if str(what.exc_value) != "Event loop is closed" and not isinstance(what.exc_value, ImportError):
            sys.__unraisablehook__(what)

    sys.unraisablehook = unraisable


# No space or quota left, a broken disk, a disk that became read-only: for the user to fix, whatever was being written.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


def run(main: Callable[[list[str]], int], argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command on `argv`, or the arguments of this process, and exits with its code.

    A UserError is printed, and the code is 2. Any other error is a defect and keeps its traceback; with
    XCEPTION_FLAX_TRACEBACK=1 every error does. If one of several processes fails, the others are told and end too.
    """
    _make_streams_lenient()
    try:
        code, message = _outcome(main, sys.argv[1:] if argv is None else list(argv))
    except Exception as error:
        processes.end(1, "".join(traceback.format_exception(error)), error)
        raise
    if message is None:
        processes.leave()
    else:
        processes.end(code, message)
        if message:
            print(message, file=sys.stderr)
    sys.exit(code)


def _make_streams_lenient() -> None:
    """Keeps commands from failing on a closed stream or a letter that it cannot encode: results matter more."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by `>&-`
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for letters that its encoding lacks


def _outcome(main: Callable[[list[str]], int], argv: list[str]) -> tuple[int, str | None]:
    """Returns the exit code and, if the command failed, the message to print; '' prints nothing."""
    try:
        code = main(argv)
        sys.stdout.flush()
        return code, None
    except BrokenPipeError:
        if not _nobody_reads(sys.stdout.fileno()):
            raise
        _drop_what_stdout_cannot_take()
        return 128 + signal.SIGPIPE, ""
    except UserError as error:
        if _wants_traceback():
            raise
        return error.exit_code, _complaint(str(error))
    except OSError as error:
        if error.errno not in DISK_ERRORS or _wants_traceback():
            raise
        _drop_what_stdout_cannot_take()
        return 2, _complaint(f"{error.filename or 'a file or standard output'}: {error.strerror}.")
    except KeyboardInterrupt:
        return 128 + signal.SIGINT, "\ninterrupted"


def _drop_what_stdout_cannot_take() -> None:
    """Python flushes standard output once more at its exit; if that fails, it prints a traceback and exits with 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _wants_traceback() -> bool:
    return bool(os.environ.get("XCEPTION_FLAX_TRACEBACK"))


def complain(message: str) -> None:
    """Prints a user's error, of one or more lines, on standard error."""
    print(_complaint(message), file=sys.stderr)


def _complaint(message: str) -> str:
    return "\n".join(map(naming.harmless, f"error: {message}".split("\n")))


def _nobody_reads(pipe: int) -> bool:
    """Returns whether the reader of a pipe has gone, as `head` does after its last line."""
    poll = select.poll()
    poll.register(pipe, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


@contextlib.contextmanager
def out_of_memory(advice: str) -> Iterator[None]:
    """Turns an out-of-memory error, of the host or a device, into a UserError with advice.

    Raises:
      UserError: memory ran out within the context.
    """
    try:
        yield
    except (ValueError, OSError):  # some libraries call a full disk RESOURCE_EXHAUSTED too
        raise
    except Exception as error:  # JAX and OpenCV have their own types, and JAX two codes
        reason = re.search(r"(RESOURCE_EXHAUSTED|out of memory|insufficient memory).*", str(error), re.IGNORECASE)
        if reason is None and not isinstance(error, MemoryError):
            raise
        what = reason[0].rstrip(".")[:200] if reason else str(error) or "MemoryError"
        raise UserError(f"it does not fit into memory: {what}.\n{advice}") from error
