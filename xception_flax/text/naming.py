"""Names of files, folders and classes as text that can be printed, drawn and stored.

A file's name is bytes. Python decodes it by the locale and turns bytes that are not text into lone surrogates, which
terminals, fonts and JSON parsers reject. A valid name may still contain line breaks, terminal commands and marks that
reverse the rest of a line. This module escapes all of these as a Python literal does: `\\xe9` for a byte that is not
UTF-8, `\\n`, `\\x1b`, `\\u202e`.
"""

import json
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_SURROGATE = r"\ud800-\udfff"
# Control characters, line and paragraph separators, marks that change the direction of writing, and spaces that are
# invisible or look like another. Joiners are allowed: emoji and the scripts of India and Persia need them.
_SPACE = r"\xa0\xad\u180e\u2000-\u200b\u205f-\u2064\u2800\u3164\ufeff\uffa0"
_HARMFUL = rf"[\x00-\x1f\x7f-\x9f\u2028-\u202f\u2066-\u2069{_SPACE}{_SURROGATE}]"
# A backslash is doubled where it would look like one of our escapes. Spaces at either end are escaped.
_SHOWN = re.compile(rf"{_HARMFUL}|\\(?=[xuUnrt\\]|{_HARMFUL}| +\Z)|^ +| +\Z")
_STORED = re.compile(rf"[{_SURROGATE}]|\\(?=\\|x[89a-f][0-9a-f]|ud[89a-f][0-9a-f]{{2}}|[{_SURROGATE}])")
_RESTORED = re.compile(r"\\(?:\\|x([89a-f][0-9a-f])|u(d[89a-f][0-9a-f]{2}))")


def decoded(name: str | os.PathLike[str]) -> str:
    """Returns the name or path of a file decoded as UTF-8, whatever the locale is.

    A byte that is not UTF-8 becomes a lone surrogate, as in Python's own file names under UTF-8.
    """
    name = os.fspath(name)
    try:
        return os.fsencode(name).decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # not the name of a file on this machine: the locale lacks these letters
        return name


def composed(name: str) -> str:
    """Returns `name` in Unicode's composed form (NFC), in which names are compared, sorted and hashed.

    'é' is one character in this form and two in the other, and both look the same. macOS and some archives write
    file names in the other form. To open a file, use its own name.
    """
    return unicodedata.normalize("NFC", name)


def repeated(names: Iterable[str]) -> str | None:
    """Returns a name that is there more than once; None where all differ."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def canonical(name: str | os.PathLike[str]) -> str:
    """Returns the name of a file decoded and composed: the form to compare, sort and hash.

    A file and its copies have the same canonical name under every locale and on every system.
    """
    return composed(decoded(name))


def is_unicode(name: str | os.PathLike[str]) -> bool:
    """Whether a name is valid Unicode. Libraries in C++ accept no other."""
    return re.search(f"[{_SURROGATE}]", os.fspath(name)) is None


def shown(name: str | os.PathLike[str]) -> str:
    """Returns a name as one line of visible text. Different names stay different.

    Apply it to a name once, where the name enters a message, a table or a picture.
    """
    return _SHOWN.sub(lambda match: escaped(match[0]), decoded(name))


def harmless(text: str) -> str:
    """Returns text with its harmful characters escaped, line breaks too. It does not change the result of `shown`."""
    return re.sub(_HARMFUL, lambda match: escaped(match[0]), text)


def escaped(letters: str) -> str:
    """Returns the escape of a character, or of each of several spaces."""
    code = ord(letters[0])
    if letters[0] == " ":
        return r"\x20" * len(letters)
    if 0xDC80 <= code <= 0xDCFF:
        return rf"\x{code - 0xDC00:02x}"
    if 0x80 <= code <= 0xFF:  # not \x, which stands for a byte
        return rf"\u{code:04x}"
    return letters.encode("unicode_escape").decode()


def is_escape(text: str) -> bool:
    """Whether `text` is an escape, or the beginning of one."""
    return re.fullmatch(r"\\(x[0-9a-f]{0,2}|u[0-9a-f]{0,4}|U[0-9a-f]{0,8}|[nrt\\])", text) is not None


# JSON ----------------------------------------------------------------------------------------------


def to_json(value: Any, **options: Any) -> str:
    """Returns JSON that every parser reads: `json.dumps`, with all strings as `stored` returns them."""
    return json.dumps(stored(value), **options)


def to_json_line(values: Mapping[str, Any]) -> str:
    """Returns a line of JSON for a record or a result. NaN and infinity, which JSON lacks, become null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return to_json(finite, allow_nan=False)


def from_json(text: str) -> Any:
    """Returns the value that `to_json` was given.

    Raises:
      json.JSONDecodeError: `text` is not JSON.
    """
    return restored(json.loads(text))


def stored(value: Any) -> Any:
    """Returns a JSON value with all its strings valid Unicode: a byte that is not UTF-8 becomes `\\xe9`.

    A backslash is doubled before another, and where it would look like such an escape. `restored` is the inverse.
    """
    return _map_strings(lambda text: _STORED.sub(lambda match: escaped(match[0]), text), value)


def restored(value: Any) -> Any:
    """Returns the value that `stored` was given."""

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
