"""Looking up names in tables, and parts of error messages: suggestions, and values cut to size."""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from xception_flax.text.errors import UserError

T = TypeVar("T")

MAX_LISTED = 30  # names in an error message
MAX_LETTERS = 1500  # of them all
MAX_SHOWN = 120  # characters of a value in an error message


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
    """Returns `table[name]`.

    Raises:
      UserError: there is no such entry. The message lists the closest names, and all names if they are few.
    """
    if name not in table:
        raise UserError(f"unknown {what} {written(name)}; {suggest(name, table)}")
    return table[name]


def suggest(name: str, names: Iterable[str], spell: Callable[[str], str] = str) -> str:
    """Returns the end of an error message, after a semicolon: the names closest to `name`, then all if they are few.

    Args:
      name: that was not found.
      names: that exist.
      spell: returns a name as the message writes it.
    """
    names = sorted(names)
    listed = ", ".join(map(spell, names)) or "none"
    close = difflib.get_close_matches(str(name)[:MAX_SHOWN], names, n=3)
    hint = f"did you mean {' or '.join(repr(spell(n)) for n in close)}? " if close else ""
    if len(names) > MAX_LISTED or len(listed) > MAX_LETTERS:
        return hint.strip() or f"there are {len(names)}, and none is like it."
    return f"{hint}{'There' if hint else 'there'} are: {listed}."


def differing(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the names that are missing in one of the rows, or whose values are not equal in all of them."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if any(name not in row or row[name] != rows[0].get(name) for row in rows)]


def written(value: object) -> str:
    """Returns a value for an error message: as Python writes it, and `cut`."""
    try:
        text = repr(value)
    except Exception:  # an integer of more than 4,300 digits, lists too deep, a class whose own `__repr__` fails
        text = f"a value of type {type(value).__name__} that cannot be written"
    return cut(text)


def cut(text: str, most: int = MAX_SHOWN) -> str:
    """Returns a user's text for an error message: in one line, with its middle left out if it has more letters."""
    text = text.replace("\n", " ")
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 4 :]}"
