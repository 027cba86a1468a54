"""What is claimed, how it is tried, and the rule that decides: all of it is fixed before anything is run.

A table is a recipe's file, such as `configs/miniature.py`, with the names `ABOUT`, `DATA_SETS`, `SETTINGS` and `CLAIMS`
beside its `get_config`, which takes `DATA_SET/SETTING`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from xception_flax.recipes import reading
from xception_flax.text.errors import UserError

MIN_SEEDS = 3  # with fewer nothing is decided
MORE_SEEDS = 5  # where the first ones do not decide
SEARCH_SEED = 1000  # of the search of the learning rate; no result has it
FACTORS = (0.5, 1.0, 2.0)  # of the recipe's learning rate: the grid of the search
EXTENSIONS = 2  # steps by which the grid grows, while the best is at its edge
CONFIDENCE = 0.95
MARGIN = 0.5  # percentage points: smaller differences are none to speak of, where equality is claimed

# What is claimed of a setting beside its base; 'open' where nobody claimed anything, and a difference is only shown.
EXPECTATIONS = ("better", "worse", "equal", "open")

TOO_FEW = "too few seeds"  # of the words of a verdict


class Setting(NamedTuple):
    """A network or a way to train it.

    Attributes:
      title: what the page calls it.
      changes: value by full key of the recipe, such as 'model.residual', of all that differs from `base`.
      base: the setting whose recipe this changes; '' for one that changes nothing.
    """

    title: str
    changes: Mapping[str, Any] = {}
    base: str = ""


class Comparison(NamedTuple):
    """One difference: test accuracy of `setting` minus that of `base`, in percentage points, seed by seed.

    Attributes:
      setting, base: keys of `SETTINGS`.
      expected: one of `EXPECTATIONS`: what is claimed of `setting`.
      same_rate: whether `setting` is trained at the learning rate of `base`, not at its own.
      weights: of `setting`, 'ema' or 'raw'; those of `base` are always 'ema'.
      words: what the page adds to the title of the setting.
    """

    setting: str
    base: str
    expected: str
    same_rate: bool = False
    weights: str = "ema"
    words: str = ""


class Claim(NamedTuple):
    """A sentence of the paper, or a question that it leaves open.

    Attributes:
      name: for `--only`.
      title: the sentence.
      place: in the paper.
      comparisons: what tries it.
      axis: where settings have an order: a line of points by its name, a point as its tick and setting.
      axis_title: what the ticks of `axis` are.
      note: for the page, of what was found: written after a look at the results.
    """

    name: str
    title: str
    place: str
    comparisons: Sequence[Comparison]
    axis: Mapping[str, Sequence[tuple[str, str]]] = {}
    axis_title: str = ""
    note: str = ""


class Table(NamedTuple):
    """All claims of a recipe's file, on all its data sets.

    Attributes:
      path: of the file.
      about: what is trained on what, for the page.
      data_sets: what the page calls each.
      settings, claims: see there.
    """

    path: Path
    about: str
    data_sets: Mapping[str, str]
    settings: Mapping[str, Setting]
    claims: Sequence[Claim]

    def recipe(self, data_set: str, setting: str) -> str:
        """Returns the recipe of a setting, as `--config` takes it."""
        return f"{self.path}:{data_set}/{setting}"


def read_table(path: Path) -> Table:
    """Reads a table from its file.

    Raises:
      UserError: the file cannot be run, a name is missing, or a comparison is of settings that are not there.
    """
    about, data_sets, settings, claims = reading.read_names(str(path), ("ABOUT", "DATA_SETS", "SETTINGS", "CLAIMS"))
    for claim in claims:
        for comparison in claim.comparisons:
            for name in (comparison.setting, comparison.base):
                if name not in settings:
                    raise UserError(f"{path}: claim {claim.name!r} compares {name!r}, which SETTINGS lacks.")
            if comparison.expected not in EXPECTATIONS:
                raise UserError(
                    f"{path}: claim {claim.name!r} expects {comparison.expected!r}; it must be one of "
                    f"{', '.join(EXPECTATIONS)}."
                )
    return Table(path, about, data_sets, settings, claims)


# The rule ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the differences of one comparison say.

    Attributes:
      word: 'agree', 'disagree', 'undecided', 'open' (nothing is claimed), 'too few seeds' or 'not run'.
      differences: of each seed, in percentage points.
      mean, low, high: of the differences: their mean and its 95 % interval; NaN where there are too few.
      needs_more: whether `MORE_SEEDS` are to be run: it is undecided, or the mean is within two standard errors of 0.
    """

    word: str
    differences: tuple[float, ...]
    mean: float = math.nan
    low: float = math.nan
    high: float = math.nan
    needs_more: bool = False


def interval(differences: Sequence[float], resolution: float = 0.0) -> tuple[float, float, float]:
    """Returns mean, low and high: the 95 % interval of Student's t of the mean of paired differences.

    Args:
      differences: at least two.
      resolution: the least half-width. Seeds that differ by the same number of images have a standard error of 0, but
        no share of images is finer than one of them.
    """
    from scipy import stats  # here, since it takes a second that only this needs

    count, mean = len(differences), math.fsum(differences) / len(differences)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * standard_error(differences)
    half = max(half, resolution)
    return mean, mean - half, mean + half


def standard_error(values: Sequence[float]) -> float:
    """Returns the standard error of the mean of at least two values."""
    count, mean = len(values), math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


def holm(of_comparisons: Sequence[Sequence[float]]) -> list[bool]:
    """Says which means differ from 0 by Holm's correction (1979) of paired t-tests, all of them together at 5 %.

    Args:
      of_comparisons: the differences of each, at least two.
    """
    from scipy import stats

    tested = [
        (
            float(stats.ttest_1samp(differences, 0).pvalue)
            if standard_error(differences)
            else float(not any(differences))
        )
        for differences in of_comparisons
    ]
    found = [False] * len(tested)
    for rank, number in enumerate(sorted(range(len(tested)), key=tested.__getitem__)):
        if tested[number] > (1 - CONFIDENCE) / (len(tested) - rank):
            break
        found[number] = True
    return found


def decide(differences: Sequence[float], expected: str, resolution: float = 0.0) -> Verdict:
    """Applies the rule to the differences of one comparison.

    'better' and 'worse': agree if the interval excludes 0 on that side, disagree if on the other, else undecided.
    'equal': agree if the interval is within `MARGIN` of 0, disagree if it is wholly outside, else undecided.

    Args:
      differences: setting minus base for each seed, in percentage points.
      expected: one of `EXPECTATIONS`.
      resolution: as of `interval`.
    """
    differences = tuple(differences)
    if not differences:
        return Verdict("not run", ())
    mean = math.fsum(differences) / len(differences)
    if len(differences) < MIN_SEEDS:
        return Verdict(TOO_FEW, differences, mean)
    mean, low, high = interval(differences, resolution)
    if expected == "equal":
        agree, disagree = low > -MARGIN and high < MARGIN, low > MARGIN or high < -MARGIN
    else:
        agree, disagree = (low > 0, high < 0) if expected == "better" else (high < 0, low > 0)
    word = "open" if expected == "open" else "agree" if agree else "disagree" if disagree else "undecided"
    close = abs(mean) <= 2 * standard_error(differences) or low <= 0 <= high
    needs_more = close if expected != "equal" else close or word == "undecided"
    return Verdict(word, differences, mean, low, high, needs_more)


def together(words: Sequence[str]) -> str:
    """Returns what the comparisons of a claim say together: what all of them say, else 'undecided' or 'not all run'.

    Args:
      words: of the verdicts; 'open' ones have no say.
    """
    said = {word for word in words if word != "open"} or {"open"}
    if len(said) == 1:
        return said.pop()
    return "not all run" if said & {"not run", TOO_FEW} else "undecided"
