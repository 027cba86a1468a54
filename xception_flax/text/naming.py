"""Names that others gave - of files, folders, classes - as text that can be printed, drawn and stored.

A file's name is bytes. Python makes a string of them by the locale, and bytes that are no text become
lone surrogates, which no terminal, font or parser of JSON takes; and what is text may have line breaks,
a terminal's commands and marks that turn the rest of a line around. In here each of those is written as
Python writes it in a literal: `\\xe9` for a byte that is not UTF-8, `\\n`, `\\x1b`, `\\u202e`.
"""

import json
import os
import re
import unicodedata
from collections.abc import Callable
from typing import Any

_SURROGATE = r"\ud800-\udfff"
# Controls, line and paragraph separators, what overrides, embeds or isolates a direction of writing, and spaces that
# look like another or like nothing. Joiners stay: emoji and the scripts of India and Persia are written with them.
_SPACE = r"\xa0\xad\u180e\u2000-\u200b\u205f-\u2064\u2800\u3164\ufeff\uffa0"
_HARMFUL = rf"[\x00-\x1f\x7f-\x9f\u2028-\u202f\u2066-\u2069{_SPACE}{_SURROGATE}]"
# A backslash is doubled where it would read as one of ours, and spaces are shown where nobody sees them.
_SHOWN = re.compile(rf"{_HARMFUL}|\\(?=[xuUnrt\\]|{_HARMFUL}| +\Z)|^ +| +\Z")
_STORED = re.compile(rf"[{_SURROGATE}]|\\(?=\\|x[89a-f][0-9a-f]|ud[89a-f][0-9a-f]{{2}}|[{_SURROGATE}])")
_RESTORED = re.compile(r"\\(?:\\|x([89a-f][0-9a-f])|u(d[89a-f][0-9a-f]{2}))")


def decoded(name: str | os.PathLike[str]) -> str:
    """Returns the name of a file, or its path, decoded as UTF-8, whatever the locale is.

    A byte that is not UTF-8 is a lone surrogate in it, as in Python's own file names under UTF-8.
    """
    name = os.fspath(name)
    try:
        return os.fsencode(name).decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # no name of a file here: the locale has no such letters
        return name


def composed(name: str) -> str:
    """Returns `name` in Unicode's composed form (NFC), in which names are compared, sorted and hashed.

    'é' is one character there or two: macOS and some archives write file names in the other form, and who sees
    them sees no difference. A file is opened by its own name.
    """
    return unicodedata.normalize("NFC", name)


def canonical(name: str | os.PathLike[str]) -> str:
    """Returns the name of a file as names of files are compared, sorted and hashed: decoded, and composed.

    It is the same for one file under every locale, and for its copies on every system.
    """
    return composed(decoded(name))


def is_unicode(name: str | os.PathLike[str]) -> bool:
    """Whether a name, as Python has it, is Unicode: libraries in C++ take no other."""
    return re.search(f"[{_SURROGATE}]", os.fspath(name)) is None


def shown(name: str | os.PathLike[str]) -> str:
    """Returns a name in a line of visible text; two that differ stay different.

    To be applied to a name once, where it gets into a message, a table or a picture.
    """
    return _SHOWN.sub(lambda match: escaped(match[0]), decoded(name))


def harmless(text: str) -> str:
    """Returns text with what does harm in it escaped, line breaks too; what `shown` returned stays as it is."""
    return re.sub(_HARMFUL, lambda match: escaped(match[0]), text)


def escaped(letters: str) -> str:
    """Returns a letter, or spaces, by its number."""
    code = ord(letters[0])
    if letters[0] == " ":
        return r"\x20" * len(letters)
    if 0xDC80 <= code <= 0xDCFF:
        return rf"\x{code - 0xDC00:02x}"
    if 0x80 <= code <= 0xFF:  # the same with x is a byte
        return rf"\u{code:04x}"
    return letters.encode("unicode_escape").decode()


def is_escape(text: str) -> bool:
    """Whether this is an escape, or the beginning of one."""
    return re.fullmatch(r"\\(x[0-9a-f]{0,2}|u[0-9a-f]{0,4}|U[0-9a-f]{0,8}|[nrt\\])", text) is not None


# JSON ----------------------------------------------------------------------------------------------


def to_json(value: Any, **options: Any) -> str:
    """Returns JSON that every parser reads; as `json.dumps`, but for strings, which `stored` makes."""
    return json.dumps(stored(value), **options)


def from_json(text: str) -> Any:
    """Returns what `to_json` was given.

    Raises:
      json.JSONDecodeError: it is no JSON.
    """
    return restored(json.loads(text))


def stored(value: Any) -> Any:
    """Returns JSON's values with all strings in them valid Unicode: a byte that is not UTF-8 becomes `\\xe9`.

    A backslash is doubled where it would read as such a byte, or stands before another; `restored` is the way back.
    """
    return _map_strings(lambda text: _STORED.sub(lambda match: escaped(match[0]), text), value)


def restored(value: Any) -> Any:
    """Returns what `stored` was given."""

    def letter(match: re.Match[str]) -> str:
        byte, surrogate = match.groups()
        return chr(0xDC00 + int(byte, 16)) if byte else chr(int(surrogate, 16)) if surrogate else "\\"

    return _map_strings(lambda text: _RESTORED.sub(letter, text), value)


def _map_strings(function: Callable[[str], str], value: Any) -> Any:
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {_map_strings(function, key): _map_strings(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(function, item) for item in value]
    return value
