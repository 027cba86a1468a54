"""The commands, one file each: arguments, calls and messages."""

import sys

# `python -m xception_flax.commands.X` imports this folder while sys.argv is still ['-m', ...]. X would do nothing.
if sys.argv[:1] == ["-m"]:
    print("error: a command is run as: xception-flax VERB, or python -m xception_flax VERB", file=sys.stderr)
    sys.exit(2)
