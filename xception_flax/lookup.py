"""Choosing an entry of a table by name, with an error that helps."""

import difflib
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")

MAX_LISTED = 30  # names in an error message


def composed(name: str) -> str:
    """Returns `name` in Unicode's composed form (NFC), in which names are compared, sorted and hashed.

    'é' is one character there or two: macOS and some archives write file names in the other form, and who sees
    them sees no difference. A file is opened by its own name.
    """
    return unicodedata.normalize("NFC", name)


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
    """Returns `table[name]`.

    Raises:
      ValueError: there is no such entry; the message has the closest names, or all of them.
    """
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; {suggest(name, table)}")
    return table[name]


def suggest(name: str, names: Iterable[str], spell: Callable[[str], str] = str) -> str:
    """Words for an error message, to follow a semicolon: the names closest to `name`, then all, if they are few.

    Args:
      spell: how a name is written in the message, where that is not what is compared.
    """
    names = sorted(names)
    close = difflib.get_close_matches(str(name), names, n=3)
    hint = f"did you mean {' or '.join(repr(spell(n)) for n in close)}? " if close else ""
    if len(names) > MAX_LISTED:
        return hint.strip() or f"there are {len(names)}, and none is like it."
    return f"{hint}{'There' if hint else 'there'} are: {', '.join(map(spell, names)) if names else 'none'}."
