"""Two networks on the same images."""

import math

import numpy as np
import pytest

from tests.reports import predicted
from xception_flax.reports import comparing, intervals, predictions
from xception_flax.text.errors import UserError

NAMES = [f"b/{i:02}.png" for i in range(29)] + ["b/\udce9.png"]


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
        found = comparing.compare(p, None, "f", comparing.open_other(named, "val"))
        assert (found.other, found.both, found.only_this) == ("other", p.correct.sum(), 0)
    with pytest.raises(
        UserError, match=r"there is no predictions_test\.parquet, which .* evaluate the other network on"
    ):
        comparing.open_other(tmp_path, "test")


def test_files_in_another_order_are_the_same_images(rng, tmp_path):
    """A table may be sorted in any way; of two rows of one file either may come first."""
    p = predicted.single(rng, 30, 3)
    p.labels[29] = (p.labels[0] + 1) % 3
    names = [*NAMES[:-1], NAMES[0]]
    order = rng.permutation(30)
    path = tmp_path / "predictions_val.parquet"
    turned = p._replace(labels=p.labels[order], predicted=p.predicted[order], probabilities=p.probabilities[order])
    about = {"fingerprint": "f", "split": "val", "title": "other"}
    predictions.write(turned, [names[i] for i in order], about, path)
    found = comparing.compare(p, names, "f", comparing.open_other(path, "val"))
    assert (found.only_this, found.only_other, found.both) == (0, 0, p.correct.sum())
    with pytest.raises(UserError, match=r"names and labels are the same, the content is not"):
        comparing.compare(p, names, "g", comparing.open_other(path, "val"))


def test_other_images_are_refused(rng, tmp_path):
    p = predicted.single(rng, 30, 3)
    path = tmp_path / "predictions_val.parquet"
    predictions.write(p, None, {"fingerprint": "f", "split": "val", "title": "other"}, path)
    other = comparing.open_other(path, "val")
    fewer, moved = (p._replace(index=index, labels=p.labels[: len(index)]) for index in (p.index[1:], p.index + 1))
    others = p._replace(labels=np.where(p.index == 7, (p.labels + 1) % 3, p.labels))
    for this, names, fingerprint, how in [
        (fewer, None, "g", "here are 29"),
        (fewer, None, "f", "here are 29 without the bad ones"),
        (moved, None, "f", "here is image 1, and there image 0"),
        (others, None, "g", f"image 7 is c{others.labels[7]} here, and c{p.labels[7]} there"),
        (p, None, "g", "names and labels are the same, the content is not"),
        (p, NAMES, "g", "only one of both has names of files"),
    ]:
        with pytest.raises(UserError, match=rf"predictions on other images, 30 of split 'val'; {how}\. Evaluate both"):
            comparing.compare(this, names, fingerprint, other)
    predictions.write(p, NAMES, {"fingerprint": "f", "split": "val", "title": "other"}, path)
    with pytest.raises(UserError, match=r"; here is a/1\.png, and there b/00\.png\. Evaluate both"):
        comparing.compare(p, ["a/1.png", *NAMES[1:]], "g", comparing.open_other(path, "val"))
    predictions.write(predicted.several(rng, 6, 3), None, {}, path)
    with pytest.raises(UserError, match=r"have several labels; McNemar's test is for one label an image"):
        comparing.open_other(path, "val")
