"""The contract of every source."""

import contextlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from xception_flax import data
from xception_flax.data import sources

LOAD = dict(image_size=32, channels=1, train_transforms="random_affine(max_shift=0.2) | resize")


def test_the_contract_covers_every_source(prepared):
    assert set(prepared) == set(data.SOURCES)


@pytest.mark.parametrize("name", data.SOURCES)
def test_contract(prepared, name):
    """Sources have random access and classes, and pickle. Batches have their shapes; evaluation has each image once."""
    source = data.SOURCES[name]("train", **prepared[name])
    assert isinstance(source, sources.Source)
    assert len(set(source.class_names)) == len(source.class_names) > 1
    for i in (len(source) - 1, 0):
        example = source[i]
        assert isinstance(example["image"], bytes) or example["image"].dtype == np.uint8
        assert 0 <= int(example["label"]) < len(source.class_names)
        again = pickle.loads(pickle.dumps(source))[i]
        assert int(again["label"]) == int(example["label"])
        assert np.array_equal(again["image"], example["image"])

    train = data.load(source=name, train=True, batch_size=8, **LOAD, **prepared[name])
    assert (train.num_images, train.image_shape) == (len(source), (32, 32, 1))
    with contextlib.closing(train.batches()) as batches:
        batch = next(batches)
    assert (batch["images"].shape, batch["images"].dtype) == ((8, 32, 32, 1), np.uint8)
    assert (batch["labels"].shape, batch["labels"].dtype) == ((8,), np.int32)

    test = data.load(source=name, train=False, batch_size=7, **LOAD, **prepared[name])
    batches = list(test.batches())
    assert len(batches) == test.num_batches == -(-test.num_images // 7)
    assert sum(b["mask"].sum() for b in batches) == test.num_images
    seen = np.concatenate([b["labels"][b["mask"] > 0] for b in batches])
    np.testing.assert_array_equal(seen, [test.source[i]["label"] for i in range(test.num_images)])


def test_tensorflow_is_never_imported(prepared, tmp_path):
    """A process reads every source without importing a fake TensorFlow, which would leave a file."""
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text(
        f"open({str(tmp_path / 'mark')!r}, 'w').close()\nraise ImportError('imported')"
    )
    program = f"""
import importlib, pkgutil
import xception_flax, train
for module in pkgutil.walk_packages(xception_flax.__path__, "xception_flax."):
    importlib.import_module(module.name)
from xception_flax import data
for name, options in {prepared!r}.items():
    split = data.load(source=name, train=False, batch_size=4, image_size=8, channels=1, **options)
    assert next(iter(split.batches()))["images"].shape == (4, 8, 8, 1)
print("read", len(data.SOURCES))
"""
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    run = [sys.executable, "-c", program]
    result = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300)
    assert result.stdout == f"read {len(data.SOURCES)}\n", result.stderr
    assert not (tmp_path / "mark").exists()
