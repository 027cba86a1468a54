"""Images of two splits that look the same."""

import json
import re
import time

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from benchmarks import photos
from preparing import run
from xception_flax.prepare import similar

PHOTOS = [Image.fromarray(photos.photo(name)).resize((320, 240)) for name in photos.PHOTOS]


def look(image: Image.Image) -> int | None:
    return similar.perceptual_hash(np.asarray(image.convert("RGB")))


def distance(one: Image.Image, other: Image.Image) -> int:
    return (look(one) ^ look(other)).bit_count()


def test_copies_look_the_same_and_other_photographs_do_not():
    for i, photo in enumerate(PHOTOS):
        assert distance(photo, photo.resize((160, 120))) <= similar.MAX_DISTANCE
        assert distance(photo, ImageEnhance.Brightness(photo).enhance(0.8)) <= similar.MAX_DISTANCE
        assert look(photo).bit_count() == 32  # half of the bits are above the median
        for other in PHOTOS[:i]:
            assert distance(photo, other) > 12
    assert look(Image.new("RGB", (64, 64), (9, 9, 9))) is None


def brute_force(hashes: dict[str, list[int | None]]) -> set[tuple[int, str, int]]:
    """The distance of each image of the smaller split to the nearest of the larger, if it is near."""
    few, many = sorted(hashes, key=lambda split: len(hashes[split]))
    there = [value for value in hashes[many] if value is not None]
    nearest = [
        (min((value ^ other).bit_count() for other in there), few, i)
        for i, value in enumerate(hashes[few])
        if value is not None
    ]
    return {entry for entry in nearest if entry[0] <= similar.MAX_DISTANCE}


@pytest.mark.parametrize("seed", range(5))
def test_near_hashes_are_all_found(seed):
    """Those with up to four bits changed, wherever they are, and no others."""
    rng = np.random.default_rng(seed)
    train = [int(value) for value in rng.integers(0, 2**64, 300, np.uint64)]
    val = [int(value) for value in rng.integers(0, 2**64, 20, np.uint64)]
    for value in train[:60]:
        changed = rng.choice(64, rng.integers(0, 8), replace=False)
        val.append(value ^ sum(1 << int(bit) for bit in changed))
    hashes = {"train": [*train, None], "val": [None, *val]}
    pairs = similar.near(hashes)
    assert {(pair.distance, *pair.one) for pair in pairs} == brute_force(hashes)
    assert len(pairs) > 20
    assert pairs == sorted(pairs)
    for pair in pairs:
        one, other = (hashes[split][place] for split, place in (pair.one, pair.other))
        assert (one ^ other).bit_count() == pair.distance


def test_images_of_one_split_are_not_compared():
    assert similar.near({"train": [5, 5, 5], "val": []}) == []
    assert [tuple(pair) for pair in similar.near({"a": [5], "b": [5, 5], "c": [4]})] == [
        (0, ("a", 0), ("b", 0)),
        (1, ("a", 0), ("c", 0)),
        (1, ("c", 0), ("b", 0)),
    ]


def test_a_hundred_thousand_images_take_seconds():
    """Also if a fifth of them is alike, as scans are; all pairs would be 900 million."""
    rng = np.random.default_rng(0)
    train, val = (rng.integers(0, 2**64, n, np.uint64) for n in (90_000, 10_000))
    base = rng.integers(0, 2**64, dtype=np.uint64)
    for values in (train, val):
        some = values[: len(values) // 5]
        some[:] = base ^ (np.uint64(1) << rng.integers(0, 64, (8, len(some)), np.uint64)).sum(0, dtype=np.uint64)
    begun = time.perf_counter()
    pairs = similar.near({"train": train.tolist(), "val": val.tolist()})
    assert time.perf_counter() - begun < 30  # measured: 0.3
    assert len(pairs) > 100


def test_check_names_what_looks_the_same_in_two_splits(tmp_path, capsys):
    """Across the splits that training has: with groups that keep them together, nothing is found."""
    for i, photo in enumerate(PHOTOS):
        for place, copies in (("a", 1), ("b", 3)):
            for n in range(copies):
                path = tmp_path / "photos" / place / f"{place}{i}_{n}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                tinted = photo if place == "a" else photo.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
                tinted.save(path, quality=90 - 20 * n)
    run("check", tmp_path / "photos", "--val-fraction", "0.4", "--json", tmp_path / "report.json")
    out, report = capsys.readouterr().out, json.loads((tmp_path / "report.json").read_text())
    (number,) = re.findall(r"\n(\d+) images look nearly the same as one of another split \(pHash, up to 4 of 64", out)
    assert len(report["alike"]) == int(number) > 3
    for pair in report["alike"]:
        (one, i), (other, j) = (
            re.fullmatch(r"(train|val): \S+/(b\d)_\d\.jpg", text).groups() for text in pair["images"]
        )
        assert (one != other, i == j, pair["distance"] <= 4) == (True, True, True)
    first = report["alike"][0]
    assert re.search(rf"\n  {' ~ '.join(first['images'])} \({first['distance']}\)\n", out)
    assert "keep images of one video, patient or object in one split by data.group_by" in out
    run("check", tmp_path / "photos", "--val-fraction", "0.4", r"--config.data.group_by=([ab]\d)_")
    assert "look nearly the same" not in capsys.readouterr().out


def test_equal_files_are_named_once(tmp_path, capsys):
    """As files that are there more than once, with the same advice."""
    (tmp_path / "x").mkdir()
    for i in range(16):
        PHOTOS[0].save(tmp_path / "x" / f"{i}.png")
    run("check", tmp_path, "--val-fraction", "0.4")
    out = capsys.readouterr().out
    assert "1 file is there more than once, 1 of them in more than one split" in out
    assert "nearly the same" not in out
    assert "in one split by data.group_by" in out
