"""Metrics against their definitions as loops, and on padding, ties and NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xception_flax.text.errors import UserError
from xception_flax.training import metrics


def test_top_k_against_sorting(rng):
    logits = rng.normal(size=(50, 12)).astype(np.float32)
    labels = rng.integers(0, 12, 50)
    order = np.argsort(-logits, axis=-1, kind="stable")
    for k in (1, 5, 12):
        expected = [float(label in row[:k]) for row, label in zip(order, labels, strict=True)]
        np.testing.assert_array_equal(metrics.top_k_correct(logits, labels, k), expected)


def test_a_constant_network_scores_chance():
    logits, labels = jnp.zeros((10, 10)), jnp.arange(10)
    assert float(metrics.top_k_correct(logits, labels, 1).mean()) == pytest.approx(0.1)
    assert float(metrics.top_k_correct(logits, labels, 5).mean()) == pytest.approx(0.5)


def test_nan_is_never_correct():
    logits = jnp.full((3, 4), jnp.nan)
    assert float(metrics.top_k_correct(logits, jnp.arange(3), 1).sum()) == 0
    assert float(metrics.average_precision(logits, jnp.eye(3, 4), 4).sum()) == 0
    one = jnp.array([[jnp.nan, 1.0, 2.0, 3.0]])
    assert float(metrics.average_precision(one, jnp.eye(1, 4), 4).sum()) == 0


def test_top_5_of_fewer_than_5_classes_is_always_right():
    assert float(metrics.top_k_correct(jnp.zeros((4, 3)), jnp.array([0, 1, 2, 0]), 5).mean()) == 1


def test_a_label_that_is_no_class_is_never_right():
    assert metrics.top_k_correct(jnp.eye(3), jnp.array([0, 3, -1]), 2).tolist() == [1, 0, 0]


def test_average_precision_by_hand():
    """Ranking: classes 2, 0, 3, 1. Labels {0, 1}: hits at ranks 2 and 4, AP = (1/2 + 2/4) / 2."""
    logits = jnp.array([[3.0, 1.0, 4.0, 2.0]])
    labels = jnp.array([[1, 1, 0, 0]])
    assert float(metrics.average_precision(logits, labels, 4)[0]) == pytest.approx(0.5)
    # Among the best 2 only class 0 is a hit, and 2 ranks could reach 2: AP@2 = (1/2) / 2.
    assert float(metrics.average_precision(logits, labels, 2)[0]) == pytest.approx(0.25)
    # Class 0 three times as important: (3 * 1/2 + 1 * 2/4) / 4.
    weights = jnp.array([3.0, 1.0, 1.0, 1.0])
    assert float(metrics.average_precision(logits, labels, 4, weights)[0]) == pytest.approx(0.5)
    weights = jnp.array([1.0, 3.0, 1.0, 1.0])
    assert float(metrics.average_precision(logits, labels, 1, weights)[0]) == 0
    weights = jnp.array([3.0, 0.0, 1.0, 1.0])
    assert float(metrics.average_precision(logits, labels, 4, weights)[0]) == pytest.approx(1 / 2)


@pytest.mark.parametrize("k", [1, 7, 100])
def test_average_precision_against_loops(rng, k):
    logits = rng.normal(size=(20, 120)).astype(np.float32)
    labels = rng.random((20, 120)) < 0.3
    weights = rng.random(120).astype(np.float32)
    expected = []
    for row, truth in zip(logits, labels, strict=True):
        ranked = np.argsort(-row)[:k]
        gained = sum(weights[c] * np.mean(truth[ranked[: r + 1]]) for r, c in enumerate(ranked) if truth[c])
        expected.append(gained / np.sort(weights[truth])[::-1][:k].sum())
    np.testing.assert_allclose(metrics.average_precision(logits, labels, k, weights), expected, rtol=1e-4)


@pytest.mark.parametrize("name", metrics.METRICS)
def test_an_entry_names_what_its_function_computes(name):
    entry = metrics.METRICS[name]
    labels = jnp.eye(2, 3) if entry.several_labels else jnp.array([0, 1])
    sums = metrics.create_metrics(name)(2 * jnp.eye(2, 3), labels, jnp.ones(2))
    assert sums.keys() == set(entry.shares) >= {entry.best}
    assert {float(s.total / s.count) for s in sums.values()} == {1.0}  # higher is better


def test_an_entry_with_other_names_is_refused(monkeypatch):
    for change in ({"shares": ("top1", "recall")}, {"best": "recall"}):
        monkeypatch.setitem(metrics.METRICS, "new", metrics.METRICS["single_label"]._replace(**change))
        with pytest.raises(UserError, match=r"metrics 'new' have computed \('top1', 'top5'\), but .*'recall'"):
            metrics.create_metrics("new")(jnp.eye(2, 3), jnp.array([0, 1]), jnp.ones(2))


def test_a_value_for_all_images_is_refused():
    with pytest.raises(UserError, match=r"a value for each image, \[N\], here \(2,\), got shape \(\);"):
        metrics.masked_sum(jnp.ones(()), jnp.ones(2))


def test_perfect_ranking_scores_one(rng):
    labels = rng.random((5, 150)) < 0.9  # more labels than ranks
    np.testing.assert_allclose(metrics.average_precision(labels * 1.0, labels, 100), 1, rtol=1e-6)


def test_padding_counts_nothing_whatever_it_holds():
    compute = metrics.create_metrics("single_label")
    logits = jnp.array([[1.0, 0.0], [0.0, 1.0], [jnp.nan, jnp.nan]])
    sums = compute(logits, jnp.array([0, 0, 0]), jnp.array([1.0, 1.0, 0.0]))
    assert (float(sums["top1"].total), float(sums["top1"].count)) == (1, 2)
    total = metrics.masked_sum(jnp.array([2.0, jnp.nan]), jnp.array([1.0, 0.0]))
    assert (float(total.total), float(total.count)) == (2, 1)


def test_map_leaves_out_images_without_labels(tmp_path):
    weights = tmp_path / "weights.npy"
    np.save(weights, np.array([1.0, 1.0, 0.0]))
    logits = jnp.array([[3.0, 2.0, 1.0]] * 4)
    labels = jnp.array([[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]])
    plain = metrics.create_metrics("multi_label", k=3)(logits, labels, jnp.ones(4))
    assert float(plain["map"].count) == 3
    assert float(plain["map"].total) == pytest.approx(1 + 1 / 2 + 1 / 3)
    # A class of weight 0 counts as no label.
    weighted = metrics.create_metrics("multi_label", k=3, class_weights=str(weights))(logits, labels, jnp.ones(4))
    assert float(weighted["map"].count) == 2
    assert float(weighted["map"].total) == pytest.approx(1 + 1 / 2)


def test_bad_class_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no readable \.npy file"):
        metrics.create_metrics("multi_label", class_weights=str(tmp_path / "nothing.npy"))
    np.save(tmp_path / "negative.npy", np.array([-1.0, 1.0]))
    with pytest.raises(UserError, match="finite weights that are not negative"):
        metrics.create_metrics("multi_label", class_weights=str(tmp_path / "negative.npy"))
    with pytest.raises(UserError, match=r"metrics\.k must be at least 1, got 0"):
        metrics.create_metrics("multi_label", k=0)
    np.save(tmp_path / "two.npy", np.array([1.0, 1.0]))
    compute = metrics.create_metrics("multi_label", class_weights=str(tmp_path / "two.npy"))
    with pytest.raises(UserError, match=r"one weight for each of the 3 classes, got shape \(2,\)"):
        compute(jnp.zeros((1, 3)), jnp.zeros((1, 3)), jnp.ones(1))


def test_accumulated_batches_equal_the_whole(rng):
    """The sums are divided once, so each image weighs the same in batches of any size."""
    logits = rng.normal(size=(37, 6)).astype(np.float32)
    labels = rng.integers(0, 6, 37)
    compute = jax.jit(metrics.create_metrics("single_label"))
    totals = metrics.Accumulator()
    for start, stop in ((0, 20), (20, 36), (36, 37)):
        totals.add(compute(logits[start:stop], labels[start:stop], np.ones(stop - start, np.float32)))
    whole = compute(logits, labels, np.ones(37, np.float32))
    assert totals.count("top1") == 37
    assert totals.means()["top1"] == pytest.approx(float(whole["top1"].total) / 37, rel=1e-12)


def test_mean_of_nothing_is_nan():
    totals = metrics.Accumulator()
    totals.add({"map": metrics.Sum(0.0, 0.0)})
    assert np.isnan(totals.means()["map"])


def test_skipped_steps_in_a_row_are_counted():
    """Over records, which begin the sums anew, and only up to the newest step that was not skipped."""
    totals = metrics.Accumulator()
    for total in (1, 1, 0, 1):
        totals.add({"skipped_steps": metrics.Sum(total, 1)})
    assert (totals.total("skipped_steps"), totals.skipped_in_a_row()) == (3, 1)
    totals.clear()
    assert (totals.total("skipped_steps"), totals.skipped_in_a_row()) == (0, 1)
    totals.add({"skipped_steps": metrics.Sum(1, 1)})
    assert totals.skipped_in_a_row() == 2
