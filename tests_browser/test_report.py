"""The page of `evaluate` in Chromium: its table sorts at a click, and the page loads nothing."""

import shutil

import numpy as np
import pytest
from playwright.sync_api import sync_playwright

from tests.reports import predicted
from tests.reports.test_page import ABOUT, RESULTS
from xception_flax.reports import figures, page, scores

NAMES = ["10", "b", "2", "a", "ä", "Infinity pool", "never seen"]
COLUMNS = ("class", "images", "predicted", "correct", "precision", "recall", "F1", "ROC AUC", "average precision")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Of 300 images, none of the last class, whose recall is therefore unknown."""
    made = predicted.single(np.random.default_rng(0), 300, len(NAMES) - 1)
    probabilities = np.pad(made.probabilities, [(0, 0), (0, 1)])
    p = predicted.of(made.labels, probabilities, NAMES)
    found = scores.compute(p)
    pictures = {"confusion": figures.confusion(found, NAMES), "curves": figures.curves(found, p)}
    pictures |= {"reliability": figures.reliability(found)}
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(page.page(found, NAMES, ABOUT, RESULTS, pictures, None), encoding="utf-8")
    return path, found.classes


@pytest.fixture
def opened(report):
    """The page in a browser, and what it asked for and complained of."""
    path, _ = report
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab, asked, said = browser.new_page(), [], []
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.goto(path.as_uri())
        yield tab, asked, said
        browser.close()


def names_of(tab) -> list[str]:
    return tab.locator("table:has(th.sorts) tbody tr td:first-child").all_inner_texts()


def test_a_click_sorts_and_another_turns_it(report, opened):
    """By numbers, not by their digits; a class whose value is unknown is least; equal ones keep their order."""
    (tab, asked, said), (_, classes) = opened, report
    heads = tab.locator("th.sorts")
    assert tuple(heads.all_inner_texts()) == COLUMNS
    assert names_of(tab) == NAMES
    columns = {
        "images": classes.support,
        "predicted": classes.predicted,
        "correct": classes.correct,
        "precision": classes.precision[:, 0],
        "recall": classes.recall[:, 0],
        "F1": classes.f1[:, 0],
        "ROC AUC": classes.auc[:, 0],
        "average precision": classes.average_precision[:, 0],
    }
    assert np.isnan(columns["recall"]).tolist() == [False] * 6 + [True]
    assert (columns["images"] > 9).sum() == 6
    order = np.arange(len(NAMES))
    for name, values in columns.items():
        least = np.where(np.isnan(values), -np.inf, [float(f"{value:.9g}") for value in values])
        for sign in (1, -1):
            tab.locator("th.sorts", has_text=name).first.click()
            order = order[np.argsort(sign * least[order], kind="stable")]
            assert names_of(tab) == [NAMES[i] for i in order], name
    assert not said
    assert all(url.startswith(("file:", "data:")) for url in asked)


def test_names_sort_as_numbers_and_then_as_text(opened):
    tab, _, said = opened
    tab.locator("th.sorts").first.click()
    assert names_of(tab) == ["2", "10", "Infinity pool", "a", "b", "never seen", "ä"]
    tab.locator("th.sorts").first.click()
    assert names_of(tab) == ["ä", "never seen", "b", "a", "Infinity pool", "10", "2"]
    assert not said
