"""Choosing an entry of a table by name, and other words of an error that helps."""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from xception_flax.text.errors import UserError

T = TypeVar("T")

MAX_LISTED = 30  # names in an error message
MAX_SHOWN = 120  # characters of a value in an error message


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
    """Returns `table[name]`.

    Raises:
      ValueError: there is no such entry; the message has the closest names, or all of them.
    """
    if name not in table:
        raise UserError(f"unknown {what} {written(name)}; {suggest(name, table)}")
    return table[name]


def suggest(name: str, names: Iterable[str], spell: Callable[[str], str] = str) -> str:
    """Words for an error message, to follow a semicolon: the names closest to `name`, then all, if they are few.

    Args:
      spell: how a name is written in the message, where that is not what is compared.
    """
    names = sorted(names)
    close = difflib.get_close_matches(str(name)[:MAX_SHOWN], names, n=3)
    hint = f"did you mean {' or '.join(repr(spell(n)) for n in close)}? " if close else ""
    if len(names) > MAX_LISTED:
        return hint.strip() or f"there are {len(names)}, and none is like it."
    return f"{hint}{'There' if hint else 'there'} are: {', '.join(map(spell, names)) if names else 'none'}."


def differing(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names that are missing in one of the rows, or whose values are not equal in all of them."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if any(name not in row or row[name] != rows[0].get(name) for row in rows)]


def written(value: object) -> str:
    """A value as an error message has it: written as in Python, and `cut`."""
    try:
        text = repr(value)
    except Exception:  # an integer of more than 4,300 digits, lists too deep, a class whose own `__repr__` fails
        text = f"a value of type {type(value).__name__} that cannot be written"
    return cut(text)


def cut(text: str) -> str:
    """A text of the user's as an error message has it: in one line, its middle left out where it is long."""
    text = text.replace("\n", " ")
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN // 2]} ... {text[-MAX_SHOWN // 4 :]}"
