"""Any text is drawn: as plain text, in letters that a font has, within its space."""

import os
import subprocess
import sys
import warnings

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib import font_manager

from xception_flax.display import lettering, pictures
from xception_flax.display.lettering import Lettering
from xception_flax.runs import curves
from xception_flax.text import naming

ARC = "\u2312"  # of Matplotlib's own fonts, STIX has this letter and DejaVu does not
CAT = "\u732b"  # none of them has it


@pytest.fixture(autouse=True)
def no_fonts_but_matplotlibs(monkeypatch):
    """Hides the fonts of this machine. Matplotlib's warning of a missing letter is an error."""
    own = [entry for entry in font_manager.fontManager.ttflist if "mpl-data" in entry.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])
    lettering._choose_fonts.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    lettering._choose_fonts.cache_clear()


def drawn(text: str) -> plt.Text:
    figure, letters = plt.figure(), Lettering([text])
    letters.write(figure.suptitle, letters.drawable(text), 10)
    figure.canvas.draw()
    plt.close(figure)
    (title,) = figure.texts
    return title


def test_a_text_without_end_keeps_both_ends():
    """It is cut before its letters are measured."""
    text = "a" * 10**6 + "b"
    assert Lettering([text]).drawable(f"{text}\nc") == f"{'a' * 250}…{'a' * 249}b\nc"


@pytest.mark.parametrize("text", ["$", "$$", "a_$x^$", r"\frac{ $\frac{$", "100 % # & ~ {}"])
def test_no_text_is_mathematics(text):
    with plt.rc_context({"text.usetex": True, "text.parse_math": True}):
        title = drawn(text)
    assert title.get_text() == text
    assert not title.get_parse_math()
    assert not title.get_usetex()


def test_another_font_draws_what_the_first_lacks(capsys):
    title = drawn(f"arc {ARC}")
    assert title.get_text() == f"arc {ARC}"
    assert title.get_fontfamily() == ["DejaVu Sans", "STIXGeneral"]
    assert capsys.readouterr().err == ""


def test_a_letter_that_no_font_has_is_a_number_and_a_line(capsys):
    assert drawn(f"{CAT} {ARC} \ue000 \ud83d\nb").get_text() == f"\\u732b {ARC} \\ue000 \\ud83d\nb"
    drawn(f"{CAT} {ARC} \ue000 \ud83d\nb")
    assert capsys.readouterr().err == (
        "no font of this machine has 1 of the letters of these names (\\u732b); they are drawn as such numbers. Fonts "
        "for most scripts (Debian): apt install fonts-noto-core fonts-noto-cjk fonts-symbola\n"
    )


def test_a_font_that_was_installed_since_is_found(monkeypatch, capsys):
    """Matplotlib lists the fonts once, in a file. Here STIX is installed after that."""
    stix = font_manager.findfont("STIXGeneral")
    others = [entry for entry in font_manager.fontManager.ttflist if "STIX" not in entry.name]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", others)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [__file__, stix])  # and a file that is no font
    assert drawn(ARC).get_fontfamily() == ["DejaVu Sans", "STIXGeneral"]
    assert capsys.readouterr().err == ""


def test_what_is_cut_fits_and_stays_apart():
    names = ["i" * 60, "W" * 30, "é" * 40, "e\u0301" * 40, "dog of the kind 001", "dog of the kind 002", "cat"]
    letters = Lettering(names)
    cut = letters.cut(names, 60, 9)
    assert list(cut) == list(dict.fromkeys(cut))
    assert max(letters.width(short, 9) for short in cut.values()) <= 60
    assert len(set(cut.values())) == len(names)
    # By what is drawn: an i of 9 points takes up 2.5 and a W 8.9, an ellipsis 9.
    assert (cut["i" * 60], cut["W" * 30], cut["cat"]) == ("i" * 20 + "…", "W" * 5 + "…", "cat")
    assert cut["dog of the kind 001"] == "dog o… 001"
    assert cut["e\u0301" * 40] == "e\u0301" * (len(cut["e\u0301" * 40]) // 2) + "…"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cat", ["c", "a", "t"]),
        ("e\u0301\u0302a", ["e\u0301\u0302", "a"]),
        ("👩\u200d👩\u200d👧👍🏽", ["👩\u200d👩\u200d👧", "👍🏽"]),
        ("🇩🇪🇫🇷", ["🇩🇪", "🇫🇷"]),
        ("क्षत्रिय", ["क्ष", "त्रि", "य"]),
        ("\u1112\u1161\u11ab\u1100", ["\u1112\u1161\u11ab", "\u1100"]),
        (r"\u732b\xe9\\nb", [r"\u732b", r"\xe9", r"\\", "n", "b"]),
    ],
)
def test_letters_are_as_a_reader_sees_them(text, expected):
    assert list(lettering._letters(text)) == expected


def test_lines_are_broken_between_words_where_that_is_possible():
    letters = Lettering([])
    lines = letters.wrap(f"two words\n{'W' * 12} a", 64, 9)
    assert lines == ["two words", "W" * 7, "W" * 5 + " a"]


def test_names_from_right_to_left_keep_their_place():
    """An invisible mark on either side: without it '(93 %)' would stand between 'said' and the name."""
    letters = Lettering(["חתול"])
    assert letters.drawable("said חתול") == "\u200esaid חתול"
    assert letters.drawable("said cat") == "said cat"
    assert (lettering.embedded("חתול"), lettering.embedded("cat")) == ("חתול\u200e", "cat")


def test_any_name_is_drawn(tmp_path, capsys):
    names = ["$", "a_$x^$", CAT, "قطة", "חתול", "caf\udce9", "a\nb", "\x1b[31m", "\u202eabc", "", "   ", "x" * 300, ARC]
    images = [np.zeros((8, 8, 3), np.uint8)] * len(names)
    pictures.draw_mistakes(images, names, names[::-1], [0.5] * len(names), f"$ {CAT}", tmp_path / "m.png")
    pictures.draw_images(images, [naming.shown(name) for name in names], "$_\n\x1b", tmp_path / "s.svg")
    curves.draw_curves([{"step": 1, "train/loss": 1.0}], f"price_$$ {CAT} {'x' * 255}", tmp_path / "c.png")
    assert cv2.imread(str(tmp_path / "m.png")).shape[1] == 1540  # eight columns of 1.75 inches, 110 pixels each
    assert (
        capsys.readouterr().err.count("\\u732b") == 3
    )  # one line for each picture, since each lacks other letters too


def test_settings_of_the_user_change_no_picture(tmp_path):
    """They ask for LaTeX and for windows; a run's curves are drawn without either."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nbackend: TkAgg\n")
    program = (
        "import pathlib, sys; from xception_flax.runs import curves\n"
        "curves.draw_curves([{'step': 1, 'train/loss': 1.0}], 'a_b $x', pathlib.Path(sys.argv[1]))"
    )
    own = os.environ | {"MATPLOTLIBRC": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "curves.png")], env=own, check=True, timeout=120)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
