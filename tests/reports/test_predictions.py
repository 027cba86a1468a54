"""Predictions as they are collected from batches, and as they are in the file."""

import json
import tracemalloc

import jax
import numpy as np
import pyarrow.parquet
import pytest

from tests.reports import predicted
from xception_flax.reports import predictions
from xception_flax.reports.predictions import ALL_CLASSES, MAX_MISTAKES, TOP, Collector
from xception_flax.text.errors import UserError
from xception_flax.training import sharding
from xception_flax.training.metrics import create_metrics

NAMES = ["cat", "<b>", "caf\udce9"]


def collected(logits, labels, mask, *, size: int, activation=jax.nn.softmax, index=None):
    """Gives them batch by batch, on eight devices; image i is i everywhere."""
    mesh = sharding.create_mesh()
    several = labels.ndim == 2
    collector = Collector(list("abc"), len(labels), activation, mesh, several_labels=several)
    filled = -(-len(labels) // size) * size
    index = np.arange(filled, dtype=np.int32) if index is None else index
    for start in range(0, filled, size):
        rows = index[start : start + size]
        there = rows % len(labels)  # padding repeats an image
        batch = {
            "images": np.broadcast_to(there[:, None, None, None], (size, 2, 2, 1)).astype(np.uint8),
            "labels": labels[there],
            "mask": np.where(rows < len(labels), mask[there], 0).astype(np.float32),
            "index": rows,
            "logits": logits[there],
        }
        placed = sharding.global_batch(mesh, batch)
        collector(placed, placed["index"], placed["logits"])
    return collector.predictions()


def test_mistakes_are_counted_as_the_metric_counts_them(rng):
    """On padding, ties and NaN too, and beyond those that are kept."""
    logits = rng.normal(size=(100, 3)).astype(np.float32)
    logits[:30], logits[30:40, 1], logits[40:50, 0] = 0, np.nan, np.inf
    labels, mask = rng.integers(0, 3, 100).astype(np.int32), (rng.random(100) < 0.8).astype(np.float32)
    found = collected(logits, labels, mask, size=16)
    top1 = create_metrics("single_label")(logits, labels, mask)["top1"]
    assert len(found.index) == top1.count == mask.sum()
    assert (~found.correct).sum() == top1.count - top1.total > len(found.mistakes.images) == MAX_MISTAKES
    wrong = found.index[~found.correct][:MAX_MISTAKES]
    assert [int(image[0, 0, 0]) for image in found.mistakes.images] == wrong.tolist()
    assert found.mistakes.truths == ["abc"[label] for label in labels[wrong]]


def test_the_batches_and_their_order_change_nothing(rng):
    """Also where the devices hold the rows of a batch in another order than the split has them."""
    logits = rng.normal(size=(37, 3)).astype(np.float32)
    labels, mask = rng.integers(0, 3, 37).astype(np.int32), np.ones(37)
    mask[5] = 0
    first = collected(logits, labels, mask, size=8)
    order = np.concatenate([rng.permutation(40)]).astype(np.int32)
    for found in (
        first,
        collected(logits, labels, mask, size=40),
        collected(logits, labels, mask, size=40, index=order),
    ):
        np.testing.assert_array_equal(found.index, np.delete(np.arange(37), 5))
        np.testing.assert_array_equal(found.labels, np.delete(labels, 5))
        np.testing.assert_array_equal(found.all_labels, labels)
        np.testing.assert_array_equal(found.predicted, np.delete(logits.argmax(-1), 5))
        expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        np.testing.assert_allclose(found.probabilities, np.delete(expected, 5, 0), rtol=1e-5)


def test_several_labels_are_kept_as_they_are(rng):
    logits = rng.normal(size=(10, 3)).astype(np.float32)
    labels = rng.integers(0, 2, (10, 3)).astype(np.uint8)
    found = collected(logits, labels, np.ones(10), size=8, activation=jax.nn.sigmoid)
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_allclose(found.probabilities, 1 / (1 + np.exp(-logits)), rtol=1e-5)
    assert found.mistakes.images == []


def test_more_than_the_memory_is_refused():
    with pytest.raises(
        UserError, match=r"^the probabilities of 10,000,000,000 images and 3 classes take 120\.0 GB, and"
    ):
        Collector("abc", 10**10, jax.nn.softmax, sharding.create_mesh())


def test_the_file_has_a_row_for_each_image(rng, tmp_path):
    p = predicted.single(rng, 20, 3)._replace(class_names=NAMES)
    names = [f"c/{i}\udce9.png" for i in range(21)]
    p = p._replace(index=np.delete(np.arange(21), 4))
    predictions.write(p, names, {"fingerprint": "f", "split": "test", "title": "t"}, tmp_path / "p.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "p.parquet")
    about = json.loads(table.schema.metadata[b"xception_flax"])
    assert about["class_names"] == ["cat", "<b>", r"caf\xe9"]
    rows = table.to_pydict()
    assert rows["index"] == p.index.tolist()
    assert rows["file"] == [rf"c/{i}\xe9.png" for i in p.index]
    assert rows["true"] == [about["class_names"][i] for i in p.labels]
    assert rows["predicted"] == [about["class_names"][i] for i in p.predicted]
    assert rows["correct"] == (p.labels == p.predicted).tolist()
    np.testing.assert_array_equal(np.array(rows["probabilities"], np.float32), p.probabilities)
    np.testing.assert_array_equal(np.array(rows["probability"], np.float32), p.probabilities.max(-1))
    of_true = p.probabilities[np.arange(20), p.labels]
    np.testing.assert_array_equal(np.array(rows["probability_of_true"], np.float32), of_true)
    assert table.schema.field("probabilities").type == pyarrow.list_(pyarrow.float32(), 3)
    said = predictions.read(tmp_path / "p.parquet")
    assert said.about["class_names"] == NAMES
    np.testing.assert_array_equal(said.correct, p.correct)
    assert said.names == [names[i] for i in p.index]
    assert said.truths == [NAMES[i] for i in p.labels]
    assert [path.name for path in tmp_path.iterdir()] == ["p.parquet"]


def test_of_many_classes_the_most_likely_are_kept(rng, tmp_path, monkeypatch):
    p = predicted.single(rng, 5, ALL_CLASSES + 1)
    predictions.write(p, None, {}, tmp_path / "p.parquet")
    rows = pyarrow.parquet.read_table(tmp_path / "p.parquet").to_pydict()
    assert "probabilities" not in rows
    assert rows["file"] == [None] * 5
    top = np.argsort(-p.probabilities, axis=-1)[:, :TOP]
    np.testing.assert_array_equal(rows["top_classes"], top)
    np.testing.assert_array_equal(rows["top_probabilities"], np.take_along_axis(p.probabilities, top, -1))
    whole = (tmp_path / "p.parquet").read_bytes()
    monkeypatch.setattr(predictions, "BLOCK", 2 * ALL_CLASSES + 2)  # two rows at a time
    predictions.write(p, None, {}, tmp_path / "p.parquet")
    assert (tmp_path / "p.parquet").read_bytes() == whole


def test_writing_takes_little_memory_beside_the_predictions(rng, tmp_path):
    """An order of all classes of all images would be 8 bytes for each probability, twice the predictions themselves."""
    p = predicted.single(rng, 2000, 2 * ALL_CLASSES)
    predictions.write(predicted.single(rng, 5, ALL_CLASSES + 1), None, {}, tmp_path / "first.parquet")  # imports
    tracemalloc.start()
    predictions.write(p, None, {}, tmp_path / "p.parquet")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * p.probabilities.nbytes


def test_several_labels_are_lists(rng, tmp_path):
    p = predicted.several(rng, 6, 3)
    predictions.write(p, None, {}, tmp_path / "p.parquet")
    rows = pyarrow.parquet.read_table(tmp_path / "p.parquet").to_pydict()
    assert rows["true"] == [[f"c{i}" for i in np.flatnonzero(row)] for row in p.labels]
    assert rows["predicted"] == [[f"c{i}" for i in np.flatnonzero(row >= 0.5)] for row in p.probabilities]
    assert set(rows) == {"index", "file", "true", "predicted", "probabilities"}
    assert predictions.read(tmp_path / "p.parquet")[3:] == (None, None, None)


@pytest.mark.parametrize("content", ["text", "other", "nothing"])
def test_another_file_is_refused(content, tmp_path):
    path = tmp_path / "p.parquet"
    if content == "text":
        path.write_text("index,correct\n1,1\n")
    elif content == "other":
        pyarrow.parquet.write_table(pyarrow.table({"index": [1]}), path)
    expected = (
        "cannot be read: No such file" if content == "nothing" else "is no predictions of `xception-flax evaluate`"
    )
    with pytest.raises(UserError, match=f"^{path} {expected}"):
        predictions.read(path)
