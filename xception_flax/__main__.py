"""Entry point of all commands: `xception-flax VERB ...`, the same as `python -m xception_flax VERB ...`."""

import functools
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from xception_flax import __version__
from xception_flax.host import libraries, signals

# Each verb but `train` is a module of `commands` with `main(argv)`. The modules import slowly, so the words are here.
VERBS = {
    "train": "trains a network by a recipe; the same as python train.py",
    "evaluate": "evaluates a trained network: a table, a report, a record, every prediction",
    "predict": "predicts the classes of images",
    "explain": "draws where in an image the evidence for its class is, and which images look alike",
    "demo": "opens a page in the browser to try a network: an image in, classes and evidence out",
    "embed": "writes the pooled features of images",
    "convert": "reads weights of any library and writes them for another",
    "export": "writes a network as a program for JAX or another runtime, and compares it with the network",
    "prepare": "writes a data set for training (imagenet, folder), or reads every image of one (check)",
    "show-data": "draws images as the network sees them, augmented and mixed",
    "summary": "shows parameters, multiply-adds and activations of a network",
    "recipe": "shows every key of a recipe: value, type, default and meaning",
    "replay": "computes a step of a run again, layer by layer: why a loss or a gradient is not finite",
    "reproduce": "tries the paper's claims on small networks, and writes what the results support",
    "doctor": "shows versions, devices, memory and settings, and runs a training step on each backend",
    "precompile": "compiles the training step for TPUs or GPUs, without one: memory, traffic, estimated time",
}

# These use a network, and do without the extra 'train' of pyproject.toml.
USE = ("predict", "explain", "demo", "embed", "convert", "export", "summary", "recipe", "doctor")

USAGE = f"""\
usage: xception-flax VERB ...

Xception and its family in JAX.

verbs:
{"".join(f"  {verb:<11} {what}" + chr(10) for verb, what in VERBS.items())}
xception-flax VERB --help shows a verb's arguments and examples, xception-flax --version the version.
xception-flax --completion writes what bash and zsh need to complete verbs, options, recipes and their keys."""


def main() -> NoReturn:
    # Before the imports below, which take seconds: Python's own handler would print a traceback from inside them.
    signals.handle_before_imports()
    arguments = sys.argv[1:]
    if arguments[:1] == ["help"]:  # `help` or `help VERB`
        arguments = [*arguments[1:2], "--help"]
    if arguments[:1] in (["--help"], ["-h"], ["--version"]):
        try:
            print(f"xception-flax {__version__}" if arguments[0] == "--version" else USAGE, flush=True)
        except OSError as error:  # exits at once, because Python's normal exit would try to print again
            if isinstance(error, BrokenPipeError):
                os._exit(128 + signal.SIGPIPE)
            print(f"error: standard output: {error.strerror}.", file=sys.stderr, flush=True)
            os._exit(2)
        sys.exit(0)
    if not arguments:
        print(USAGE, file=sys.stderr)
        sys.exit(2)
    verb, *rest = arguments
    if verb == "--completion":
        _complete()
    if verb not in VERBS:
        from xception_flax.text.lookup import suggest, written

        print(f"error: unknown verb {written(verb)}; {suggest(verb, VERBS)}", file=sys.stderr)
        sys.exit(2)
    asks = "--help" in rest or "-h" in rest
    libraries.check_libraries(training=verb not in USE and not asks)
    if verb == "precompile":  # before the import of JAX, which looks for hardware
        from xception_flax.planning import machines

        machines.hide_hardware()
    from xception_flax.commands import cli

    try:
        found = command(verb)
    except ModuleNotFoundError:  # `prepare` is made of libraries of the extra, and does not even show its help
        libraries.check_libraries(training=True)
        raise
    cli.run(found, rest)


def _complete() -> NoReturn:
    libraries.check_libraries(training=False)
    from xception_flax.commands import cli, completion

    def asked(verb: str) -> Callable[[list[str]], int]:
        try:
            return command(verb)
        except ModuleNotFoundError:  # `prepare` without the extra, as above: its options are left out
            if not libraries.missing_of(libraries.TRAINING):
                raise
            return lambda argv: 0

    def write(argv: list[str]) -> int:
        print(completion.script({verb: asked(verb) for verb in VERBS}), end="", flush=True)
        return 0

    cli.run(write, [])


def command(verb: str) -> Callable[[list[str]], int]:
    if verb != "train":
        return importlib.import_module(f"xception_flax.commands.{verb.replace('-', '_')}").main
    from xception_flax.host.project import TRAIN

    spec = importlib.util.spec_from_file_location("train", TRAIN)
    module = sys.modules["train"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return functools.partial(module.main, program="xception-flax train")


if __name__ == "__main__":
    # Python adds the working directory, which the script does not have: a recipe must import the same by both.
    if not sys.flags.safe_path and sys.path[0] != str(Path(__file__).parents[1]):
        del sys.path[0]
    main()
