"""A small data set on the disk for each source."""

import gzip
import struct

import cv2
import numpy as np
import pytest

from datasets import prepare_tfds
from xception_flax.data import sources


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> dict[str, dict]:
    """For each source, a small data set on disk and the keywords that `data.load` needs for it."""
    root = tmp_path_factory.mktemp("data")
    digits = sources.digits.digits("train")
    images, labels = digits.images, digits.labels

    (root / "idx").mkdir()
    for prefix, part in (("train", slice(0, 60)), ("t10k", slice(60, 80))):
        x, y = images[part], labels[part].astype(np.uint8)
        x_header, y_header = struct.pack(">HBB3I", 0, 8, 3, *x.shape), struct.pack(">HBBI", 0, 8, 1, len(y))
        (root / "idx" / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(x_header + x.tobytes()))
        (root / "idx" / f"{prefix}-labels-idx1-ubyte").write_bytes(y_header + y.tobytes())  # plain is read too

    for split, part in (("train", slice(0, 40)), ("test", slice(40, 60))):
        for i, (image, label) in enumerate(zip(images[part], labels[part], strict=True)):
            path = root / "folder" / split / str(label) / f"{i:03}.{('png', 'jpg', 'PNG')[i % 3]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(cv2.imencode(".jpg" if i % 3 == 1 else ".png", image)[1].tobytes())
            (path.parent / "notes.txt").write_text("no image")
    images_there = [path for path in (root / "folder").rglob("*.*") if path.suffix.lower() in (".png", ".jpg")]
    rows = [f"{path.relative_to(root)},{path.parent.name},{path.parts[-3]}" for path in images_there]
    (root / "labels.csv").write_text("\n".join(["image,label,split", *rows]) + "\n")

    np.savez(
        root / "arrays.npz",
        train_images=images[:40],
        train_labels=labels[:40],
        test_images=images[40:60],
        test_labels=labels[40:60],
        class_names=list("0123456789"),
    )
    return {
        "digits": {},
        "fashion_mnist": {"data_dir": str(root / "idx")},
        "folder": {"data_dir": str(root / "folder")},
        "table": {"path": str(root / "labels.csv")},
        "arrays": {"path": str(root / "arrays.npz")},
        "tfds": {"data_dir": prepare_tfds(root / "tfds", images[:60], labels[:60], "array_record")},
    }
