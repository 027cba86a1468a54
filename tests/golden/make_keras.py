"""Writes keras_files.tar.xz: small files of Keras in each of its formats, for the tests of the reader.

    KERAS_BACKEND=jax .venv/bin/python tests/golden/make_keras.py

The one that is there is of Keras 3.15.1 on JAX. Every array has the values of `values`, as in `make_torch.py`, in its
type.
"""

import tarfile
import tempfile
from pathlib import Path

import keras
import numpy as np


def values(*shape: int) -> np.ndarray:
    n = int(np.prod(shape))
    return ((np.arange(n) - n // 2) / 8).reshape(shape)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float16", "bfloat16", "float32"):
            model = keras.Sequential(
                [
                    keras.Input((4, 4, 3)),
                    keras.layers.Conv2D(2, 2, name="conv", dtype=dtype),
                    keras.layers.BatchNormalization(name="bn", dtype=dtype),
                ],
                name="network",
            )
            if dtype == "float32":
                model.compile("adam", "mse")  # whose state is in the files of whole models
                model.train_on_batch(np.zeros((2, 4, 4, 3)), np.zeros((2, 3, 3, 2)))
            model.set_weights([values(*weight.shape) for weight in model.get_weights()])
            model.save(f"{folder}/{dtype}.keras")
            model.save(f"{folder}/{dtype}.h5")
            model.save_weights(f"{folder}/{dtype}.weights.h5")
        model.save_weights(f"{folder}/parts.weights.json", max_shard_size=1)
        with tarfile.open(Path(__file__).with_name("keras_files.tar.xz"), "w:xz") as archive:
            for path in sorted(Path(folder).iterdir()):
                member = tarfile.TarInfo(path.name)
                member.size = path.stat().st_size
                with path.open("rb") as file:
                    archive.addfile(member, file)


if __name__ == "__main__":
    main()
