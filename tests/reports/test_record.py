"""What the record says the data is."""

import shutil

import numpy as np
import PIL.Image

from xception_flax import data
from xception_flax.reports import record


def fingerprint(folder, names=("a", "b"), order=(0, 1)):
    split = data.load("folder", 8, train=False, batch_size=8, data_dir=str(folder), eval_split="all")
    labels = np.array(order)[np.array(split.source.labels)]
    return record.fingerprint(split, names, labels), record.file_names(split.source)


def test_a_copy_is_the_same_data_and_a_change_is_not(rng, tmp_path):
    for i in range(8):
        path = tmp_path / "one" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(path)
    one, names = fingerprint(tmp_path / "one")
    assert names == ["a/0.png", "a/2.png", "a/4.png", "a/6.png", "b/1.png", "b/3.png", "b/5.png", "b/7.png"]
    two = tmp_path / "else" / "where"
    shutil.copytree(tmp_path / "one", two)
    assert fingerprint(two)[0] == one
    assert fingerprint(two, ("b", "x", "a"), (2, 0))[0] == one  # as another network numbers the classes
    assert fingerprint(two, ("b", "a"))[0] != one
    (two / "a" / "0.png").rename(two / "a" / "00.png")
    assert fingerprint(two)[0] != one
    (two / "a" / "00.png").rename(two / "a" / "0.png")
    assert fingerprint(two)[0] == one
    PIL.Image.new("RGB", (8, 8)).save(two / "b" / "7.png")
    assert fingerprint(two)[0] != one
