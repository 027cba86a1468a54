"""Two networks on the same images."""

import math

import numpy as np
import pytest

from tests.reports import predicted
from xception_flax.reports import comparing, intervals, predictions
from xception_flax.text.errors import UserError


def test_mcnemar_by_hand():
    """Of ten images that differ one is this network's: p is twice (1 + 10) / 2^10."""
    this = np.repeat([True, True, False, False], [50, 1, 9, 40])
    other = np.repeat([True, False, True, False], [50, 1, 9, 40])
    found = comparing.mcnemar(this, other, "b")
    assert (found.both, found.only_this, found.only_other, found.neither) == (50, 1, 9, 40)
    assert found.p_value == pytest.approx(2 * 11 / 1024)
    assert found.difference == (-0.08, *intervals.difference(1, 9, 100))
    assert found.other_top1 == 0.59


def test_mcnemar_as_published():
    """Agresti, Categorical Data Analysis, section 10.1: 1,600 approve or not of a prime minister, twice.

    The difference is 0.04, its standard error there 0.0095; the exact p is that of 236 throws of a coin.
    """
    this = np.repeat([True, True, False, False], [794, 150, 86, 570])
    other = np.repeat([True, False, True, False], [794, 150, 86, 570])
    found = comparing.mcnemar(this, other, "b")
    assert found.p_value == pytest.approx(2 * sum(math.comb(236, k) for k in range(87)) / 2**236, rel=1e-9)
    assert found.difference == pytest.approx((0.04, 0.04 - 1.96 * 0.0095, 0.04 + 1.96 * 0.0095), abs=5e-4)


def test_networks_that_agree_do_not_differ():
    found = comparing.mcnemar(np.ones(8, bool), np.ones(8, bool), "b")
    assert (found.p_value, found.difference[0]) == (1.0, 0.0)


def test_the_other_is_found_by_its_folder_its_record_and_its_file(rng, tmp_path):
    p = predicted.single(rng, 30, 3)
    path = tmp_path / "predictions_val.parquet"
    predictions.write(p, None, {"fingerprint": "f", "split": "val", "title": "other"}, path)
    for named in (path, tmp_path, tmp_path / "evaluation_val.json"):
        found = comparing.compare(p, "f", comparing.open_other(named, "val"))
        assert (found.other, found.both, found.only_this) == ("other", p.correct.sum(), 0)
    with pytest.raises(
        UserError, match=r"there is no predictions_test\.parquet, which .* evaluate the other network on"
    ):
        comparing.open_other(tmp_path, "test")


def test_other_images_are_refused(rng, tmp_path):
    p = predicted.single(rng, 30, 3)
    path = tmp_path / "predictions_val.parquet"
    predictions.write(p, None, {"fingerprint": "f", "split": "val", "title": "other"}, path)
    other = comparing.open_other(path, "val")
    with pytest.raises(UserError, match=r"predictions on other images, 30 of split 'val'; here are 30\. Evaluate both"):
        comparing.compare(p, "g", other)
    fewer = p._replace(index=p.index[1:], labels=p.labels[1:])
    with pytest.raises(UserError, match=r"other images, 30 of split 'val' without the bad ones; here are 29\."):
        comparing.compare(fewer, "f", other)
    predictions.write(predicted.several(rng, 6, 3), None, {}, path)
    with pytest.raises(UserError, match=r"have several labels; McNemar's test is for one label an image"):
        comparing.open_other(path, "val")
