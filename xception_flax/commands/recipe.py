"""Shows every key that a recipe takes, by group: its value, type, default and meaning.

A * marks a value that is not the default. KEY=VALUE is written as training takes it, after `--config.`
Values are checked as far as they can be without the data and the devices of a run.
"""

import os
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from xception_flax.commands import cli
from xception_flax.display import console
from xception_flax.recipes import reading, trial
from xception_flax.recipes.groups import PARTS
from xception_flax.recipes.signatures import Key
from xception_flax.runs.workdir import CONFIG, read_recipe
from xception_flax.text import naming, values

EXAMPLES = """\
  xception-flax recipe digits
  xception-flax recipe digits --config.model.name=lenet
  xception-flax recipe imagenet | grep -A2 decay
  xception-flax recipe imagenet --json
  xception-flax recipe runs/digits"""

WIDTH = 100  # of a line, in terminal cells; only long values exceed it
TYPE_COLUMN = 46


class Row(NamedTuple):
    """A key of the recipe as it is shown.

    Attributes:
      name: with its group, such as 'model.width'.
      key: its type, default and meaning.
      value: in this recipe.
      choices: the names of the table, if the value is one of them; else empty.
    """

    name: str
    key: Key
    value: Any
    choices: tuple[str, ...]

    @property
    def type(self) -> str:
        return values.describe(self.key.annotation).removeprefix("a ").removeprefix("an ")

    @property
    def meaning(self) -> str:
        return self.key.meaning + (f": {', '.join(self.choices)}" if self.choices else "")

    @property
    def default(self) -> Any:
        """The default, in the form that a resolved recipe has."""
        return values.check(self.name, self.key.default, self.key.annotation)


def main(argv: list[str]) -> int:
    parser = cli.parser("xception-flax recipe", __doc__, EXAMPLES, hosts=False)
    parser.add_argument("config", metavar="FILE[:ARG]|WORKDIR", help="the recipe, and its argument; or that of a run")
    parser.add_argument("--json", action="store_true", help="print a line of JSON instead: an object with every key")
    cli.add_overrides(parser)
    arguments, overrides = parser.parse_known_args(argv)
    workdir = Path(arguments.config)
    if arguments.config and os.path.isfile(workdir / CONFIG):
        config = reading.override(read_recipe(workdir), overrides, groups=None)
    else:
        config = reading.load(arguments.config, overrides)
    jax.config.update("jax_platforms", "cpu")  # the check needs no accelerator, which may be busy
    trial.check_values(config)
    if arguments.json:
        rows = (row for group in PARTS for row in _rows(group, config))
        print(naming.to_json({row.name: _record(row) for row in rows}, allow_nan=False))
        return 0
    print(naming.harmless(f"{arguments.config}: * is not the default; --config.KEY=VALUE sets a value"))
    for group, part in PARTS.items():
        selector = part.selector
        console.show_title(f"{group}: {config[group][selector]}" if selector else group or "outside of groups")
        for line in (line for row in _rows(group, config) for line in _lines(row)):
            print(naming.harmless(line))
    return 0


def _rows(name: str, config: ConfigDict) -> Iterator[Row]:
    """Yields the keys of a group in the order of its signatures. Group '' has the keys outside of groups."""
    group, chosen = PARTS[name], config[name] if name else config
    for key, described in group.keys(chosen[group.selector] if group.selector else "").items():
        choices = tuple(group.table) if key == group.selector else ()
        yield Row(f"{name}.{key}" if name else key, described, chosen[key], choices)


def _record(row: Row) -> dict[str, Any]:
    default = {} if row.key.is_required else {"default": row.default}
    return {"value": row.value, "type": row.type, **default, "meaning": row.meaning}


def _lines(row: Row) -> Iterator[str]:
    """Yields a line with value, type and default, or two if that is too long; then the meaning."""
    text = values.as_text(row.value, row.key.annotation)
    marker, default = "*", "required"
    if not row.key.is_required:
        marker = " " if row.value == row.default else "*"
        default = f"default {values.as_text(row.default, row.key.annotation) or repr('')}"
    assignment = f"{marker} {row.name}={_quoted(text)}"
    if len(assignment) >= TYPE_COLUMN:
        yield assignment
        assignment = ""
    yield f"{assignment:{TYPE_COLUMN}}{row.type}, {default}"
    yield from textwrap.wrap(row.meaning, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _quoted(text: str) -> str:
    """Quotes a value for a shell: in double quotes if it has single ones and nothing that a shell expands."""
    if "'" in text and not set(text) & set('"$`\\!'):
        return f'"{text}"'
    return shlex.quote(text) if text else ""
