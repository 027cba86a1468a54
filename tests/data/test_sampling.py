"""Balanced sampling: each class equally often, a function of seed and place alone."""

import dataclasses
import pickle
from collections import Counter

import cv2
import numpy as np
import pytest

from tests.data.test_pipeline import LOAD, assert_same, take
from xception_flax import data
from xception_flax.data import sampling
from xception_flax.data.sources.source import Arrays
from xception_flax.text.errors import UserError

# 100 images of three classes: 70, 27, 3. Each image has its number as its pixel.
LABELS = np.array([0] * 70 + [1] * 27 + [2] * 3, np.int32)
SOURCE = Arrays(np.arange(100, dtype=np.uint8).reshape(100, 1, 1), LABELS, ("a", "b", "c"))


def test_each_class_comes_equally_often():
    """In an epoch of 100 each of three classes 33 or 34 times; after three epochs each 100 times."""
    order = sampling.Balanced(SOURCE, seed=4)
    epochs = [[order.index(100 * epoch + i) for i in range(100)] for epoch in range(6)]
    for epoch in epochs:
        assert sorted(Counter(LABELS[epoch].tolist()).values()) == [33, 33, 34]
    assert Counter(LABELS[np.concatenate(epochs)].tolist()) == {0: 200, 1: 200, 2: 200}
    # Each class goes through its images before one comes again.
    seen = Counter(np.concatenate(epochs).tolist())
    for label, most in ((0, 3), (1, 8), (2, 67)):
        counts = [seen[i] for i in np.flatnonzero(label == LABELS)]
        assert max(counts) - min(counts) <= 1
        assert max(counts) == most
    assert epochs[0] != epochs[1]
    labels = LABELS[epochs[0]].tolist()
    assert max(sum(a == b for a, b in zip(labels, labels[k:], strict=False)) for k in (1, 2, 3)) < 60  # no fixed turn


def test_the_order_is_that_of_the_seed():
    order = sampling.Balanced(SOURCE, seed=4)
    places = [*range(50), 10**9, 7 * 10**17]
    expected = [order.index(place) for place in places]
    assert [order.index(place) for place in reversed(places)] == expected[::-1]
    again = pickle.loads(pickle.dumps(order))
    assert [again.index(place) for place in places] == expected
    assert [sampling.Balanced(SOURCE, seed=5).index(place) for place in places] != expected


def test_hosts_workers_and_a_resumed_run_see_the_same():
    options = dict(sampling="balanced", seed=3)
    whole = take(6, **options)
    assert_same(take(6, **options, num_workers=2, num_threads=1), whole)
    assert_same(take(3, start=3, **options), whole[3:])
    halves = [take(6, **options, process_index=i, process_count=2) for i in (0, 1)]
    joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*halves, strict=True)]
    assert_same(joined, whole)
    labels = np.concatenate([batch["labels"] for batch in take(1257 // 16 + 1, **options)])[:1257]
    assert set(Counter(labels.tolist()).values()) == {125, 126}  # 1,257 images of ten digits


def test_what_cannot_be_balanced_is_refused(tmp_path):
    several = dataclasses.replace(SOURCE, labels=np.eye(3, dtype=np.uint8)[LABELS])
    with pytest.raises(UserError, match="needs one label an image, known without reading"):
        sampling.Balanced(several, 0)
    np.savez(tmp_path / "x.npz", train_images=np.zeros((9, 8, 8), np.uint8), train_labels=np.eye(9, dtype=np.uint8))
    with pytest.raises(UserError, match="needs one label an image"):
        data.load("arrays", path=str(tmp_path / "x.npz"), train=True, batch_size=8, image_size=8, sampling="balanced")
    with pytest.raises(UserError, match=r"unknown data\.sampling 'balance'; did you mean 'balanced'"):
        data.load(**(LOAD | dict(source="digits", train=True, batch_size=16)), sampling="balance")


def test_shares_of_classes():
    np.testing.assert_allclose(sampling.class_shares(SOURCE), [0.7, 0.27, 0.03])
    several = dataclasses.replace(SOURCE, labels=np.uint8([[1, 1, 0], [0, 1, 0]] * 50))
    np.testing.assert_allclose(sampling.class_shares(several), [0.5, 1, 0])


def test_tables_know_their_labels(tmp_path):
    for i in range(4):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.zeros((8, 8, 3), np.uint8))
    table = tmp_path / "labels.csv"
    table.write_text("file,label\n0.png,b\n1.png,b\n2.png,a\n3.png,b\n")
    source = data.SOURCES["table"]("all", path=str(table))
    np.testing.assert_allclose(sampling.class_shares(source), [0.25, 0.75])
    order = sampling.Balanced(source, 1)
    assert Counter(order.index(i) == 2 for i in range(4)) == {True: 2, False: 2}
    table.write_text("file,label\n0.png,b|a\n1.png,b\n2.png,a\n3.png,b\n")
    source = data.SOURCES["table"]("all", path=str(table), label_separator="|")
    np.testing.assert_allclose(sampling.class_shares(source), [0.5, 0.75])
    with pytest.raises(UserError, match="needs one label an image"):
        sampling.Balanced(source, 1)
