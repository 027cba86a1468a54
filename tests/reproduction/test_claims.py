"""The rule, on differences whose answer is known."""

import math

import pytest

from xception_flax.reproduction import claims
from xception_flax.reproduction.claims import decide, interval, read_table, together
from xception_flax.text.errors import UserError


def test_the_interval_is_students():
    """Mean 2, standard error 1 / sqrt(3); 4.302653 is the 97.5 % quantile of t with 2 degrees of freedom (tables)."""
    mean, low, high = interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2.0, 2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))


def test_holm_takes_all_comparisons_together():
    """Of three, the least p has to be below 5 / 3 %, the next below 5 / 2 %; one that is not leaves all after it."""
    far, near, none = [-2.0, -2.2, -1.8], [1.0, 2.0, 2.0], [1.0, -1.0, 0.5]  # p 0.0033, 0.038, 0.81 by scipy
    assert claims.holm([near]) == [True]
    assert claims.holm([near, far]) == [True, True]
    assert claims.holm([none, near, far]) == [False, False, True]
    assert claims.holm([[-1.0] * 3, [0.0] * 3]) == [True, False]  # without any scatter
    assert claims.holm([]) == []


def test_the_interval_is_no_finer_than_half_an_image():
    assert interval([0.2, 0.2, 0.2], 0.05) == pytest.approx((0.2, 0.15, 0.25))
    assert decide([0.0, 0.0, 0.0], "worse", 0.05).word == "undecided"


@pytest.mark.parametrize(
    ("differences", "expected", "word"),
    [
        ([-2.0, -2.2, -1.8], "worse", "agree"),
        ([2.0, 2.2, 1.8], "worse", "disagree"),
        ([2.0, 2.2, 1.8], "better", "agree"),
        ([-2.0, -2.2, -1.8], "better", "disagree"),
        ([-2.0, 1.0, -1.0], "worse", "undecided"),
        ([-0.1, 0.1, 0.0], "equal", "agree"),
        ([0.1, 0.2, 0.15], "equal", "agree"),  # there is a difference, and it is within the margin
        ([2.0, 2.2, 1.8], "equal", "disagree"),
        ([-2.0, -2.2, -1.8], "equal", "disagree"),
        ([-0.6, 0.6, 0.1], "equal", "undecided"),
        ([0.4, 0.5, 0.6], "equal", "undecided"),  # the margin is within the interval
        ([2.0, 2.2, 1.8], "open", "open"),
        ([-2.0, -2.2], "worse", "too few seeds"),
        ([], "worse", "not run"),
    ],
)
def test_the_rule(differences, expected, word):
    assert decide(differences, expected).word == word


@pytest.mark.parametrize(
    ("differences", "expected", "more"),
    [
        ([-2.0, -2.2, -1.8], "worse", False),
        ([-2.0, 1.0, -1.0], "worse", True),
        ([-2.0, -0.5, -1.0], "worse", True),  # two and a half standard errors, and t of 2 degrees needs 4.3
        ([-0.1, 0.1, 0.0], "equal", True),  # agrees, but within two standard errors of 0
        ([0.1, 0.2, 0.15], "equal", False),
        ([-2.0, 1.0, -1.0], "open", True),
        ([-2.0], "worse", False),  # the seeds that it lacks come first
    ],
)
def test_more_seeds_where_these_do_not_decide(differences, expected, more):
    assert decide(differences, expected).needs_more == more


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (["agree", "agree"], "agree"),
        (["agree", "disagree"], "undecided"),
        (["agree", "undecided"], "undecided"),
        (["agree", "open"], "agree"),
        (["open"], "open"),
        (["not run", "not run"], "not run"),
        (["agree", "too few seeds"], "not all run"),
    ],
)
def test_what_comparisons_say_together(words, word):
    assert together(words) == word


def test_a_table_with_a_wrong_name_is_refused(tmp_path):
    text = """\
from xception_flax.reproduction.claims import Claim, Comparison, Setting
ABOUT, DATA_SETS, SETTINGS = "", {"digits": "digits"}, {"base": Setting("base")}
CLAIMS = [Claim("a", "A", "", [Comparison("base", "bass", "worse")])]
"""
    (tmp_path / "table.py").write_text(text)
    with pytest.raises(UserError, match=r"claim 'a' compares 'bass', which SETTINGS lacks"):
        read_table(tmp_path / "table.py")
    (tmp_path / "table.py").write_text(text.replace("bass", "base").replace("worse", "worst"))
    with pytest.raises(UserError, match=r"claim 'a' expects 'worst'; it must be one of better, worse, equal, open"):
        read_table(tmp_path / "table.py")
    (tmp_path / "table.py").write_text("CLAIMS = []")
    with pytest.raises(UserError, match="has no ABOUT"):
        read_table(tmp_path / "table.py")


def test_the_protocol_is_what_was_decided():
    """Changing one of these after runs are there would be choosing the rule by its result."""
    assert (claims.MIN_SEEDS, claims.MORE_SEEDS, claims.MARGIN, claims.CONFIDENCE) == (3, 5, 0.5, 0.95)
    assert (claims.FACTORS, claims.EXTENSIONS, claims.SEARCH_SEED) == ((0.5, 1.0, 2.0), 2, 1000)
