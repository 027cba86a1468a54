"""What docs/stability.md promises is still there: keys and names of recipes, verbs and options, what is exported."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import xception_flax
from golden import make_promised

ROOT = Path(__file__).parents[1]
PROMISED = json.loads((ROOT / "tests" / "golden" / "promised.json").read_text())


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    return make_promised.found()


@pytest.mark.parametrize("kind", PROMISED)
def test_nothing_that_was_promised_is_gone(found, kind):
    assert len(PROMISED[kind]) > 5
    assert set(PROMISED[kind]) <= set(found[kind])


def test_what_is_new_is_promised_with_the_next_version(found):
    """The list is complete: `python tests/golden/make_promised.py` adds to it, and takes nothing away."""
    assert {kind: sorted(names) for kind, names in found.items()} == PROMISED


def test_what_breaks_a_caller_is_gone_from_the_calls():
    def calls(function: Callable) -> set[str]:
        return set(make_promised.calls("f", function))

    before = calls(lambda x, y=1, *, z=2: None)
    assert before == {"f(x)", "f(x, y)", "f x=", "f y=", "f z="}
    for compatible in (
        lambda x=0, y=1, *, z=2: None,
        lambda x, y=1, new=0, *, z=2, other=3, **more: None,
        lambda x, y=1, z=2: None,
    ):
        assert before <= calls(compatible)
    for breaking in (
        lambda x, y=1, *, z: None,
        lambda x, y=1, *, z=2, new: None,
        lambda x, new, y=1, *, z=2: None,
        lambda x, *, y=1, z=2: None,
        lambda a, y=1, *, z=2: None,
        lambda x, y=1: None,
        lambda y, x=1, *, z=2: None,
    ):
        assert not before <= calls(breaking)


def test_the_version_has_its_place():
    """In the changelog, beside what is not released yet, and in the citation, with its day."""
    headings = re.findall(r"^## (\S+)(?: \((.*)\))?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    day = dict(headings[:2])[xception_flax.__version__]
    assert f"\nversion: {xception_flax.__version__}\ndate-released: {day}\n" in (ROOT / "CITATION.cff").read_text()
