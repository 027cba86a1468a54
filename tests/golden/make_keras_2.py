"""Writes keras_2.json.xz: what Keras 2 says of a model that was built on Xception, and the shapes of its arrays.

    TF_CPP_MIN_LOG_LEVEL=3 python3.11 tests/golden/make_keras_2.py  # with tensorflow-cpu==2.15.1, `numpy<2`, and h5py

The one that is there is of Keras 2.15.0. The layers are in the order of the file of `model.save('x.h5')`, those of the
model within at its place.
"""

import json
import lzma
import tempfile
from pathlib import Path

import h5py
import keras

WIDTH = 0.02


def backbone() -> keras.Model:
    config = keras.applications.Xception(weights=None, include_top=False, input_shape=(71, 71, 3)).get_config()
    for layer in config["layers"]:
        if "filters" in layer["config"]:
            layer["config"]["filters"] = max(8, 8 * round(layer["config"]["filters"] * WIDTH / 8))
    return keras.Model.from_config(config)


def main() -> None:
    layers = keras.layers
    images = keras.Input((71, 71, 3))
    x = keras.Sequential([layers.RandomFlip(), layers.RandomRotation(0.1)], name="augmentation")(images)
    x = keras.applications.xception.preprocess_input(x)
    network = backbone()
    network.trainable = False
    x = layers.GlobalAveragePooling2D()(network(x, training=False))
    x = layers.Dropout(0.25)(layers.Dense(7, activation="relu")(x))
    model = keras.Model(images, layers.Dense(4, activation="softmax")(x))
    with tempfile.NamedTemporaryFile(suffix=".h5") as file:
        model.save(file.name)
        with h5py.File(file.name) as saved:
            config = json.loads(saved.attrs["model_config"])
            shapes: dict[str, list[tuple[int, ...]]] = {}
            for name in saved["model_weights"].attrs["layer_names"]:
                group = saved["model_weights"][name]
                for weight in group.attrs["weight_names"]:
                    shapes.setdefault(weight.split("/")[-2], []).append(group[weight].shape)
    golden = {"keras_version": keras.__version__, "config": config, "shapes": list(shapes.items())}
    Path(__file__).with_name("keras_2.json.xz").write_bytes(lzma.compress(json.dumps(golden).encode()))


if __name__ == "__main__":
    main()
