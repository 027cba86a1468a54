"""The record and the page: what they say, and that no name breaks them."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest

from tests.reports import predicted
from xception_flax.reports import comparing, figures, page, record, scores

NAMES = [
    "$$",
    "<b>bold</b>",
    "猫",
    "قطة",
    "חתול",
    "😀",
    "x" * 300,
    "a\nb",
    '"q" & \'',
    "</script>",
    "caf\udce9",
    "\u202eabc",
]
ABOUT = {
    "title": "run <i>",
    "source": "run <i>",
    "network": "Xception",
    "weights": {"sha256": "0" * 64, "file_sha256": None},
    "preprocessing": {"mean": (127.5,), "max_value": None},
    "data": {"source": "folder", "split": "<u>", "images": 300, "fingerprint": "f"},
    "libraries": {"jax": "1"},
    "device": "cpu",
    "devices": 1,
    "processes": 1,
    "date": "2026-01-01",
}
RESULTS = {"loss": 1.0, "count": 300}


class Reader(HTMLParser):
    """What a browser makes of a page: its elements, its text, what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.words, self.loads, self.titles = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        self.loads += [values[key] for key in ("src", "href") if key in values]
        self.titles += [values["title"]] if "title" in values else []

    def handle_data(self, data):
        self.words.append(data)


@pytest.mark.parametrize("ends", [False, True])
def test_no_name_breaks_the_page(ends, rng, capsys):
    """At either end of the list: the pictures have names only of few classes."""
    names = [*NAMES, *(f"c{i}" for i in range(40 if ends else 0))]
    p = predicted.single(rng, 300, len(names))._replace(class_names=names)
    found = scores.compute(p)
    pictures = {"confusion": figures.confusion(found, names), "curves": figures.curves(found, p)}
    pictures |= {"reliability": figures.reliability(found), "mistakes": pictures["curves"]}
    comparison = comparing.mcnemar(p.correct, ~p.correct, "<other>")
    text = page.page(found, names, ABOUT, RESULTS, pictures, comparison)
    text.encode()  # no lone surrogate
    read = Reader(text)
    assert read.tags.count("script") == read.tags.count("style") == 1
    assert read.tags.count("b") == len(found.overall) + 1  # a number each, and the loss
    assert not {"i", "u", "other"} & set(read.tags)
    assert all(load.startswith("data:image/png;base64,") for load in read.loads)
    assert len(read.loads) == 4
    shown = {"a\nb": r"a\nb", "caf\udce9": r"caf\xe9", "\u202eabc": r"\u202eabc"}
    for name in NAMES:
        assert shown.get(name, name) in read.words
        assert shown.get(name, name) in read.titles
    assert {"run <i>", "<u>", "<other>"} <= set(read.words)
    assert "default-src 'none'" in text


@pytest.mark.parametrize("count", [2, 30, 31, 1200])
def test_pictures_of_any_number_of_classes(count, rng):
    p = predicted.single(rng, 200, count)
    found = scores.compute(p)
    for content in (figures.confusion(found, p.class_names), figures.curves(found, p), figures.reliability(found)):
        assert content.startswith(b"\x89PNG")
        width, height = (int.from_bytes(content[i : i + 4]) for i in (16, 20))
        assert 400 < width < 3000
        assert 400 < height < 3000


def test_names_that_are_mathematics_or_lack_letters_are_drawn(rng):
    """Of up to ten classes the curves have names too."""
    p = predicted.single(rng, 100, 8)._replace(class_names=["$", "a_$x^$", "\\frac{", *NAMES[:5]])
    found = scores.compute(p)
    assert figures.curves(found, p).startswith(b"\x89PNG")
    assert figures.confusion(found, p.class_names).startswith(b"\x89PNG")


def test_several_labels_have_no_confusion(rng):
    p = predicted.several(rng, 100, 4)
    found = scores.compute(p)
    pictures = {"curves": figures.curves(found, p), "reliability": figures.reliability(found)}
    words = Reader(page.page(found, p.class_names, ABOUT, RESULTS | {"map": 0.25}, pictures, None)).words
    assert "all labels right" in words
    assert "Confusion" not in words
    assert "0.250" in words
    text = record.record(found, p.class_names, ABOUT, RESULTS | {"map": 0.25}, None)
    assert "confusion_matrix" not in json.loads(text)


def test_the_record_has_every_number_or_why_not():
    p = predicted.of(
        [0, 0, 0, 1], [[0.8, 0.2, 0], [0.6, 0.4, 0], [0.2, 0.2, 0.6], [0.9, 0.1, 0]], ["$$", "caf\udce9", "c"]
    )
    found = scores.compute(p, 1.0)
    read = json.loads(record.record(found, p.class_names, ABOUT, RESULTS, None))
    first, second, third = read["classes"]
    assert first["name"] == "$$"
    assert second["name"] == r"caf\xe9"
    assert first["recall"]["value"] == 2 / 3
    assert (first["support"], first["predicted"], first["correct"]) == (3, 3, 2)
    assert second["precision"] == {"value": None, "why": "never predicted"}
    assert third["recall"] == {"value": None, "why": "no images"}
    assert third["roc_auc"] == {"value": None, "why": "no images"}
    assert read["confusion_matrix"]["counts"] == [[2, 0, 1], [1, 0, 0], [0, 0, 0]]
    assert read["scores"]["top1"]["value"] == 0.5
    assert set(read["scores"]["top1"]) == {"value", "low", "high"}
    error = read["scores"]["expected_calibration_error"]
    assert (error["low"], error["high"], error["why"][:25]) == (None, None, "no interval: the score is")
    assert read["calibration"]["counts"] == found.calibration.counts.tolist()
    assert read["of"]["weights"]["sha256"] == "0" * 64
    one = scores.compute(predicted.of([0, 0], [[0.9, 0.1], [0.8, 0.2]]))
    classes = json.loads(record.record(one, ["a", "b"], ABOUT, RESULTS, None))["classes"]
    assert classes[0]["roc_auc"] == {"value": None, "why": "no images of other classes"}


def test_no_interval_is_said_in_the_record_and_left_out_of_the_page():
    p = predicted.of([0, 1] * 6, [[0.9, 0.1], [0.1, 0.9]] * 6)
    found = scores.compute(p, 1.0)
    read = json.loads(record.record(found, p.class_names, ABOUT, RESULTS, None))
    none = {"value": 1.0, "low": None, "high": None, "why": "no interval: the score is the same in every resample"}
    assert read["scores"]["balanced_accuracy"] == read["classes"][0]["f1"] == read["classes"][1]["roc_auc"] == none
    assert read["scores"]["top1"]["low"] == pytest.approx(0.7575, abs=5e-5)
    pictures = {name: figures.curves(found, p) for name in ("curves", "reliability", "confusion")}
    text = page.page(found, p.class_names, ABOUT, RESULTS, pictures, comparing.mcnemar(p.correct, p.correct, "same"))
    assert "<small>balanced accuracy</small><b>100.00 %</b><small>&nbsp;</small>" in text
    assert "<small>top-1 accuracy</small><b>100.00 %</b><small>(75.75 to 100.00 %)&nbsp;</small>" in text
    assert "(1.000 to" not in text
    assert "nan" not in " ".join(Reader(text).words)


def test_the_matrix_of_very_many_classes_is_a_list_of_cells(rng, monkeypatch):
    monkeypatch.setattr(record, "MAX_MATRIX", 3)
    p = predicted.single(rng, 50, 4)
    found = scores.compute(p)
    cells = json.loads(record.record(found, p.class_names, ABOUT, RESULTS, None))["confusion_matrix"]["cells"]
    matrix = np.zeros((4, 4))
    for row, column, number in cells:
        matrix[row, column] = number
    np.testing.assert_array_equal(matrix, found.confusion.toarray())
