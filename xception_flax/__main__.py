"""The door to all commands: `xception-flax VERB ...`, and the same as `python -m xception_flax VERB ...`."""

import importlib
import os
import signal
import sys
from typing import NoReturn

from xception_flax.host import signals

# Each is a module of `commands` with `main(argv)`; words before the first line of its own --help.
VERBS = {
    "evaluate": "evaluates a checkpoint of a run: a table, a picture of what is wrong, a line of JSON",
    "predict": "says what a trained network sees in images",
    "prepare": "writes a data set for training (imagenet, folder), or reads every image of one (check)",
    "show-data": "draws the images that a network would see, augmented and mixed",
    "summary": "says what a network is made of and what it costs",
    "recipe": "shows every key that a recipe takes: its value, type, default and meaning",
    "precompile": "compiles the training step for a TPU slice that is not there, and says what it costs",
}

USAGE = f"""\
usage: xception-flax VERB ...

Xception and its family in JAX. Training: python train.py --config FILE --workdir DIR

verbs:
{"".join(f"  {verb:<11} {what}" + chr(10) for verb, what in VERBS.items())}
xception-flax VERB --help shows a verb's arguments and examples."""


def main() -> NoReturn:
    # Before the imports below, which take seconds. Python's own handler would end in a traceback out of them.
    signal.signal(signal.SIGINT, signals.stop_at_once)
    arguments = sys.argv[1:]
    if arguments[:1] in (["--help"], ["-h"]):
        try:
            print(USAGE, flush=True)
        except OSError as error:  # at once, since Python's own end would try to print again
            os._exit(128 + signal.SIGPIPE if isinstance(error, BrokenPipeError) else 2)
        sys.exit(0)
    if not arguments:
        print(USAGE, file=sys.stderr)
        sys.exit(2)
    verb, *rest = arguments
    if verb not in VERBS:
        from xception_flax.text.lookup import suggest, written

        print(f"error: unknown verb {written(verb)}; {suggest(verb, VERBS)}", file=sys.stderr)
        sys.exit(2)
    if verb == "precompile":  # before JAX is imported, which asks for the hardware
        from xception_flax.planning import slices

        slices.hide_hardware()
    from xception_flax.commands import cli

    cli.run(importlib.import_module(f"xception_flax.commands.{verb.replace('-', '_')}").main, rest)


if __name__ == "__main__":
    main()
