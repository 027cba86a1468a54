"""Scores against scikit-learn and numbers by hand."""

import math
import tracemalloc

import numpy as np
import pytest
from sklearn import metrics

from tests.reports import predicted
from xception_flax.reports import intervals, predictions, ranking, scores


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("count", [3, 40, 700])
def test_rankings_are_scikit_learns_in_each_resample(count, ties, rng):
    values = rng.random(count).astype(np.float32)
    values = np.round(values, 1) if ties else values
    truth = rng.random(count) < 0.3
    truth[:2] = True, False
    weights = intervals.resample(count)
    found = ranking.rank(truth, values, weights)
    for column in (0, 1, 2, 3, 1000):
        weight = weights[:, column]
        if weight[truth].any() and weight[~truth].any():
            assert found.auc[column] == pytest.approx(metrics.roc_auc_score(truth, values, sample_weight=weight))
            expected = metrics.average_precision_score(truth, values, sample_weight=weight)
            assert found.average_precision[column] == pytest.approx(expected)


def test_rankings_in_parts_are_the_same(rng, monkeypatch):
    values, truth = rng.random(50), rng.random(50) < 0.5
    weights = intervals.resample(50)
    whole = ranking.rank(truth, values, weights)
    monkeypatch.setattr(ranking, "MAX_COUNTS", 1000)
    for one, other in zip(whole, ranking.rank(truth, values, weights), strict=True):
        np.testing.assert_array_equal(one, other)


def test_sampled_curves_are_those_of_scikit_learn(rng):
    values, truth = rng.random(5000), rng.random(5000) < 0.5
    found = ranking.rank(truth, values + 0.3 * truth, np.ones((5000, 2), np.float32))
    false, true, _ = metrics.roc_curve(truth, values + 0.3 * truth, drop_intermediate=False)
    np.testing.assert_allclose(found.roc, np.interp(ranking.GRID, false, true), atol=2e-3)
    precision, recall, _ = metrics.precision_recall_curve(truth, values + 0.3 * truth)
    expected = [precision[recall >= level - 1e-9][-1] for level in ranking.GRID[1:]]
    np.testing.assert_allclose(found.precision[1:], expected, atol=2e-3)


@pytest.mark.parametrize("ties", [False, True])
def test_one_label_an_image(ties, rng):
    p = predicted.single(rng, 400, 6, ties=ties)
    found = scores.compute(p, 0.95)
    precision, recall, f1, support = metrics.precision_recall_fscore_support(p.labels, p.predicted)
    all_mine = (found.classes.precision, found.classes.recall, found.classes.f1)
    for mine, theirs in zip(all_mine, (precision, recall, f1), strict=True):
        np.testing.assert_allclose(mine[:, 0], theirs)
        assert (mine[:, 1] <= mine[:, 0]).all()
        assert (mine[:, 0] <= mine[:, 2]).all()
    np.testing.assert_array_equal(found.classes.support, support)
    np.testing.assert_array_equal(found.confusion.toarray(), metrics.confusion_matrix(p.labels, p.predicted))
    overall = {name: score.value for name, score in found.overall.items()}
    aucs = [metrics.roc_auc_score(p.labels == c, p.probabilities[:, c]) for c in range(6)]
    averages = [metrics.average_precision_score(p.labels == c, p.probabilities[:, c]) for c in range(6)]
    np.testing.assert_allclose(found.classes.auc[:, 0], aucs)
    np.testing.assert_allclose(found.classes.average_precision[:, 0], averages)
    truth = np.eye(6)[p.labels]
    confidence = p.probabilities.max(-1).astype(np.float64)
    right = p.predicted == p.labels
    error = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert overall == pytest.approx(
        {
            "top1": metrics.accuracy_score(p.labels, p.predicted),
            "top5": 0.95,
            "balanced_accuracy": metrics.balanced_accuracy_score(p.labels, p.predicted),
            "macro_precision": metrics.precision_score(p.labels, p.predicted, average="macro"),
            "macro_f1": metrics.f1_score(p.labels, p.predicted, average="macro"),
            "macro_roc_auc": np.mean(aucs),
            "mean_average_precision": np.mean(averages),
            "expected_calibration_error": error,
            "brier": ((p.probabilities.astype(np.float64) - truth) ** 2).sum(-1).mean(),
        }
    )
    assert found.overall["top1"][1:] == intervals.wilson(int(right.sum()), 400)
    assert found.overall["top5"][1:] == intervals.wilson(380, 400)


def test_by_hand_with_a_class_without_images_and_one_never_predicted():
    """Truths 0 0 0 1 1, predictions 0 0 2 0 0. Class 1 is never predicted, class 2 has no images."""
    p = predicted.of([0, 0, 0, 1, 1], [[0.8, 0.1, 0.1], [0.6, 0.4, 0], [0.2, 0.2, 0.6], [0.5, 0.3, 0.2], [0.9, 0, 0.1]])
    found = scores.compute(p)
    nan = math.nan
    np.testing.assert_array_equal(found.classes.precision[:, 0], [2 / 4, nan, 0])
    np.testing.assert_array_equal(found.classes.recall[:, 0], [2 / 3, 0, nan])
    np.testing.assert_array_equal(found.classes.f1[:, 0], [4 / 7, 0, 0])
    np.testing.assert_array_equal(found.classes.predicted, [4, 0, 1])
    # Class 1: truths at 0.3 and 0, others at 0.1, 0.4, 0.2: 0.3 is above two of three, 0 above none.
    np.testing.assert_allclose(found.classes.auc[:, 0], [2 / 6, 2 / 6, nan])
    np.testing.assert_allclose(found.classes.average_precision[1, 0], (1 / 2 + 2 / 5) / 2)
    assert found.overall["top1"].value == 2 / 5
    assert found.overall["balanced_accuracy"].value == pytest.approx((2 / 3 + 0) / 2)
    assert found.overall["macro_f1"].value == pytest.approx((4 / 7 + 0 + 0) / 3)
    assert found.overall["macro_precision"].value == pytest.approx((2 / 4 + 0) / 2)
    assert found.overall["macro_roc_auc"].value == pytest.approx(2 / 6)
    np.testing.assert_array_equal(found.confusion.toarray(), [[2, 0, 1], [2, 0, 0], [0, 0, 0]])


def test_not_finite_is_wrong_and_has_no_probability(rng):
    whole = predicted.single(rng, 60, 3)
    probabilities = whole.probabilities.copy()
    probabilities[:10] = np.nan
    p = whole._replace(
        probabilities=probabilities, predicted=np.where(np.arange(60) < 10, whole.labels, whole.predicted)
    )
    rest = scores.compute(predicted.of(whole.labels[10:], whole.probabilities[10:]))
    found = scores.compute(p)
    assert (found.count, found.not_finite) == (60, 10)
    assert found.overall["top1"].value == (p.predicted == p.labels)[10:].sum() / 60
    assert found.classes.predicted.sum() == 50
    assert found.classes.support.sum() == 60
    np.testing.assert_array_equal(found.classes.auc[:, 0], rest.classes.auc[:, 0])
    assert found.overall["brier"].value == pytest.approx(rest.overall["brier"].value)
    assert found.calibration.counts.sum() == 50
    nothing = scores.compute(p._replace(probabilities=np.full_like(probabilities, np.nan)))
    assert nothing.overall["top1"].value == 0
    assert math.isnan(nothing.overall["macro_roc_auc"].value)


@pytest.mark.parametrize("kind", [predicted.single, predicted.several])
def test_squared_errors_by_blocks_are_the_same_in_little_memory(kind, rng, monkeypatch):
    p = kind(rng, 2000, 1000)
    p.probabilities[5] = np.nan
    truth = p.labels if p.several_labels else np.eye(1000)[p.labels]
    expected = ((p.probabilities.astype(np.float64) - truth) ** 2).sum(-1)[p.finite]
    monkeypatch.setattr(predictions, "BLOCK", 30_000)
    tracemalloc.start()
    found = scores._squared_errors(p)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert peak < p.probabilities.nbytes / 2


def test_two_classes_have_one_roc_curve(rng):
    p = predicted.single(rng, 200, 2)
    found = scores.compute(p)
    expected = metrics.roc_auc_score(p.labels, p.probabilities[:, 1])
    assert found.classes.auc[:, 0] == pytest.approx([expected, expected], abs=1e-3)
    assert found.classes.auc[1, 0] == pytest.approx(expected)
    # scikit-learn's is of one of both classes.
    assert found.overall["brier"].value == pytest.approx(2 * metrics.brier_score_loss(p.labels, p.probabilities[:, 1]))


def test_one_class_only_has_no_ranking():
    found = scores.compute(predicted.of([1, 1], [[0.1, 0.9], [0.6, 0.4]]))
    assert np.isnan(found.classes.auc).all()
    assert math.isnan(found.overall["macro_roc_auc"].value)
    assert found.classes.average_precision[1, 0] == 1


def test_images_that_are_all_right_have_intervals_of_shares_alone():
    """Wilson's of 12 of 12 begins at 12 / (12 + 1.96^2), by hand. The bootstrap does not know how sure the rest is."""
    labels = np.arange(12) % 4
    found = scores.compute(predicted.of(labels, 0.6 * np.eye(4)[labels] + 0.1), 1.0)
    assert found.overall["top1"] == pytest.approx((1, 12 / (12 + 1.959964**2), 1))
    rest = set(found.overall) - {"top1", "top5"}
    assert {"balanced_accuracy", "macro_f1", "macro_roc_auc", "mean_average_precision", "brier"} <= rest
    for name in rest:
        assert not math.isnan(found.overall[name].value)
        assert np.isnan(found.overall[name][1:]).all()
    for values in (found.classes.f1, found.classes.auc, found.classes.average_precision):
        np.testing.assert_array_equal(values, [[1, math.nan, math.nan]] * 4)
    assert np.isfinite(found.classes.recall).all()


def test_several_labels_an_image(rng):
    p = predicted.several(rng, 300, 5)
    said = p.probabilities >= 0.5
    found = scores.compute(p)
    precision, recall, f1, support = metrics.precision_recall_fscore_support(p.labels, said)
    np.testing.assert_allclose(found.classes.precision[:, 0], precision)
    np.testing.assert_allclose(found.classes.recall[:, 0], recall)
    np.testing.assert_allclose(found.classes.f1[:, 0], f1)
    np.testing.assert_array_equal(found.classes.support, support)
    overall = {name: score.value for name, score in found.overall.items()}
    assert overall["exact_match"] == metrics.accuracy_score(p.labels, said)
    assert overall["mean_average_precision"] == pytest.approx(
        metrics.average_precision_score(p.labels, p.probabilities)
    )
    assert overall["macro_roc_auc"] == pytest.approx(metrics.roc_auc_score(p.labels, p.probabilities))
    assert overall["macro_f1"] == pytest.approx(metrics.f1_score(p.labels, said, average="macro"))
    assert overall["brier"] == pytest.approx(((p.probabilities - p.labels) ** 2).sum(-1).mean(), rel=1e-5)
    assert found.calibration.counts.sum() == 1500
    assert found.confusion is None
    assert "top1" not in overall
