"""Two networks on the same images: which differ, and whether by more than chance."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from xception_flax.reports import intervals
from xception_flax.reports.predictions import Predictions, Said, read
from xception_flax.runs.workdir import evaluation_predictions
from xception_flax.text import naming
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import cut


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


def compare(this: Predictions, names: Sequence[str] | None, fingerprint: str, other: Said) -> Comparison:
    """Compares these predictions with another network's; images whose files have names may be in another order.

    Args:
      this: one label an image.
      names: of all images of the split, or None.
      fingerprint: of these images.
      other: from `open_other`.

    Raises:
      UserError: they are of other images.
    """
    names = None if names is None else [names[i] for i in this.index]
    here = _by_name(this.index, names, [this.class_names[i] for i in this.labels])
    there = _by_name(other.index, other.names, other.truths)
    if differing := _difference(here, there, same=other.about["fingerprint"] == fingerprint):
        raise UserError(
            f"--compare {other.path}: these are predictions on other images, {len(there):,} of split "
            f"{other.about['split']!r}; {differing}. Evaluate both networks on the same data."
        )
    rows, other_rows = ([image.row for image in images] for images in (here, there))
    return mcnemar(this.correct[rows], other.correct[other_rows], other.about["title"])


class _Image(NamedTuple):
    name: str | int  # the place in the split, where the source has no names
    truth: str
    row: int


def _by_name(index: np.ndarray, names: Sequence[str] | None, truths: Sequence[str]) -> list[_Image]:
    composed = map(naming.composed, truths)
    return sorted(map(_Image, index.tolist() if names is None else names, composed, range(len(index))))


def _difference(here: Sequence[_Image], there: Sequence[_Image], *, same: bool) -> str:
    """Returns in words how the images differ; nothing if they do not, and the fingerprint is the `same`."""
    if len(here) != len(there):
        return f"here are {len(here):,}" + (" without the bad ones" if same else "")
    pairs = list(zip(here, there, strict=True))
    if isinstance(here[0].name, str) != isinstance(there[0].name, str):
        return "only one of both has names of files"
    for one, other in pairs:
        if one.name != other.name:
            return f"here is {_said(one)}, and there {_said(other)}"
    for one, other in pairs:
        if one.truth != other.truth:
            here_is, there_is = (cut(naming.shown(image.truth)) for image in (one, other))
            return f"{_said(one)} is {here_is} here, and {there_is} there"
    return "" if same else "names and labels are the same, the content is not"


def _said(image: _Image) -> str:
    return cut(naming.shown(image.name)) if isinstance(image.name, str) else f"image {image.name:,}"
