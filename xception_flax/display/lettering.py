"""Users' text in a picture: fonts that have its letters, its size on paper, cuts and line breaks.

Names of classes and folders are in any script and of any length, and are never mathematics, whatever they contain.
Matplotlib 3.11 and later lays out scripts that run from right to left or join their letters. Before, each letter is
drawn by itself, in the order of the text.
"""

import functools
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.textpath import text_to_path

from xception_flax.text import naming

# Everything that draws imports this module, so these hold whatever a user's own settings are.
matplotlib.use("Agg")  # into files only, without a display
matplotlib.rcParams["text.usetex"] = False  # names are not LaTeX

FONT = "DejaVu Sans"  # comes with Matplotlib; has Latin, Greek, Cyrillic, Hebrew, Arabic and many signs

MAX_LETTERS = 500  # of a line

LEFT_TO_RIGHT = "\u200e"  # an invisible mark: text beside it is not reversed with a Hebrew or Arabic neighbour
_JOINER, _REGIONAL = "\u200d", range(0x1F1E6, 0x1F200)


class Lettering:
    """How the texts of a picture are drawn: in which fonts, and how to write letters that no font has.

    Such a letter is written as its number, such as `\\u732b`, and a line on standard error says so.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        own = _letters_of_font()
        letters = frozenset(c for c in "".join(texts) if ord(c) not in own and c != "\n")
        self._families, self._missing = _choose_fonts(letters)

    @property
    def style(self) -> dict[str, Any]:
        """How Matplotlib draws such text where `write` cannot: keywords of its texts."""
        return {"family": self._families, "parse_math": False, "usetex": False}

    def drawable(self, text: str) -> str:
        """Returns text that the fonts can draw, with the same lines and without control characters."""
        return "\n".join(self._drawable_line(line) for line in text.split("\n"))

    def _drawable_line(self, line: str) -> str:
        if len(line) > MAX_LETTERS:  # no picture has room for more, and each letter must be measured
            line = f"{line[: MAX_LETTERS // 2]}…{line[-MAX_LETTERS // 2 :]}"
        line = "".join(naming.escaped(c) if c in self._missing else c for c in naming.harmless(line))
        return LEFT_TO_RIGHT + line if _runs_left(line) else line

    def write(self, put: Callable[..., Any], text: str, size: float) -> None:
        """Draws `drawable` text with a Matplotlib function such as `axes.set_title`; `size` in points."""
        put(text, fontsize=size, **self.style)

    def width(self, text: str, size: float) -> float:
        """Returns the length of a line on paper; it and `size` are in points."""
        font = font_manager.FontProperties(family=self._families, size=size)
        return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]

    def cut(self, lines: Iterable[str], room: float, size: float) -> dict[str, str]:
        """Returns each line cut to `room` points: to its beginning, or to both ends where two cuts would look alike."""
        cut = {line: self._cut(line, room, size, tail=False) for line in set(lines)}
        alike = Counter(cut.values())
        return {
            line: self._cut(line, room, size, tail=True) if alike[short] > 1 else short for line, short in cut.items()
        }

    def _cut(self, line: str, room: float, size: float, *, tail: bool) -> str:
        if self.width(line, size) <= room:
            return line
        letters = list(_letters(line))
        if self.width(f"{letters[0]}…", size) > room:  # a long escape; a part of it is better than nothing
            letters = list(line)

        def short(kept: int) -> str:
            after = kept // 2 if tail else 0
            return "".join([*letters[: kept - after], "…", *letters[len(letters) - after :]])

        kept = 1
        while kept + 1 < len(letters) and self.width(short(kept + 1), size) <= room:
            kept += 1
        return short(kept)

    def wrap(self, text: str, room: float, size: float) -> list[str]:
        """Returns text in lines of at most `room` points. A word is broken only if it is longer than a line."""
        return [part for line in text.split("\n") for part in self._wrap(line, room, size)]

    def _wrap(self, line: str, room: float, size: float) -> list[str]:
        lines, current = [], ""
        for word in line.split(" "):
            longer = f"{current} {word}" if current else word
            if self.width(longer, size) <= room:
                current = longer
                continue
            lines += [current] if current else []
            current = ""
            for letter in _letters(word):
                if current and self.width(current + letter, size) > room:
                    lines, current = [*lines, current], ""
                current += letter
        return [*lines, current]


def embedded(name: str) -> str:
    """Returns a name for use in a left-to-right line, in whatever direction the name itself runs."""
    return name + LEFT_TO_RIGHT if _runs_left(name) else name


def _runs_left(text: str) -> bool:
    return any(unicodedata.bidirectional(c) in ("R", "AL") for c in text)


def _letters(text: str) -> Iterator[str]:
    """Yields what a reader sees as one letter and a cut must not split: a letter with its marks, or an escape."""
    cluster = ""
    for c in text:
        flags = _is_regional(c) and len(cluster) == 1 and _is_regional(cluster)
        escape = naming.is_escape(cluster + c)
        if cluster and not (flags or escape or _joins(cluster[-1], c)):
            yield cluster
            cluster = ""
        cluster += c
    if cluster:
        yield cluster


def _is_regional(c: str) -> bool:
    return ord(c) in _REGIONAL


def _joins(before: str, c: str) -> bool:
    """Whether `c` belongs to the letter before it."""
    mark = unicodedata.category(c) in ("Mn", "Mc", "Me", "Cf") or 0x1F3FB <= ord(c) <= 0x1F3FF  # skin tones
    conjoining = 0x1160 <= ord(c) <= 0x11FF  # the later parts of a Korean syllable
    virama = unicodedata.combining(before) == 9 and unicodedata.category(c) == "Lo"  # joins two consonants
    return mark or conjoining or virama or before == _JOINER


# Fonts ---------------------------------------------------------------------------------------------


@functools.cache
def _letters_of_font() -> frozenset[int]:
    return frozenset(font_manager.get_font(font_manager.findfont(FONT)).get_charmap())


@functools.cache  # so that missing letters are reported once
def _choose_fonts(letters: frozenset[str]) -> tuple[list[str], frozenset[str]]:
    """Returns `FONT` and further font families that draw these letters, and the letters that no font has."""
    families = [FONT]
    missing = {c for c in letters if unicodedata.category(c) not in ("Cc", "Cs", "Co", "Cn")}
    none = letters - missing
    found = _fonts_with(missing) if missing else {}
    while missing and found:
        path = max(found, key=lambda path: len(found[path] & missing))  # of equals the first
        if not found[path] & missing:
            break
        missing -= found.pop(path)
        font_manager.fontManager.addfont(path)  # Matplotlib's list has only the fonts found at its first start
        families.append(font_manager.ttfFontProperty(font_manager.get_font(path)).name)
    if missing:
        some = ", ".join(map(naming.escaped, sorted(missing)[:3]))
        print(
            f"no font of this machine has {len(missing)} of the letters of these names ({some}"
            f"{', ...' if len(missing) > 3 else ''}); they are drawn as such numbers. Fonts for most scripts (Debian): "
            "apt install fonts-noto-core fonts-noto-cjk fonts-symbola",
            file=sys.stderr,
        )
    return families, frozenset(missing | none)


def _fonts_with(letters: set[str]) -> dict[str, frozenset[str]]:
    """Returns the letters that each font of this machine has, upright and regular fonts first."""
    listed = {entry.fname for entry in font_manager.fontManager.ttflist}
    found = {}
    for path in sorted(listed | set(font_manager.findSystemFonts()), key=_preference):
        if Path(path).name.startswith("LastResort"):  # Matplotlib's font of boxes
            continue
        try:
            font = font_manager.get_font(path)
            charmap = font.get_charmap() if font.scalable else {}  # fonts of coloured emoji are not scalable
        except (OSError, RuntimeError):  # FreeType cannot read this file
            continue
        found[path] = frozenset(c for c in letters if ord(c) in charmap)
        if found[path] == letters:
            break
    return found


def _preference(path: str) -> tuple[bool, str]:
    style = Path(path).stem.lower()
    styled = any(word in style for word in ("bold", "italic", "oblique", "black", "light", "thin", "mono", "cond"))
    return styled, path
