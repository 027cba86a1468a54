"""Arrays of an .npz file: labels in every form, and what is wrong with them."""

import io
import warnings
import zipfile

import numpy as np
import pytest

from xception_flax.data import sources
from xception_flax.host import allocator
from xception_flax.text.errors import UserError


def test_mistakes_in_arrays_are_refused(tmp_path):
    def write(**content):
        np.savez(tmp_path / "a.npz", **content)
        return str(tmp_path / "a.npz")

    images, labels = np.zeros((3, 8, 8), np.uint8), np.array([0, 1, 2])
    for content, message in [
        (dict(images=images), "has no array 'train_images'"),
        (dict(train_images=images / 255, train_labels=labels), r"must be uint8 \[N, H, W\]"),
        (dict(train_images=images, train_labels=labels[:2]), "with a label each"),
        (dict(train_images=images, train_labels=np.eye(3, dtype=int) * 2), "must be 0 or 1, got 0 to 2"),
        (dict(train_images=images, train_labels=labels * 0.5), r"must be integers, .* got 0\.5\.$"),
        (dict(train_images=images, train_labels=labels.astype(complex)), r"must be integers, .* got complex128 \(3,\)"),
        (dict(train_images=images, train_labels=["a", "b", "c"]), r"must be integers, .* got <U1 \(3,\)"),
        (dict(train_images=images, train_labels=np.zeros((3, 0), int)), r"must be integers, .* got int64 \(3, 0\)"),
        (dict(train_images=images, train_labels=labels * 4.0 - 1), r"numbers of classes, from 0 on, got -1\.$"),
        (dict(train_images=images, train_labels=labels * 1e300), r"must be the numbers of classes, got 2e\+300\.$"),
        (dict(train_images=images, train_labels=[0, 1, -(2**63)]), "from 0 on, got -9223372036854775808"),
        (dict(train_images=images, train_labels=[0, 1, 2**62]), "4,611,686,018,427,387,905 classes, .* for 3 images"),
        (dict(train_images=images, train_labels=np.uint64([0, 1, 2**64 - 1])), "18,446,744,073,709,551,616 classes"),
        (dict(train_images=images, train_labels=np.zeros((3, 2**20 + 1), bool)), "1,048,577 classes, .* for 3 images"),
        (dict(train_images=images, train_labels=labels, class_names=list("abb")), "class_names must differ, got 'b' 2"),
        (
            dict(train_images=images, train_labels=labels, class_names=["x" * 999] * 3),
            r"must differ, got .x{59} \.\.\. x{29}. 3 t",
        ),
        (dict(train_images=images, train_labels=labels, class_names=["\xe9", "e\u0301", "f"]), "got '\xe9' 2 times"),
        (dict(train_images=images, train_labels=labels, class_names=[]), r"must be a list of names, .* \(0,\)"),
        (dict(train_images=images, train_labels=labels, class_names=[["a"], ["b"], ["c"]]), "list of names, .* <U1"),
        (
            dict(train_images=np.zeros((3, 3, 8, 8), np.uint8), train_labels=labels),
            "come last: np.moveaxis.images, 1, -1",
        ),
        (dict(train_images=np.zeros((3, 8, 8, 5), np.uint8), train_labels=labels), "1, 3 or 4 channels, got 5 of "),
        (dict(train_images=np.zeros((3, 0, 8), np.uint8), train_labels=labels), r"got uint8 \(3, 0, 8\)"),
        (dict(train_images=images, train_labels=labels, class_names=["a", "b"]), "must be in 0 to 1, got 0 to 2"),
        (dict(train_images=images, train_labels=np.eye(3, dtype=int), class_names=["a", "b"]), "2 class_names, got 3"),
        (dict(train_images=images[:0], train_labels=labels[:0]), "train_images has no image"),
        (dict(train_images=images, train_labels=np.array(1)), "with a label each, got .* and labels \\(\\)"),
        (dict(train_images=images, train_labels=np.array([0, None, 2])), "train_labels is an array of Python objects"),
    ]:
        with pytest.raises(UserError, match=message):
            sources.arrays.arrays("train", path=write(**content))

    file = io.BytesIO()
    np.savez_compressed(file, train_images=images, train_labels=labels)
    whole = file.getvalue()
    flipped = bytearray(whole)
    flipped[whole.index(b"train_images.npy") + 60] ^= 1
    plain = io.BytesIO()
    np.save(plain, images)
    for content in (b"", b"garbage" * 9, b"PK\x03\x04" + bytes(9), whole[:200], bytes(flipped), plain.getvalue()):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.npz is not a readable \.npz file \([^\n]+\)\.$"):
            sources.arrays.arrays("train", path=str(tmp_path / "a.npz"))


def test_labels_are_taken_in_every_form_that_means_one_thing(tmp_path):
    path, images = str(tmp_path / "a.npz"), np.zeros((3, 8, 8), np.uint8)

    def read(labels, **names):
        np.savez(path, train_images=images, train_labels=labels, **names)
        found = sources.arrays.arrays("train", path=path)
        return found.labels.dtype, found.labels.tolist(), found.class_names

    expected = (np.int32, [0, 2, 1], ("0", "1", "2"))
    for labels in (
        [0, 2, 1],
        [[0], [2], [1]],
        [0.0, 2.0, 1.0],
        np.array([0, 2, 1], ">i8"),
        np.array([[0], [2], [1]], ">f4"),
        np.array([0, 2, 1], np.float16),
    ):
        with warnings.catch_warnings(action="error"):
            assert read(np.asarray(labels)) == expected
    rows = np.eye(3)[[0, 2, 1]]
    for labels in (rows, rows > 0, rows.astype(">i2")):
        assert read(labels) == (np.uint8, rows.tolist(), ("0", "1", "2"))
    assert read(np.array([True, False, True])) == (np.int32, [1, 0, 1], ("0", "1"))
    assert read(np.array([[1], [0], [1]]), class_names=[b"no", "d\xe9j\xe0 vu".encode()]) == (
        np.int32,
        [1, 0, 1],
        ("no", "d\xe9j\xe0 vu"),
    )
    assert read([9, 0, 1])[2] == tuple("0123456789")  # a few images of many classes, for evaluation


def test_an_npz_file_is_believed_before_it_is_read(tmp_path, monkeypatch):
    """Headers that claim more than the file has, and an array larger than memory, are refused."""
    path = tmp_path / "a.npz"

    def write(shape, content):
        header, labels = io.BytesIO(), io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        np.save(labels, np.zeros(4, int))
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("train_images.npy", header.getvalue() + content)
            archive.writestr("train_labels.npy", labels.getvalue())

    for shape, content, message in [
        ((2**34, 8, 8), b"abc", r"\(17179869184, 8, 8\) by its header, 1,099,511,627,776 bytes, and has 3; the file"),
        ((4, 8, 8), bytes(255), "by its header, 256 bytes, and has 255; the file is damaged"),
        ((-4, 8, 8), bytes(256), "by its header, -256 bytes, and has 256"),
    ]:
        write(shape, content)
        with pytest.raises(UserError, match=message):
            sources.arrays.arrays("train", path=str(path))
    write((2**28, 8, 8), b"")
    with zipfile.ZipFile(path, "a") as archive:  # the archive's directory claims it too
        archive.writestr("more", b"")
        archive.filelist[0].file_size += 2**34
    with pytest.raises(
        UserError, match=r"holds 16\.0 GiB by its header, in \d\d\d bytes, as no images do; it is damaged"
    ):
        sources.arrays.arrays("train", path=str(path))
    write((4, 1000, 1000), bytes(4_000_000))
    assert path.stat().st_size < 10_000
    assert sources.arrays.arrays("train", path=str(path)).images.shape == (4, 1000, 1000)
    assert allocator.free_memory_bytes() > 2**27
    monkeypatch.setattr(allocator, "free_memory_bytes", lambda: 2**21)
    monkeypatch.setattr(np, "load", None)
    with pytest.raises(UserError, match=r"a\.npz holds 0\.0 GiB by its header, but 0\.0 GiB of memory are free; data"):
        sources.arrays.arrays("train", path=str(path))
