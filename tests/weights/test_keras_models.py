"""Networks found in whole models and in weights of Keras, which Keras itself writes here, on its JAX backend."""

import json
import lzma
from collections.abc import Iterator
from pathlib import Path

import jax
import keras
import numpy as np
import pytest
from keras import layers

from golden.seeded import structured_images
from tests.weights.test_initial import without_names, write_as_published
from tests.weights.test_keras import MAX_DIFFERENCE, MIN_SPREAD, copy_to_keras, narrow_keras_model, random_variables
from xception_flax import create_model
from xception_flax.text.errors import UserError
from xception_flax.weights import keras_graph, keras_models, reading
from xception_flax.weights.pretrained import Pretrained
from xception_flax.weights.reader.room import Contents

SIZE = 75  # pixels a side
GOLDEN = Path(__file__).parents[1] / "golden" / "keras_2.json.xz"
LAST = {"xception": "block14_sepconv2_act", "inception_v3": "mixed10"}  # the last features
WIDTHS = {"xception": 0.02, "inception_v3": 0.05}


@pytest.fixture(autouse=True, scope="module")
def keras_promotes_ranks() -> Iterator[None]:
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Of 0 to 255."""
    return 127.5 + 127.5 * structured_images(4, SIZE, SIZE)


def make_backbone(name: str, images: np.ndarray) -> keras.Model:
    """Keras' network without top, narrow, with random weights and statistics of these images."""
    model = create_model(name, num_classes=10, width=WIDTHS[name])
    keras_model = narrow_keras_model(name, model, SIZE, SIZE)
    copy_to_keras(random_variables(model, images / 127.5 - 1), keras_model)
    return keras.Model(keras_model.input, keras_model.get_layer(LAST[name]).output, name="xyz")


@pytest.fixture(scope="module")
def backbone(images) -> keras.Model:
    return make_backbone("xception", images)


@pytest.fixture(scope="module")
def inception_v3(images) -> keras.Model:
    return make_backbone("inception_v3", images)


def seeded(model: keras.Model) -> keras.Model:
    """Gives the layers beside the model `xyz` weights that spread."""
    rng = np.random.default_rng(5)
    for layer in model.layers:
        if isinstance(layer, layers.Dense):
            layer.set_weights([rng.normal(0, 0.2, w.shape) for w in layer.get_weights()])
        elif isinstance(layer, layers.BatchNormalization) and not layer.name.startswith("block"):
            layer.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in layer.get_weights()])
    return model


def nested(backbone: keras.Model) -> keras.Model:
    x = image = keras.Input((SIZE, SIZE, 3))
    x = keras.Sequential([layers.RandomFlip(), layers.RandomRotation(0.1)])(x)
    x = backbone(layers.Rescaling(1 / 127.5, offset=-1)(x), training=False)
    x = layers.Dense(7, activation="relu")(layers.GlobalAveragePooling2D()(x))
    return keras.Model(image, layers.Dense(4)(layers.Dropout(0.2)(x)))


def flat(backbone: keras.Model) -> keras.Model:
    x = layers.Dropout(0.3)(layers.GlobalAveragePooling2D()(backbone.output))
    return keras.Model(backbone.input, layers.Dense(4, activation="softmax")(x))


def sequential(backbone: keras.Model) -> keras.Model:
    """With all that is multiply-add: it becomes part of the normalization, and of the Dense beside it."""
    return keras.Sequential(
        [
            keras.Input((None, None, 3)),
            layers.Resizing(SIZE, SIZE),
            layers.Normalization(mean=[120.0, 125.0, 130.0], variance=[60.0**2, 65.0**2, 70.0**2]),
            backbone,
            layers.GlobalAveragePooling2D(),
            layers.BatchNormalization(),
            layers.Dense(6, use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Dense(5, activation="relu"),
            layers.Dense(1),
            layers.Activation("sigmoid"),
        ]
    )


BATCH_NORMALIZATION = "BatchNormalization of the head, which is made part of the Dense beside it: the same logits"
RESCALED = {"mean": (127.5,), "std": (127.5,)}
NORMALIZED = {"mean": (120.0, 125.0, 130.0), "std": (60.0, 65.0, 70.0)}
# What is read: number of classes, hidden layers, dropout, normalization, activation, and what is left out.
MODELS = {
    nested: (4, (7,), 0.2, RESCALED, "softmax", ()),
    flat: (4, (), 0.3, None, "softmax", ()),
    sequential: (1, (6, 5), 0.0, NORMALIZED, "sigmoid", (BATCH_NORMALIZATION,) * 2),
}


def read(path: Path) -> Pretrained:
    return keras_models.recognize(reading.read(path, reading.recognize(path)), path)


def apply(found: Pretrained, images: np.ndarray) -> np.ndarray:
    model = create_model(**found.model)
    return np.asarray(jax.jit(lambda v, x: model.apply(v, x, train=False))(found.variables, images))


def assert_near(ours: np.ndarray, theirs: np.ndarray) -> None:
    spread = np.ptp(theirs, axis=0).max()
    assert spread >= MIN_SPREAD * np.abs(theirs).max()
    assert np.abs(ours - theirs).max() <= MAX_DIFFERENCE * spread


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_a_whole_model_gives_the_logits_of_its_file(backbone, images, tmp_path, build):
    model = seeded(build(backbone))
    num_classes, fc_layers, dropout_rate, normalize, activation, left_out = MODELS[build]
    taken = images if normalize else (images / 127.5 - 1).astype(np.float32)
    theirs = np.asarray(model(taken, training=False))
    model.save(tmp_path / "model.keras")
    model.save(tmp_path / "model.h5")
    for name in ("model.keras", "model.h5"):
        found = read(tmp_path / name)
        fields = dict(name="xception", width=0.02, padding="SAME", bn_epsilon=1e-3)
        fields |= dict(num_classes=num_classes, fc_layers=fc_layers, dropout_rate=dropout_rate)
        assert found.model == fields
        assert (found.normalize, found.activation, found.left_out) == (normalize, activation, left_out)
        assert (found.framework, found.image_size, found.class_names) == ("keras", SIZE, ())
        if normalize:
            taken = ((images - np.array(normalize["mean"])) / np.array(normalize["std"])).astype(np.float32)
        ours = apply(found, taken)
        functions = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}
        is_activated = build is not nested
        assert_near(np.asarray(functions[activation](ours)) if is_activated else ours, theirs)


def arrays_of(found: Pretrained) -> dict[str, np.ndarray]:
    """Of the backbone."""
    places = jax.tree_util.tree_leaves_with_path(found.variables)
    names = {jax.tree_util.keystr(path): leaf for path, leaf in places}
    return {name: leaf for name, leaf in names.items() if "fc" not in name and "predictions" not in name}


def assert_same(one: Pretrained, other: Pretrained) -> None:
    ours, theirs = arrays_of(one), arrays_of(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


@pytest.mark.parametrize("name", ["xception", "inception_v3"])
@pytest.mark.parametrize("build", [nested, flat], ids=lambda build: build.__name__)
def test_weights_alone_have_the_same_network(request, tmp_path, name, build):
    """With names, in their order without names (Keras 2.13 to 3.5 wrote that, the same as today), and of Keras 2."""
    model = seeded(build(request.getfixturevalue("backbone" if name == "xception" else name)))
    expected = keras_models.recognize(contents_of(model), Path("file"))
    features = arrays_of(expected)
    assert len(features) == {"xception": 234, "inception_v3": 376}[name]
    model.save_weights(tmp_path / "names.weights.h5")
    model.save_weights(tmp_path / "places.weights.h5")
    without_names(tmp_path / "places.weights.h5")
    write_as_published(model, tmp_path / "old.h5")
    # One Dense in the network's own model can only be its classifier where layers have no names.
    classifier = {(flat, "places.weights.h5"): 4}
    for file in ("names.weights.h5", "places.weights.h5", "old.h5"):
        found = read(tmp_path / file)
        assert_same(found, expected)
        assert found.model["num_classes"] == classifier.get((build, file), 0)
        assert (found.normalize, found.image_size) == (None, None)
        dense = [layer for layer in model.layers if isinstance(layer, layers.Dense)]
        left_out = ", ".join(found.left_out)
        shapes = [f"({' x '.join(map(str, layer.kernel.shape))})" for layer in dense]
        assert [shape in left_out for shape in shapes] == [not found.model["num_classes"]] * len(dense)


def test_the_published_classifier_is_found_in_weights_alone(tmp_path):
    model = create_model("xception", num_classes=10, width=0.02)
    keras_model = narrow_keras_model("xception", model, 71, 71)
    found = read(write_as_published(keras_model, tmp_path / "top.h5"))
    assert (found.model["num_classes"], found.left_out) == (10, ())
    kernel, bias = keras_model.get_layer("predictions").get_weights()
    np.testing.assert_array_equal(found.variables["params"]["predictions"]["kernel"], kernel)
    np.testing.assert_array_equal(found.variables["params"]["predictions"]["bias"], bias)


def test_what_keras_2_writes_is_read():
    """Calls as lists, operators as TFOpLambda; a frozen model within."""
    golden = json.loads(lzma.decompress(GOLDEN.read_bytes()))
    rng = np.random.default_rng(0)
    entries = [(name, [rng.normal(size=shape) for shape in shapes]) for name, shapes in golden["shapes"]]
    metadata = {"keras_version": golden["keras_version"]}
    found = keras_models.recognize(Contents(entries, {"config": golden["config"], "metadata": metadata}), Path("file"))
    assert found.model["num_classes"] == 4
    assert (found.model["fc_layers"], found.model["dropout_rate"]) == ((7,), 0.25)
    assert (found.normalize, found.image_size, found.left_out) == (RESCALED, 71, ())
    arrays = dict(entries)
    params = found.variables["params"]
    for block in range(5, 13):
        pointwise = arrays[f"block{block}_sepconv2"][1]
        np.testing.assert_array_equal(params[f"block{block}_sepconv2"]["pointwise"]["kernel"], pointwise)
    for ours, theirs in zip(("block2", "block3", "block4", "block13"), ("", "_1", "_2", "_3"), strict=True):
        np.testing.assert_array_equal(params[f"{ours}_residual"]["kernel"], arrays[f"conv2d{theirs}"][0])


# Models that are not saved -------------------------------------------------------------------------


def contents_of(model: keras.Model) -> Contents:
    """What a file of the model has in it."""

    def entries(model: keras.Model) -> list:
        found = []
        for layer in model.layers:
            found += entries(layer) if isinstance(layer, keras.Model) else [(layer.name, layer.get_weights())]
        return found

    config = {"config": json.loads(model.to_json()), "metadata": {"keras_version": keras.__version__}}
    named = [(name, [array for array in arrays if array.dtype.kind == "f"]) for name, arrays in entries(model)]
    return Contents(named, config)


def recognize(model: keras.Model, **changes: object) -> Pretrained:
    return keras_models.recognize(contents_of(model)._replace(**changes), Path("file"))


HEADS = {
    "max": ([layers.GlobalMaxPooling2D(), layers.Dense(3)], "head: GlobalMaxPooling2D, Dense(3)"),
    "gelu": (
        [layers.GlobalAveragePooling2D(), layers.Dense(5, "gelu"), layers.Dropout(0.1), layers.Dense(3)],
        "head: Dense(5, gelu), Dense(3)",
    ),
    "flatten": ([layers.Flatten(), layers.Dense(3)], "head: Dense(3)"),
    "linear": ([layers.GlobalAveragePooling2D(), layers.Dense(5), layers.Dense(3)], "head: Dense(5), Dense(3)"),
    "relu": ([layers.GlobalAveragePooling2D(), layers.Dense(3, "relu")], "head: Dense(3, relu)"),
    "norm": (
        [layers.GlobalAveragePooling2D(), layers.LayerNormalization(), layers.Dense(3)],
        "head: LayerNormalization, Dense(3)",
    ),
    "leaky": (
        [layers.GlobalAveragePooling2D(), layers.Dense(3), layers.ReLU(negative_slope=0.1), layers.Dense(3)],
        "head: Dense(3), ReLU, Dense(3)",
    ),
    "conv": (
        [layers.Conv2D(4, 1, activation="relu"), layers.GlobalAveragePooling2D(), layers.Dense(3)],
        "head: Conv2D(4, relu), Dense(3)",
    ),
}


@pytest.mark.parametrize("head", HEADS)
def test_a_head_that_cannot_be_said_is_named(backbone, head):
    parts, expected = HEADS[head]
    found = recognize(keras.Sequential([keras.Input((SIZE, SIZE, 3)), backbone, *parts]))
    assert found.model["num_classes"] == 0
    assert found.left_out == (expected,)


def test_features_alone_leave_nothing_out(backbone):
    for model in (backbone, keras.Sequential([backbone, layers.GlobalAveragePooling2D()])):
        found = recognize(model)
        assert (found.model["num_classes"], found.left_out, found.image_size) == (0, (), SIZE)


UNSAID = "; so the normalization is unsaid"
BEFORE = {
    "0 to 1": (lambda x: layers.Rescaling(1 / 255)(x), {"mean": (0.0,), "std": (255.0,)}, ""),
    "composed": (lambda x: (x / 255.0 - 0.5) * 2, RESCALED, ""),
    "preprocess_input": (lambda x: keras.applications.xception.preprocess_input(x), RESCALED, ""),
    "ImageNet": (
        lambda x: layers.Normalization(mean=[0.485, 0.456, 0.406], variance=[0.25, 0.25, 0.16])(x / 255.0),
        {"mean": (123.675, 116.28, 103.53), "std": (127.5, 127.5, 102.0)},
        "",
    ),
    "another dtype": (lambda x: keras.ops.cast(x, "float32") / 127.5 - 1, RESCALED, ""),
    "nothing": (lambda x: layers.GaussianNoise(0.1)(x), None, ""),
    "Lambda": (
        lambda x: layers.Lambda(keras.applications.xception.preprocess_input)(x),
        None,
        f"before the network: Lambda, which is not read{UNSAID}",
    ),
    "a tensor": (lambda x: x * x, None, f"before the network: Multiply, which is not read{UNSAID}"),
    "inverted": (
        lambda x: 1 - x / 127.5,
        None,
        f"before the network: TrueDivide, Subtract, which inverts the images{UNSAID}",
    ),
    "scaled before": (
        lambda x: layers.Rescaling(2.0, -1)(x),
        None,
        "before the network: Rescaling(2.0, -1), which takes images that are scaled already, not of 0 to 255" + UNSAID,
    ),
    "an image of three": (
        lambda x: layers.Concatenate()([x[..., 1:], x[..., :1]]),
        None,
        "before the network: Concatenate, which is not read" + UNSAID,
    ),
}


@pytest.mark.parametrize("before", BEFORE)
def test_what_is_before_the_network_is_its_normalization(backbone, before):
    function, normalize, left_out = BEFORE[before]
    image = keras.Input((SIZE, SIZE, 3))
    found = recognize(keras.Model(image, backbone(function(image))))
    assert found.normalize == normalize
    assert found.left_out[:1] == ((left_out,) if left_out else ())


def test_sizes_come_from_the_layer_nearest_to_the_network(backbone):
    def of(*parts: layers.Layer) -> Pretrained:
        return recognize(keras.Sequential([keras.Input((99, 99, 3)), *parts, network]))

    config = backbone.get_config()
    config["layers"][0]["config"]["batch_shape"] = (None, None, None, 3)
    network = keras.Model.from_config(config)
    assert of().image_size == 99
    assert of(layers.Resizing(80, 80)).image_size == 80
    assert of(layers.CenterCrop(81, 81)).left_out == ("before the network: CenterCrop",)
    found = of(layers.Resizing(80, 90))
    assert (found.image_size, found.left_out) == ((80, 90), ())


def test_other_outputs_are_named(backbone):
    x = layers.GlobalAveragePooling2D()(backbone.output)
    found = recognize(keras.Model(backbone.input, [layers.Dense(3)(x), layers.Dense(2, "tanh")(x)]))
    assert found.model["num_classes"] == 0
    assert found.left_out == ("beside the network: GlobalAveragePooling2D, Dense(3), Dense(2, tanh)",)


def test_another_network_is_refused_by_its_first_difference(backbone):
    for layer, options, expected in (
        ("block5_sepconv1_act", {"activation": "elu"}, r"then: Activation has activation 'elu'; expected 'relu'\.$"),
        ("block4_sepconv1", {"dilation_rate": [2, 2]}, r"block4_sepconv1 has dilation_rate \[2, 2\]; expected 1\.$"),
        ("block2_pool", {"pool_size": [2, 2]}, r"MaxPooling2D has pool_size \[2, 2\]; expected 3\.$"),
        ("block9_sepconv2_bn", {"epsilon": 1e-5}, r"^file: epsilon is 0\.001 and 1e-05 in its batch normalizations"),
    ):
        contents = contents_of(backbone)
        parts = contents.config["config"]["config"]["layers"]
        next(part for part in parts if part["name"] == layer)["config"].update(options)
        with pytest.raises(UserError, match=expected):
            keras_models.recognize(contents, Path("file"))


def test_a_part_of_a_network_is_refused(backbone):
    part = keras.Model(backbone.input, backbone.get_layer("block13_sepconv2_act").output)
    with pytest.raises(
        UserError, match=r"^file: the model has no whole Xception or Inception V3 .* 31 SeparableConv2D"
    ):
        recognize(part)
    with pytest.raises(UserError, match=r"it has nothing for block13_sepconv2, .*block14_sepconv2_bn of xception"):
        recognize(part, config={})


def test_two_networks_are_refused(backbone, tmp_path):
    image = keras.Input((SIZE, SIZE, 3))
    other = keras.Model.from_config(backbone.get_config())
    other.name = "other"
    model = keras.Model(image, layers.Add()([backbone(image), other(image)]))
    with pytest.raises(UserError, match=r"^file: it has several networks, xception, xception; expected one\.$"):
        recognize(model)
    with pytest.raises(UserError, match=r"it has several networks"):
        recognize(model, config={})
    model.save_weights(tmp_path / "two.weights.h5")
    without_names(tmp_path / "two.weights.h5")
    with pytest.raises(UserError, match=r"it has several networks"):
        read(tmp_path / "two.weights.h5")


def test_a_network_that_is_called_twice_is_one(backbone):
    image = keras.Input((SIZE, SIZE, 3))
    model = keras.Model(image, layers.Add()([backbone(image), backbone(1 - image)]))
    found = recognize(model)
    assert found.model["num_classes"] == 0
    assert found.left_out[-1].startswith("beside the network: ")


def test_arrays_that_do_not_fit_are_listed_ten_at_most(backbone):
    entries = contents_of(backbone).entries
    cut = [(name, [array[..., :5] for array in arrays] if "_bn" in name else arrays) for name, arrays in entries]
    with pytest.raises(UserError, match=r"must have shape .*, got \(5,\)") as caught:
        recognize(backbone, entries=cut)
    lines = str(caught.value).splitlines()
    assert len(lines) == 10
    assert lines[-1] == "and 135 more such differences."
    without = [(name, arrays) for name, arrays in entries if name != "block9_sepconv1"]
    with pytest.raises(UserError, match=r"no Keras layer for params/block9_sepconv1/depthwise/kernel"):
        recognize(backbone, entries=without)
    found = recognize(backbone, entries=[*entries, ("more", [np.zeros(3)])])
    assert found.left_out == ("arrays of more, which the configuration does not have",)


def test_a_foreign_file_is_refused():
    def of(*names: str, config: object = None) -> None:
        keras_models.recognize(Contents([(n, [np.zeros(3)]) for n in names], {"config": config}), Path("file"))

    with pytest.raises(UserError, match=r"^file has no layers with weights in it"):
        of()
    with pytest.raises(
        UserError, match=r"^file: it has not the layers of Keras' Xception or Inception V3; it has a, b\.$"
    ):
        of("a", "b")
    with pytest.raises(UserError, match=r"^file: it has not the layers .*; it has /layers/dense\.$"):
        of("/layers/dense")
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    with pytest.raises(UserError, match=r"^file: the model has no whole Xception .* 0 SeparableConv2D"):
        recognize(model)


LAYER = {"class_name": "Dense", "config": {"name": "d"}, "name": "d"}
LOOP = {
    "layers": [LAYER | {"inbound_nodes": [{"args": [["d", 0, 0]]}]}],
    "input_layers": [],
    "output_layers": [["d", 0, 0]],
}
BROKEN = {
    "no class": {"layers": [{"config": {}}]},
    "no layers": {"layers": []},
    "no object": {"layers": [{"class_name": "Dense", "config": 3}]},
    "a loop": LOOP,
    "no such layer": LOOP | {"output_layers": [["e", 0, 0]]},
}


@pytest.mark.parametrize("config", BROKEN)
def test_a_broken_configuration_is_refused(config):
    contents = Contents([("d", [np.zeros(3)])], {"config": {"class_name": "Functional", "config": BROKEN[config]}})
    with pytest.raises(UserError, match=r"^file: its configuration is not as Keras writes it: "):
        keras_models.recognize(contents, Path("file"))


def test_a_configuration_that_grows_is_refused():
    """Models in models, each of which calls the next ten times."""
    part = LAYER
    for i in range(8):
        call = {"args": []}
        inner = {
            "class_name": "Functional",
            "config": {"layers": [part | {"inbound_nodes": [call] * 10}]},
            "name": f"m{i}",
        }
        inner["config"] |= {"input_layers": [], "output_layers": [[part["name"], 0, 0]]}
        part = inner
    with pytest.raises(ValueError, match=r"more than 10,000 calls of layers"):
        keras_graph.read(part)


def test_layers_of_one_name_are_told_apart_by_their_place(backbone, tmp_path):
    head = keras.Sequential([layers.Dense(5, "relu", name="same"), layers.Dense(5, "relu", name="b")], name="head")
    x = layers.GlobalAveragePooling2D()(backbone.output)
    model = seeded(keras.Model(backbone.input, layers.Dense(5, name="same")(head(x))))
    model.save(tmp_path / "model.keras")
    found = read(tmp_path / "model.keras")
    params = found.variables["params"]
    assert found.model["fc_layers"] == (5, 5)
    for ours, layer in (("fc1", head.layers[0]), ("fc2", head.layers[1]), ("predictions", model.layers[-1])):
        np.testing.assert_array_equal(params[ours]["kernel"], layer.get_weights()[0])
