"""IDX files: their splits, and what is wrong with them."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from xception_flax.data import sources
from xception_flax.text.errors import UserError


def test_mistakes_in_idx_files_are_refused(prepared, tmp_path):
    with pytest.raises(
        UserError, match=r"train-images-idx3-ubyte is missing, plain or as \.gz; .*apt install dataset-fashion-mnist"
    ):
        sources.fashion_mnist.fashion_mnist("train", data_dir=str(tmp_path))
    for path in Path(prepared["fashion_mnist"]["data_dir"]).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    images = tmp_path / "train-images-idx3-ubyte.gz"
    images.write_bytes(images.read_bytes()[:100])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz: not a readable IDX file"):
        sources.fashion_mnist.fashion_mnist("train", data_dir=str(tmp_path))
    whole = gzip.compress(bytes(1000))
    images.write_bytes(whole[:12] + bytes([whole[12] ^ 255]) + whole[13:])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz: not a readable IDX file"):
        sources.fashion_mnist.fashion_mnist("train", data_dir=str(tmp_path))
    images.write_bytes(gzip.compress(struct.pack(">HBB3I", 0, 8, 3, 2, 2, 2) + b"0123456"))
    with pytest.raises(UserError, match=r"expected 8 bytes of \(2, 2, 2\), got 7; it has been cut"):
        sources.fashion_mnist.fashion_mnist("train", data_dir=str(tmp_path))
    images.write_bytes(gzip.compress(struct.pack(">HBB3I", 0, 8, 3, 2, 2, 2) + bytes(10**7)))
    with pytest.raises(UserError, match=r"expected 8 bytes of \(2, 2, 2\), got more\.$"):
        sources.fashion_mnist.fashion_mnist("train", data_dir=str(tmp_path))
    images.write_bytes(gzip.compress(struct.pack(">HBB3I", 0, 8, 3, 2**31, 2**31, 2) + b"abc"))
    with pytest.raises(UserError, match=r"ubyte\.gz holds 8,589,934,592\.0 GiB by its header, but"):
        sources.fashion_mnist.fashion_mnist("train", data_dir=str(tmp_path))
    images.write_bytes(gzip.compress(struct.pack(">HBBI", 0, 8, 1, 3) + b"abc"))
    with pytest.raises(UserError, match="expected an IDX file of bytes with 3 dimensions"):
        sources.fashion_mnist.fashion_mnist("train", data_dir=str(tmp_path))
    labels = tmp_path / "t10k-labels-idx1-ubyte"  # EMNIST has letters in files of this kind
    labels.write_bytes(labels.read_bytes()[:-1] + bytes([26]))
    with pytest.raises(UserError, match="the t10k labels go up to 26, but Fashion-MNIST has 10 classes; other data"):
        sources.fashion_mnist.fashion_mnist("test", data_dir=str(tmp_path))


def test_fashion_mnist_splits(prepared):
    parts = {
        s: sources.fashion_mnist.fashion_mnist(s, **prepared["fashion_mnist"]) for s in ("train", "validation", "test")
    }
    assert {s: len(p) for s, p in parts.items()} == {"train": 55, "validation": 5, "test": 20}
    whole = sources.fashion_mnist.fashion_mnist("train+validation", **prepared["fashion_mnist"])
    np.testing.assert_array_equal(whole.images, sources.digits.digits("train").images[:60])
