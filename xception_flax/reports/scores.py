"""Scores of a network on a split: arrays in, numbers out, each with its interval."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from xception_flax.data.pipeline import usable_cpus
from xception_flax.reports import intervals, ranking
from xception_flax.reports.predictions import Predictions, blocks

if TYPE_CHECKING:
    from scipy import sparse

BINS = 15  # of the confidence, as in Guo et al. (2017)
THRESHOLD = 0.5  # from which on a class is predicted, where an image may have several

BLOCK = 64  # classes whose probabilities are copied at a time, so that those of a class lie together


class Score(NamedTuple):
    """A number and its 95 % interval; NaN where it is not defined, or has none (`intervals.around`)."""

    value: float
    low: float = float("nan")
    high: float = float("nan")


class Classes(NamedTuple):
    """Scores of each class against all others. Intervals are `[num_classes, 3]`: value, low, high.

    Attributes:
      support: `[num_classes]`, the images of it.
      predicted: `[num_classes]`, the images that are said to be of it.
      correct: `[num_classes]`, the images of it that are said to be.
      precision: NaN where it is never predicted.
      recall: NaN where it has no images.
      f1: NaN where it has no images and is never predicted.
      auc: NaN where it has no images, or all.
      average_precision: NaN where it has no images.
    """

    support: np.ndarray
    predicted: np.ndarray
    correct: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    auc: np.ndarray
    average_precision: np.ndarray


class Calibration(NamedTuple):
    """How often a network is right at each confidence, in `BINS` bins of equal width.

    Bin m holds confidences above m / BINS up to (m + 1) / BINS. With one label an image, the confidence is the
    probability of the predicted class, and right is that it is the true one. With several it is every probability of
    every class, and right is that the image has this label.

    Attributes:
      counts: `[BINS]`, of confidences.
      confidences: `[BINS]`, their mean; NaN in an empty bin.
      shares: `[BINS]`, the share of them that is right; NaN in an empty bin.
    """

    counts: np.ndarray
    confidences: np.ndarray
    shares: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error: the mean of |share right - mean confidence| over all; NaN of none."""
        if not self.counts.any():
            return float("nan")
        gaps = np.abs(self.shares - self.confidences)
        return float(np.nansum(gaps * self.counts) / self.counts.sum())


class Scores(NamedTuple):
    """All scores of a network on a split.

    Attributes:
      count: the images.
      not_finite: images with a NaN or infinite logit. They are wrong, and of no class in `Classes.predicted`; all
        scores of probabilities leave them out.
      overall: scores of the whole, by name.
      classes: of each class.
      confusion: `[num_classes, num_classes]`, sparse: images by true class (rows) and predicted one; None with several
        labels.
      calibration: see there.
      roc, precision_recall: `[num_classes, len(ranking.GRID)]`, as of `ranking.Ranking`.
      resamples: of the bootstrap.
    """

    count: int
    not_finite: int
    overall: dict[str, Score]
    classes: Classes
    confusion: "sparse.csr_array | None"
    calibration: Calibration
    roc: np.ndarray
    precision_recall: np.ndarray
    resamples: int


def compute(predictions: Predictions, top5: float | None = None) -> Scores:
    """Returns the scores.

    Precision, recall and F1 are scikit-learn's `precision_recall_fscore_support`; ROC AUC and average precision its
    `roc_auc_score` and `average_precision_score`, each class against all others. A macro score is the mean over the
    classes in which it is defined; `balanced_accuracy` is the macro recall. `brier` is the sum over classes of the
    squared error of the probability, 0 to 2 (Brier 1950), as a mean over images.

    Intervals are Wilson's of shares of images, and otherwise of a bootstrap over images
    (`intervals.around`). The calibration error has none: it is biased upwards, in a resample more so.

    Args:
      predictions: of at least one image.
      top5: the share of images whose class is among the first five, as it was counted with the logits.
    """
    from sklearn import metrics

    p, finite = predictions, predictions.finite
    count, num_classes = len(p.index), len(p.class_names)
    truth, said = _truth(p), _said(p)
    weights = intervals.resample(count)
    correct = truth.multiply(said).tocsr()
    support, predicted, hits = (np.asarray(matrix.sum(0)).ravel().astype(int) for matrix in (truth, said, correct))
    options = dict(average=None, labels=np.arange(num_classes), zero_division=np.nan)
    of_labels = (p.labels, np.where(finite, p.predicted, -1))
    of_rows = (truth, said)
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        *(of_rows if p.several_labels else of_labels), **options
    )
    again = _resampled(truth, said, correct, weights)
    auc, average, roc, precision_recall = _rankings(p, truth, finite)
    classes = Classes(
        support,
        predicted,
        hits,
        _with_wilson(precision, hits, predicted),
        _with_wilson(recall, hits, support),
        np.column_stack([f1, intervals.around(again["f1"])[:, 1:]]),
        intervals.around(auc),
        intervals.around(average),
    )
    overall = {}
    if not p.several_labels:
        right = int(p.correct.sum())
        overall["top1"] = Score(right / count, *intervals.wilson(right, count))
        if top5 is not None:
            overall["top5"] = Score(top5, *intervals.wilson(round(top5 * count), count))
        overall["balanced_accuracy"] = _macro(again["recall"])
    else:
        overall["exact_match"] = _share((np.asarray((truth != said).sum(1)).ravel() == 0) & finite)
        overall["macro_recall"] = _macro(again["recall"])
    overall |= {
        "macro_precision": _macro(again["precision"]),
        "macro_f1": _macro(again["f1"]),
        "macro_roc_auc": _macro(auc),
        "mean_average_precision": _macro(average),
    }
    calibration = calibrate(p)
    overall["expected_calibration_error"] = Score(calibration.error)
    errors = _squared_errors(p)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = errors @ weights[finite] / weights[finite].sum(0)
    overall["brier"] = Score(*map(float, intervals.around(means, most=2)))
    return Scores(
        count,
        int((~finite).sum()),
        overall,
        classes,
        None if p.several_labels else (truth.T @ said).tocsr(),
        calibration,
        roc,
        precision_recall,
        weights.shape[1] - 1,
    )


def calibrate(predictions: Predictions) -> Calibration:
    """Returns how often the network is right at each confidence."""
    p, finite = predictions, predictions.finite
    if p.several_labels:
        confidences, right = p.probabilities[finite].ravel(), p.labels[finite].ravel() > 0
    else:
        confidences = p.probabilities[np.arange(len(p.index)), p.predicted][finite]
        right = p.correct[finite]
    bins = np.clip(np.ceil(confidences.astype(np.float64) * BINS).astype(int) - 1, 0, BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    sums = (np.bincount(bins, weights=values, minlength=BINS) for values in (confidences, right))
    with np.errstate(invalid="ignore"):
        return Calibration(counts, *(total / counts for total in sums))


def _truth(p: Predictions) -> "sparse.csr_array":
    """The true classes, a sparse matrix `[N, num_classes]` of 0 and 1."""
    return _rows(p.labels > 0) if p.several_labels else _one_a_row(p.labels, np.ones(len(p.index), bool), p)


def _said(p: Predictions) -> "sparse.csr_array":
    """The predicted classes, likewise."""
    return _rows(p.probabilities >= THRESHOLD) if p.several_labels else _one_a_row(p.predicted, p.finite, p)


def _rows(rows: np.ndarray) -> "sparse.csr_array":
    from scipy import sparse

    return sparse.csr_array(rows.astype(np.float32))


def _one_a_row(numbers: np.ndarray, there: np.ndarray, p: Predictions) -> "sparse.csr_array":
    from scipy import sparse

    pointers = np.concatenate([[0], np.cumsum(there)])
    shape = (len(numbers), len(p.class_names))
    return sparse.csr_array((np.ones(pointers[-1], np.float32), numbers[there], pointers), shape=shape)


def _resampled(
    truth: "sparse.csr_array", said: "sparse.csr_array", correct: "sparse.csr_array", weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns precision, recall and F1 of each class in each resample, `[num_classes, 1 + resamples]`."""
    support, predicted, hits = ((matrix.T @ weights).astype(np.float64) for matrix in (truth, said, correct))
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"precision": hits / predicted, "recall": hits / support, "f1": 2 * hits / (support + predicted)}


def _rankings(p: Predictions, truth: "sparse.csr_array", finite: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns ROC AUC, average precision and both curves of each class; see `ranking.Ranking`."""
    weights = intervals.resample(int(finite.sum())) if finite.any() else np.ones((0, 2), np.float32)
    columns = truth.tocsc()

    def block(start: int) -> list[ranking.Ranking]:
        probabilities = np.ascontiguousarray(p.probabilities[finite, start : start + BLOCK].T)
        found = []
        for number, scores in enumerate(probabilities, start):
            of_class = np.zeros(len(finite), bool)
            of_class[columns.indices[columns.indptr[number] : columns.indptr[number + 1]]] = True
            found.append(ranking.rank(of_class[finite], scores, weights))
        return found

    with ThreadPoolExecutor(min(usable_cpus(), os.cpu_count() or 1)) as threads:
        found = [of_class for part in threads.map(block, range(0, len(p.class_names), BLOCK)) for of_class in part]
    return tuple(np.stack(arrays) for arrays in zip(*found, strict=True))


def _squared_errors(p: Predictions) -> np.ndarray:
    """Returns the sum of squared errors of each image with finite logits, float64."""
    errors = []
    for rows in blocks(*p.probabilities.shape):
        probabilities, labels = p.probabilities[rows], p.labels[rows]
        squares = np.einsum("ij,ij->i", probabilities, probabilities, dtype=np.float64)
        if p.several_labels:
            errors.append(squares + ((labels > 0) * (1 - 2 * probabilities)).sum(-1, dtype=np.float64))
        else:
            of_true = probabilities[np.arange(len(probabilities)), labels]
            errors.append(squares + 1 - 2 * of_true.astype(np.float64))
    return np.concatenate(errors)[p.finite]


def _share(right: np.ndarray) -> Score:
    return Score(float(right.mean()), *intervals.wilson(int(right.sum()), right.size))


def _macro(values: np.ndarray) -> Score:
    """Returns the mean over the classes of `[num_classes, 1 + resamples]`, of those in which it is defined."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        means = np.where(known, values, 0).sum(0) / known.sum(0)
    return Score(*map(float, intervals.around(means)))


def _with_wilson(values: np.ndarray, successes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    bounds = [intervals.wilson(int(k), int(n)) for k, n in zip(successes, counts, strict=True)]
    return np.column_stack([values, np.reshape(bounds, (-1, 2))])
