"""How well a score tells the images of one class from all others: ROC AUC and average precision, also of resamples."""

from typing import NamedTuple

import numpy as np

# Where curves are sampled: false positive rates of the ROC curve, recalls of the precision-recall curve.
GRID = np.linspace(0, 1, 101)

MAX_COUNTS = 10_000_000  # numbers at a time, a bound on memory


class Ranking(NamedTuple):
    """Scores of one class against all others. NaN where they are not defined.

    Attributes:
      auc: area under the ROC curve, `[1 + resamples]`.
      average_precision: `[1 + resamples]`.
      roc: true positive rate at each false positive rate of `GRID`.
      precision: precision at each recall of `GRID`: of the shortest list of images that reaches it.
    """

    auc: np.ndarray
    average_precision: np.ndarray
    roc: np.ndarray
    precision: np.ndarray


def rank(truth: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> Ranking:
    """Returns the scores of one class, as scikit-learn's `roc_auc_score` and `average_precision_score` define them.

    Those functions sort all images anew for each class and each resample, which takes hours for ImageNet. Both scores
    need only to know between which positives each image stands. So here the positives alone are sorted, and the
    product with a sparse matrix counts the images of all resamples at once.

    Args:
      truth: `[N]` bool, whether an image is of the class.
      scores: `[N]`, finite.
      weights: `[N, 1 + resamples]`, from `intervals.resample`.
    """
    images, columns = weights.shape
    auc, average = np.full((2, columns), np.nan)
    roc, sampled = np.full((2, len(GRID)), np.nan)
    if not truth.any():
        return Ranking(auc, average, roc, sampled)
    thresholds = np.unique(scores[truth])
    left = np.searchsorted(thresholds, scores)
    equal = thresholds[np.minimum(left, len(thresholds) - 1)] == scores
    bins = 2 * left + equal  # 2 k + 1 is at threshold k, 2 k just below it
    positives, negatives = (_bins(bins, chosen, 2 * len(thresholds) + 1) for chosen in (truth, ~truth))
    step = max(1, MAX_COUNTS // len(bins))
    for start in range(0, columns, step):
        part = slice(start, start + step)
        at, others = (np.asarray(matrix @ weights[:, part], np.float64) for matrix in (positives, negatives))
        at = at[1::2]
        # At each threshold: negatives above it, negatives on it, positives on or above it.
        above, on = _from_here(others)[2::2], others[1::2]
        found = _from_here(at)
        num_positive = found[0]
        num_negative = images - num_positive
        with np.errstate(invalid="ignore", divide="ignore"):
            below = num_negative[None] - above - on
            auc[part] = (at * (below + on / 2)).sum(0) / (num_positive * num_negative)
            precision = found / (found + above + on)
            average[part] = np.nansum(at * precision, 0) / num_positive
        if not start:
            recall, false = found[::-1, 0] / num_positive[0], (above + on)[::-1, 0]
            first = np.minimum(np.searchsorted(recall, GRID - 1e-9), len(recall) - 1)
            sampled = precision[::-1, 0][first]
            if num_negative[0]:
                roc = np.interp(GRID, [0, *(false / num_negative[0]), 1], [0, *recall, 1])
    return Ranking(auc, average, roc, sampled)


def _bins(bins: np.ndarray, chosen: np.ndarray, count: int):
    """Returns the matrix that adds up the chosen images of each bin: `[count, N] @ [N, columns]`.

    Bin 0, below all positives, stays empty: mostly it has most of the images, and no score needs it.
    """
    from scipy import sparse

    taken = chosen & (bins > 0)
    pointers = np.concatenate([[0], np.cumsum(taken)])
    return sparse.csc_array((np.ones(pointers[-1], np.float32), bins[taken], pointers), shape=(count, len(bins)))


def _from_here(counts: np.ndarray) -> np.ndarray:
    """Returns for each row the sum of it and those after it."""
    return np.cumsum(counts[::-1], 0)[::-1]
