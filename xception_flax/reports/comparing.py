"""Two networks on the same images: which differ, and whether by more than chance."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xception_flax.reports import intervals
from xception_flax.reports.predictions import Predictions, Said, read
from xception_flax.runs.workdir import evaluation_predictions
from xception_flax.text.errors import UserError


class Comparison(NamedTuple):
    """The top-1 accuracy of one network against another's, on the same images.

    Attributes:
      other: what the other is, in words.
      other_top1: its accuracy.
      both, neither: images that both have right, that none has.
      only_this, only_other: images that one alone has right.
      difference: this accuracy minus the other's: value, low, high; see `intervals.difference`.
      p_value: of McNemar's exact test, two-sided: how likely the images that one alone has right would be divided at
        least as unequally, if either network were as likely to have such an image right.
    """

    other: str
    other_top1: float
    both: int
    neither: int
    only_this: int
    only_other: int
    difference: tuple[float, float, float]
    p_value: float


def mcnemar(this: np.ndarray, other: np.ndarray, name: str) -> Comparison:
    """Compares whether each image is right, `[N]` bool each, in the same order."""
    from scipy import stats

    only_this, only_other = int((this & ~other).sum()), int((other & ~this).sum())
    differing = only_this + only_other
    count = len(this)
    return Comparison(
        name,
        float(other.mean()),
        int((this & other).sum()),
        int((~this & ~other).sum()),
        only_this,
        only_other,
        ((only_this - only_other) / count, *intervals.difference(only_this, only_other, count)),
        float(stats.binomtest(only_this, differing).pvalue) if differing else 1.0,
    )


def open_other(path: Path, split: str) -> Said:
    """Returns the predictions that another evaluation wrote.

    Args:
      path: of the file, of the record beside it, or of the folder that both are in, such as a workdir.
      split: of this evaluation, which says the names of the files.

    Raises:
      UserError: there are none, or an image has several labels.
    """
    if path.is_dir():
        path, folder = path / evaluation_predictions(split), path
        if not path.is_file():
            raise UserError(
                f"--compare {folder}: there is no {path.name}, which `xception-flax evaluate` writes; evaluate the "
                "other network on the same images first."
            )
    elif path.suffix == ".json":
        path = path.with_name(path.name.replace("evaluation_", "predictions_", 1)).with_suffix(".parquet")
    said = read(path)
    if said.correct is None:
        raise UserError(f"--compare {path}: its images have several labels; McNemar's test is for one label an image.")
    return said


def compare(this: Predictions, fingerprint: str, other: Said) -> Comparison:
    """Compares these predictions with another network's.

    Raises:
      UserError: they are of other images.
    """
    there: dict[str, Any] = other.about
    if there["fingerprint"] != fingerprint or not np.array_equal(this.index, other.index):
        bad = " without the bad ones" if there["fingerprint"] == fingerprint else ""
        raise UserError(
            f"--compare {other.path}: these are predictions on other images, {len(other.index):,} of split "
            f"{there['split']!r}{bad}; here are {len(this.index):,}. Evaluate both networks on the same data."
        )
    return mcnemar(this.correct, other.correct, there["title"])
