"""Splits that do not leak: groups stay together, classes have their share, and nothing depends on the order."""

import hashlib
import itertools
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from preparing import fail
from xception_flax.data import sources
from xception_flax.data.sources import splitting
from xception_flax.data.sources.splitting import Labels, Rule, keys_of
from xception_flax.text.errors import UserError

folder, table = sources.folder.folder, sources.table.table


def hash_of(text: str) -> float:
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_what_images_have_in_common():
    paths = ["p1/study2/clip7_frame003.jpg", "p1/clip8_frame1.png", "x/p2/cafe\u0301_frame9.jpg"]
    assert keys_of(paths, None) == ["clip7_frame003.jpg", "clip8_frame1.png", "caf\xe9_frame9.jpg"]
    assert keys_of(paths, "folder:1") == ["study2", "p1", "p2"]
    assert keys_of(paths, "(.*)_frame") == ["clip7", "clip8", "caf\xe9"]
    assert keys_of(paths[2:], "(cafe\u0301)") == ["caf\xe9"]
    for group_by, message in [
        ("folder:2", r"data\.group_by=folder:2: 1 image of 3 has no such group, as p1/clip8_frame1\.png\."),
        ("(clip.*)_", r"data\.group_by=\(clip\.\*\)_: 1 image of 3 has no such group, as x/p2/caf\xe9_frame9\.jpg\."),
        ("(p1)", r"3 images of 3 have no such group, as p1/study2/clip7"),  # the file's name alone is searched
        ("folder", r"data\.group_by must be folder:N, .*, got 'folder', which has 0 groups"),
        ("folder:0", r"got 'folder:0', which has 0 groups"),
        ("(a)(b)", r"got '\(a\)\(b\)', which has 2 groups"),
        ("(a", r"got '\(a' \(missing \), unterminated subpattern at position 0\)"),
    ]:
        with pytest.raises(UserError, match=message):
            keys_of(paths, group_by)


def test_the_frames_of_a_video_are_of_one_split(tmp_path):
    """By folders or by names: the hash of the group decides, in composed form, whatever the class."""
    videos = [f"{name}{i}" for i in range(20) for name in ("cafe\u0301", "tape")]
    for i, video in enumerate(videos):
        for frame in range(3):
            touch(tmp_path / "below" / "ab"[i % 2] / video, f"{frame}.jpg")
            touch(tmp_path / "beside" / "ab"[i % 2], f"{video}_{frame}.jpg")
    expected = {video for video in videos if hash_of(unicodedata.normalize("NFC", video)) < 0.3}
    assert 5 < len(expected) < 20
    for place, group_by in (("below", "folder:1"), ("beside", r"(.*)_\d+")):
        options = dict(data_dir=str(tmp_path / place), val_fraction=0.3, group_by=group_by)
        read = {split: folder(split, **options) for split in ("train", "val", "all")}
        found = {
            split: [
                Path(path).parent.name if place == "below" else Path(path).name.rpartition("_")[0]
                for path in files.paths
            ]
            for split, files in read.items()
        }
        assert set(found["val"]) == expected
        assert set(found["train"]) == set(videos) - expected
        assert len(found["val"]) == 3 * len(expected)
        assert sorted(read["train"].paths + read["val"].paths) == sorted(read["all"].paths)
        assert read["train"].class_names == ("a", "b")


def test_mistakes_with_groups_in_a_folder(tmp_path, capsys, monkeypatch):
    photos = touch(
        tmp_path / "photos", *(f"a/clip{i % 2}/{i}.jpg" for i in range(9)), *(f"b/x/{i}.jpg" for i in range(9))
    )
    values = {name: hash_of(name) for name in ("clip0", "clip1", "x")}

    def load(split, **options):
        return folder(split, data_dir=str(photos), **options)

    with pytest.raises(
        UserError, match=r"there are folders in a, b, none of which .* such as videos, set data\.group_by=folder:1\."
    ):
        load("train")
    with pytest.raises(
        UserError, match=r"photos/b: by their groups all 9 images are of split 'val' \(data\.val_fraction="
    ):
        load("train", group_by="folder:1", val_fraction=values["x"] + 0.01)
    with pytest.raises(
        UserError, match=r"no image is of split 'val' by the hash of its group .*, or make folders train/"
    ):
        load("val", group_by="folder:1", val_fraction=min(values.values()) / 2)
    with pytest.raises(
        UserError, match=r"b: no image is of split 'val', with 9 images in all, of one group or .* two groups"
    ):
        load("val", group_by="folder:1", stratify=True)
    with pytest.raises(UserError, match=r"group_by must be folder:N, a regular expression .* got ''"):
        load("train", group_by="")
    for command in (["check"], ["folder", "--data-dir", tmp_path / "tfds"]):
        options = ["--config.data.group_by=folder:3", "--val-fraction", "0.5"]
        assert "18 images of 18 have no such group" in fail(
            capsys, monkeypatch, command[0], photos, *command[1:], *options
        )
    touch(tmp_path / "split", "train/a/1.jpg", "val/a/2.jpg")
    for options, key in ((dict(group_by="folder:1"), "group_by"), (dict(stratify=True), "stratify")):
        with pytest.raises(UserError, match=rf"has folders of splits \(train, val\) already; leave out data\.{key}\."):
            folder("train", data_dir=str(tmp_path / "split"), **options)


# By classes ----------------------------------------------------------------------------------------


def shares(keys: list[str], classes: np.ndarray, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    """Which images are held out, and how many of each class."""
    labels = Labels(np.arange(len(keys)), classes, [str(i) for i in range(classes.max() + 1)])
    is_val = splitting.held_out(keys, labels, rule)
    return is_val, np.bincount(classes[is_val], minlength=classes.max() + 1)


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.25, 0.5, 0.9])
def test_each_class_has_its_share(fraction):
    """Rounded, with at least one image in each split; by the least hashes, so in any order the same images."""
    rng = np.random.default_rng(0)
    classes = np.repeat(np.arange(6), (2, 3, 5, 11, 40, 400))
    keys = [f"{i}.jpg" for i in range(len(classes))]
    is_val, counts = shares(keys, classes, Rule(fraction, None, True))
    totals = np.bincount(classes)
    assert counts.tolist() == [min(max(round(fraction * n), 1), n - 1) for n in totals.tolist()]
    for number in range(6):
        mine = sorted((hash_of(key), held) for key, held, c in zip(keys, is_val, classes, strict=True) if c == number)
        assert [held for _, held in mine] == [True] * counts[number] + [False] * (totals[number] - counts[number])
    order = rng.permutation(len(keys))
    again, _ = shares([keys[i] for i in order], classes[order], Rule(fraction, None, True))
    np.testing.assert_array_equal(again, is_val[order])


@pytest.mark.parametrize("seed", range(20))
def test_the_share_is_as_exact_as_whole_groups_allow(seed):
    """Against every set of groups: none is nearer. Groups stay whole."""
    rng = np.random.default_rng(seed)
    sizes = [rng.integers(1, 9, size=rng.integers(2, 11)).tolist() for _ in range(3)]
    keys = [f"{c}-{g}" for c, of_class in enumerate(sizes) for g, size in enumerate(of_class) for _ in range(size)]
    classes = np.array([int(key[0]) for key in keys])
    fraction = rng.uniform(0.05, 0.6)
    is_val, counts = shares(keys, classes, Rule(fraction, "(.*)", True))
    for key in set(keys):
        assert len({held for held, other in zip(is_val, keys, strict=True) if other == key}) == 1
    for number, of_class in enumerate(sizes):
        target = max(round(fraction * sum(of_class)), 1)
        sets = itertools.chain.from_iterable(itertools.combinations(of_class, n) for n in range(1, len(of_class)))
        assert abs(counts[number] - target) == min(abs(sum(chosen) - target) for chosen in sets)


def test_many_groups_take_no_time_and_are_exact():
    """20,000 groups of 1 to 30 images in 4 classes: each share within an image."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 31, 20_000)
    keys = [f"g{g}" for g, size in enumerate(sizes) for _ in range(size)]
    classes = np.repeat(np.arange(20_000) % 4, sizes)
    _, counts = shares(keys, classes, Rule(0.1, "(.*)", True))
    assert counts.tolist() == [round(0.1 * n) for n in np.bincount(classes).tolist()]


def test_groups_of_several_classes_and_images_of_several_labels():
    """The rarest class comes first; every class is in both splits, and near its share."""
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 150, 2000)
    images, classes = np.nonzero(rng.random((2000, 5)) < (0.02, 0.05, 0.2, 0.5, 0.9))
    labels = Labels(images, classes, list("abcde"))
    for keys, most in (([f"{g}" for g in groups], 0.08), ([f"{i}.jpg" for i in range(2000)], 0.03)):
        is_val = splitting.held_out(keys, labels, Rule(0.2, "(.*)", True))
        held = np.bincount(classes[is_val[images]], minlength=5) / np.bincount(classes)
        assert held[0] == pytest.approx(0.2, abs=1 / np.bincount(classes)[0])
        assert np.abs(held - 0.2).max() < most
        order = rng.permutation(2000)
        place = np.argsort(order)
        again = splitting.held_out(
            [keys[i] for i in order], Labels(place[images], classes, list("abcde")), Rule(0.2, "", True)
        )
        np.testing.assert_array_equal(again, is_val[order])


def test_a_class_that_cannot_be_in_both_splits_is_named(tmp_path):
    photos = touch(tmp_path, *(f"cat/{i}.jpg" for i in range(10)), "dog/1.jpg")
    with pytest.raises(
        UserError, match=rf"^{photos}/dog: no image is of split 'val', with 1 image in all; data\.stratify ne"
    ):
        folder("val", data_dir=str(photos), stratify=True)
    touch(photos, "dog/2.jpg")
    for split, count in (("train", [9, 1]), ("val", [1, 1])):
        assert np.bincount(folder(split, data_dir=str(photos), stratify=True).labels).tolist() == count
    (photos / "a.csv").write_text("image,label\n" + "".join(f"{i},x\n" for i in range(3, 9)) + "cat/1,y\n")
    with pytest.raises(
        UserError, match=r"a\.csv: class 'y': no image is of split 'val', with 1 image .*add a column of spl"
    ):
        table("val", path=str(photos / "a.csv"), stratify=True)


def test_a_column_of_patients(tmp_path):
    """All rows of a patient are of one split, and each class has its share."""
    rows = [(f"{i}.jpg", "ab"[i % 7 == 0], f"patient {i // 5}") for i in range(100)]
    touch(tmp_path, *(row[0] for row in rows))
    (tmp_path / "a.csv").write_text("\n".join(["image,label,patient", *map(",".join, rows)]))
    path = str(tmp_path / "a.csv")
    of_patient = {row[0]: row[2] for row in rows}

    def patients(split, **options):
        found = table(split, path=path, group_by="patient", **options)
        return [of_patient[Path(found.path(i)).name] for i in range(len(found))], found

    expected = {row[2] for row in rows if hash_of(row[2]) < 0.25}
    (train, _), (val, _) = patients("train", val_fraction=0.25), patients("val", val_fraction=0.25)
    assert (set(val), set(train)) == (expected, {row[2] for row in rows} - expected)
    (train, _), (val, found) = (patients(split, val_fraction=0.25, stratify=True) for split in ("train", "val"))
    assert not set(train) & set(val)
    counts = np.bincount(found.numbered().classes)
    assert abs(counts[1] - 15 * 0.25) <= 1
    assert abs(counts[0] - 85 * 0.25) <= 4
    with pytest.raises(UserError, match=r"data\.group_by=folder:1: 100 images of 100 have no such group"):
        table("train", path=path, group_by="folder:1")
    (tmp_path / "a.csv").write_text("\n".join(["image,label,patient", *map(",".join, rows), "100.jpg,a,"]))
    touch(tmp_path, "100.jpg")
    with pytest.raises(UserError, match=r"row 102 has nothing in column 'patient'"):
        table("train", path=path, group_by="patient")
