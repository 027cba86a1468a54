"""Data sets of TensorFlow Datasets, without TensorFlow."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from datasets import prepare_tfds
from xception_flax import data
from xception_flax.data import sources
from xception_flax.text.errors import UserError

LOAD = dict(image_size=32, channels=1, train_transforms="random_affine(max_shift=0.2) | resize")


def test_tfds_by_name_and_by_directory_and_by_slice(prepared):
    directory = Path(prepared["tfds"]["data_dir"])
    assert (directory.name, directory.parent.name) == ("1.2.3", "small_digits")
    whole = sources.tfds.tfds("train", data_dir=str(directory))
    half = sources.tfds.tfds("train[:50%]", data_dir=str(directory))
    assert (len(whole), len(half)) == (40, 20)
    named = sources.tfds.tfds("train", name="small_digits", data_dir=str(directory.parent.parent))
    assert named[7]["image"] == whole[7]["image"]


@pytest.mark.parametrize("label", [7, -1])
def test_a_label_of_no_class_is_refused(label):
    for several in (False, True):
        record = {"image": b"", "label": [1, label] if several else label}
        source = sources.tfds.TfdsSource([record], tuple("abcde"), "image", "label", several)
        with pytest.raises(sources.InputError, match=f"record 0 has the label {label}, which is none of 5 classes"):
            source[0]


def test_tfds_with_several_labels(tmp_path):
    digits = sources.digits.digits("train")
    directory = prepare_tfds(tmp_path, digits.images[:60], digits.labels[:60], "array_record", several=True)
    source = sources.tfds.tfds("train", data_dir=directory, label_key="labels")
    single = sources.tfds.tfds("train", data_dir=directory)
    rows = np.stack([source[i]["label"] for i in range(40)])
    assert (rows.shape, rows.dtype) == ((40, 10), np.uint8)
    assert all(rows[i][single[i]["label"]] == 1 for i in range(40))
    assert set(rows.sum(-1)) == {1, 2}
    batch = next(
        data.load(source="tfds", train=False, batch_size=4, label_key="labels", data_dir=directory, **LOAD).batches()
    )
    assert (batch["labels"].shape, batch["labels"].dtype) == ((4, 10), np.uint8)


def test_mistakes_with_tfds_are_refused(prepared, tmp_path):
    directory = prepared["tfds"]["data_dir"]
    for keywords, message in [
        (dict(split="tran", data_dir=directory), r"has no split 'tran' .*there are: test, train"),
        (dict(split="train", data_dir=directory, label_key="lable"), "no feature 'lable'; did you mean 'label'"),
        (dict(split="train", data_dir=directory, label_key="image"), "must be a ClassLabel or a sequence of them"),
        (
            dict(split="train", data_dir=str(tmp_path)),
            "has no dataset_info.json; give NAME/VERSION of a .* by --config.data.data_dir=DIR",
        ),
        (
            dict(split="train", name="no_such_data", data_dir=str(tmp_path)),
            "no TFDS data set 'no_such_data', neither .* none is like it",
        ),
        (dict(split="train", name="imagnet2012", data_dir=str(tmp_path)), "did you mean 'imagenet2012'"),
        (
            dict(split="train", name="imagenet2012", data_dir=str(tmp_path)),
            "is not prepared in .*--config.data.data_dir=DATA",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            sources.tfds.tfds(keywords.pop("split"), **keywords)


@pytest.mark.parametrize(
    ("number", "message"),
    [(2**62, "4,611,686,018,427,387,904 classes, .* for 40 images"), (None, "says nothing of its")],
)
def test_a_number_of_classes_that_cannot_be_is_refused(prepared, tmp_path, number, message):
    """The data set has no names of classes."""
    directory = tmp_path / "small_digits" / "1.2.3"
    shutil.copytree(prepared["tfds"]["data_dir"], directory)
    (directory / "label.labels.txt").unlink()
    description = json.loads((directory / "features.json").read_text())
    label = description["featuresDict"]["features"]["label"]["classLabel"]
    label.pop("numClasses")
    label |= {} if number is None else {"numClasses": str(number)}
    (directory / "features.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=message):
        sources.tfds.tfds("train", data_dir=str(directory))


def test_tfds_in_a_format_without_random_access_is_refused(prepared, tmp_path):
    """A data set whose dataset_info.json says tfrecord, the default of TFDS, is refused before it is read."""
    directory = tmp_path / "small_digits" / "1.2.3"
    shutil.copytree(prepared["tfds"]["data_dir"], directory)
    info = directory / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="holds file format 'tfrecord', which has no random access; prepare"):
        sources.tfds.tfds("train", data_dir=str(directory))
