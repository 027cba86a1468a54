"""Text of others in a picture: fonts that have its letters, its size on paper, cuts and line breaks.

Names of classes and folders are in any script, of any length, and no mathematics, whatever is in them. Scripts that run
from right to left, or whose letters change by their neighbours, are laid out by Matplotlib, from 3.11 on; before, each
letter stands by itself and in the order of the text.
"""

import functools
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from matplotlib import font_manager
from matplotlib.textpath import text_to_path

from xception_flax.text import naming

FONT = "DejaVu Sans"  # which Matplotlib brings along, for Latin, Greek, Cyrillic, Hebrew, Arabic and many signs

MAX_LETTERS = 500  # of a line

LEFT_TO_RIGHT = "\u200e"  # invisible: what stands beside it is not turned around with a Hebrew or Arabic neighbour
_JOINER, _REGIONAL = "\u200d", range(0x1F1E6, 0x1F200)


class Lettering:
    """How the texts of a picture are drawn: by which fonts, and what stands for a letter that none has.

    Such a letter is written by its number, as `\\u732b`, and a line on standard error says so.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        own = _letters_of_font()
        letters = frozenset(c for c in "".join(texts) if ord(c) not in own and c != "\n")
        self._families, self._missing = _choose_fonts(letters)

    def drawable(self, text: str) -> str:
        """Returns text in lines that the fonts can draw: nothing in it is a control, a box or half a letter."""
        return "\n".join(self._drawable_line(line) for line in text.split("\n"))

    def _drawable_line(self, line: str) -> str:
        if len(line) > MAX_LETTERS:  # more than any picture has room for, and each is measured
            line = f"{line[: MAX_LETTERS // 2]}…{line[-MAX_LETTERS // 2 :]}"
        line = "".join(naming.escaped(c) if c in self._missing else c for c in naming.harmless(line))
        return LEFT_TO_RIGHT + line if _runs_left(line) else line

    def write(self, put: Callable[..., Any], text: str, size: float) -> None:
        """Draws drawable text by a function of Matplotlib's such as `axes.set_title`; `size` in points."""
        put(text, fontsize=size, family=self._families, parse_math=False, usetex=False)

    def width(self, text: str, size: float) -> float:
        """The length of a line on paper, in points as its size."""
        font = font_manager.FontProperties(family=self._families, size=size)
        return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]

    def cut(self, lines: Iterable[str], room: float, size: float) -> dict[str, str]:
        """Returns for each line what fits into so many points: its beginning, or both ends where two look alike."""
        cut = {line: self._cut(line, room, size, tail=False) for line in set(lines)}
        alike = Counter(cut.values())
        return {
            line: self._cut(line, room, size, tail=True) if alike[short] > 1 else short for line, short in cut.items()
        }

    def _cut(self, line: str, room: float, size: float, *, tail: bool) -> str:
        if self.width(line, size) <= room:
            return line
        letters = list(_letters(line))
        if self.width(f"{letters[0]}…", size) > room:  # an escape, of which a part says more than nothing
            letters = list(line)

        def short(kept: int) -> str:
            after = kept // 2 if tail else 0
            return "".join([*letters[: kept - after], "…", *letters[len(letters) - after :]])

        kept = 1
        while kept + 1 < len(letters) and self.width(short(kept + 1), size) <= room:
            kept += 1
        return short(kept)

    def wrap(self, text: str, room: float, size: float) -> list[str]:
        """Returns the lines that text takes where so many points are free; a word is broken if it must be."""
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
    """Returns a name to stand within a line that is written from left to right, whatever the name is."""
    return name + LEFT_TO_RIGHT if _runs_left(name) else name


def _runs_left(text: str) -> bool:
    return any(unicodedata.bidirectional(c) in ("R", "AL") for c in text)


def _letters(text: str) -> Iterator[str]:
    """What a reader takes for one letter each, and no cut may part: with its marks, joined, or an escape of ours."""
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
    virama = unicodedata.combining(before) == 9 and unicodedata.category(c) == "Lo"  # a cluster of consonants
    return mark or conjoining or virama or before == _JOINER


# Fonts ---------------------------------------------------------------------------------------------


@functools.cache
def _letters_of_font() -> frozenset[int]:
    return frozenset(font_manager.get_font(font_manager.findfont(FONT)).get_charmap())


@functools.cache  # of a machine whose fonts lack letters one hears once
def _choose_fonts(letters: frozenset[str]) -> tuple[list[str], frozenset[str]]:
    """Returns the families that draw these letters, after `FONT`, and the letters that none has."""
    families = [FONT]
    missing = {c for c in letters if unicodedata.category(c) not in ("Cc", "Cs", "Co", "Cn")}
    none = letters - missing
    found = _fonts_with(missing) if missing else {}
    while missing and found:
        path = max(found, key=lambda path: len(found[path] & missing))  # the first of equals
        if not found[path] & missing:
            break
        missing -= found.pop(path)
        font_manager.fontManager.addfont(
            path
        )  # Matplotlib's own list is of the fonts that were there at its first start
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
    """The fonts of this machine that have some of the letters, upright and regular ones first."""
    listed = {entry.fname for entry in font_manager.fontManager.ttflist}
    found = {}
    for path in sorted(listed | set(font_manager.findSystemFonts()), key=_preference):
        if Path(path).name.startswith("LastResort"):  # Matplotlib's boxes
            continue
        try:
            font = font_manager.get_font(path)
            charmap = font.get_charmap() if font.scalable else {}  # emoji of many colours are not
        except (OSError, RuntimeError):  # a file that FreeType cannot read is no font to us
            continue
        found[path] = frozenset(c for c in letters if ord(c) in charmap)
        if found[path] == letters:
            break
    return found


def _preference(path: str) -> tuple[bool, str]:
    style = Path(path).stem.lower()
    styled = any(word in style for word in ("bold", "italic", "oblique", "black", "light", "thin", "mono", "cond"))
    return styled, path
