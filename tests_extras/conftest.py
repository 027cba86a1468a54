"""A CPU, and float32 as it is: what the files of other runtimes are compared with."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

from pathlib import Path

import numpy as np
import pytest

import shell
from tests.weights.test_verifying import random_network
from xception_flax.commands import export
from xception_flax.inference import predictor
from xception_flax.weights import writing


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    """Three images of 71 px, which `network` takes."""
    return np.random.default_rng(0).integers(0, 256, (3, 71, 71, 3), np.uint8)


@pytest.fixture
def network(tmp_path):
    """Writes a small network, four classes, images of 71 px or more, and returns its path."""

    def write(image_size: int = 71, num_classes: int = 4, activation: str = "softmax", **fields: object) -> Path:
        made = random_network(framework="xception_flax", image_size=image_size, num_classes=num_classes, **fields)
        names = tuple(f"class {i}" for i in range(num_classes))
        normalize = {"mean": (127.5,), "std": (127.5,)}
        said = dict(transforms="resize", activation=activation, class_names=names, normalize=normalize)
        writing.write(made._replace(**said), tmp_path / "network.npz")
        return tmp_path / "network.npz"

    return write


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `xception-flax export` in this process: returns its code, output and errors."""
    return lambda *arguments: shell.call(monkeypatch, capsys, export.main, *arguments)


@pytest.fixture
def expected():
    """What the network itself gives."""
    return lambda path, images, name: predictor.load(str(path)).run(images, (name,))[name]
