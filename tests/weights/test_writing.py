"""Weights that leave: every format is read back bit for bit, and by Keras itself to the same logits."""

import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import flax.linen as nn
import h5py
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import safetensors
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from golden.seeded import structured_images
from xception_flax import MODELS, create_model, ops
from xception_flax.models.layers import Conv, classifier_head
from xception_flax.text.errors import UserError
from xception_flax.weights import description, initial, keras_models, reading, source, timm_config, writing
from xception_flax.weights.description import DESCRIPTION
from xception_flax.weights.pretrained import Pretrained
from xception_flax.weights.reader.room import MAX_CONFIG
from xception_flax.weights.shapes import shapes_of

NARROW = dict(name="xception", num_classes=4, width=0.02)
FULL = dict(name="xception", num_classes=3, fc_layers=(8,), dropout_rate=0.2)
LEGACY = dict(name="xception", num_classes=3, padding="SYMMETRIC", bn_epsilon=1e-5)


@pytest.fixture(autouse=True, scope="module")
def keras_promotes_ranks() -> Iterator[None]:
    with jax.numpy_rank_promotion("allow"):
        yield


def random_network(channels: int = 3, **model: object) -> Pretrained:
    """A network whose layers keep the signal alive, and whose arrays are all different."""
    rng, values = np.random.default_rng(0), {}
    for place, leaf in flatten_dict(shapes_of(model, channels)).items():
        if place[-1] == "kernel":
            values[place] = rng.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape)
        else:
            low, high = (0.8, 1.2) if place[-1] in ("scale", "var") else (-0.1, 0.1)
            values[place] = rng.uniform(low, high, leaf.shape)
    variables = unflatten_dict({place: value.astype(np.float32) for place, value in values.items()})
    return Pretrained(
        "xception_flax",
        dict(model),
        variables,
        channels,
        tuple(f"class {i}" for i in range(model["num_classes"])),
        71,
        "center_crop(fraction=0.9, kernel=bicubic)",
        {"mean": (0.0,), "std": (255.0,)},
        "sigmoid",
        measured={
            "top1": 0.9,
            "loss": 0.25,
            "count": 180,
            "source": "folder",
            "split": "val",
            "step": 157,
            "date": "x",
        },
    )


def described(network: Pretrained) -> Pretrained:
    """The same network, whose classes are in words too, of images of 12 bits."""
    words = tuple(f"what {name} is" for name in network.class_names)
    return network._replace(class_descriptions=words, min_decoded_side=80, max_value=4095, orientation="apply")


def assert_same_arrays(found: Pretrained, expected: Pretrained) -> None:
    found, expected = flatten_dict(found.variables), flatten_dict(expected.variables)
    assert found.keys() == expected.keys()
    for place, value in expected.items():
        np.testing.assert_array_equal(found[place], value, err_msg="/".join(place))


@pytest.fixture(scope="module")
def full() -> Pretrained:
    return described(random_network(**FULL))


@pytest.mark.parametrize("name", ["w.safetensors", "w.npz", "folder"])
@pytest.mark.parametrize(
    "model", [NARROW, dict(NARROW, name="inception_v3"), dict(NARROW, name="xception41p"), dict(NARROW, name="lenet")]
)
def test_our_own_files_are_the_same_network(tmp_path, name, model):
    """Every array, and every word that is said about them."""
    model = {k: v for k, v in model.items() if (model["name"], k) != ("lenet", "width")}
    network = described(random_network(channels=3 if model["name"] != "lenet" else 1, **model))
    output = tmp_path / name
    assert writing.write(network, output).path == output
    found = source.open_source(str(output), None)
    assert_same_arrays(found, network)
    assert found._replace(variables=None, origin={}) == network._replace(variables=None, origin={})
    assert found.origin.keys() == {"file", "sha256"}
    assert [path.name for path in tmp_path.iterdir()] == [name]


class Own(nn.Module):
    """A network of a fork, with names of its own: 'conv1' is not its first layer."""

    num_classes: int = 1000
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = Conv(8, name="patches")(images)
        x = ops.global_average_pool(nn.relu(Conv(4, name="conv1")(x)))
        return classifier_head(x, self.num_classes, train=train)


@pytest.mark.parametrize("name", ["w.safetensors", "w.npz", "folder"])
def test_a_network_with_other_names_is_written(tmp_path, monkeypatch, one_device, name):
    """It is read again whole, and a run on images of another number of channels begins with it."""
    monkeypatch.setitem(MODELS, "own", Own)
    network = random_network(channels=1, name="own", num_classes=2)
    writing.write(network, tmp_path / name)
    found = source.open_source(str(tmp_path / name), None)
    assert_same_arrays(found, network)
    assert found.channels == 1

    given = dict(model=Own(2), mesh=one_device, class_names=network.class_names, mean=(0.0,), std=(255.0,))
    begun = initial.load(str(tmp_path / name), "latest", **given, image_shape=(71, 71, 3))
    assert "; its first kernel, for 1 channels, adapted to 3; " in f"{begun}; "
    for place, value in flatten_dict(network.variables).items():
        expected = np.tile(value / 3, (1, 1, 3, 1)) if place[1:] == ("patches", "kernel") else value
        np.testing.assert_allclose(begun.arrays[place], expected, rtol=1e-6)


def test_of_a_network_that_timm_has_not_the_names_are_ours(tmp_path):
    notes = writing.write(random_network(**NARROW), tmp_path / "narrow.safetensors").notes
    assert notes == ("timm has no xception of these widths and depths; the names are ours",)
    notes = writing.write(random_network(1, name="lenet", num_classes=2), tmp_path / "lenet.safetensors").notes
    assert notes == ("timm has no lenet; the names are ours",)


@pytest.mark.parametrize(("suffix", "model"), [("safetensors", FULL), ("safetensors", LEGACY)])
def test_timms_names(tmp_path, suffix, model):
    """A network that timm has is written by timm's names; what timm would compute otherwise is said."""
    network = random_network(**model)
    written = writing.write(network, tmp_path / f"w.{suffix}")
    with safetensors.safe_open(tmp_path / f"w.{suffix}", "numpy") as file:
        names = set(file.keys())
        kernel = file.get_tensor("block12.rep.4.pointwise.weight")
    expected = network.variables["params"]["block13_sepconv2"]["pointwise"]["kernel"]
    np.testing.assert_array_equal(kernel, expected.transpose(3, 2, 0, 1))
    if model is LEGACY:
        assert written.notes == ()
        assert {"fc.weight", "fc.bias"} < names
    else:
        assert written.notes == (
            "timm computes this network with padding SYMMETRIC in place of SAME, bn_epsilon 1e-05 in place of 0.001: "
            "its logits differ from ours",
            "timm has no hidden layers before a classifier; their arrays are there by our names",
        )
        assert {"params/fc1/kernel", "params/predictions/bias"} < names
    assert_same_arrays(source.read_file(tmp_path / f"w.{suffix}"), network)


def test_the_hubs_folder_is_timms(tmp_path):
    """The keys that timm 1.0 reads of config.json (`load_model_config_from_hf`), with their values."""
    network = described(random_network(**LEGACY))
    writing.write(network, tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    cfg = config["pretrained_cfg"]
    assert (config["architecture"], config["num_classes"], config["label_names"]) == (
        "legacy_xception",
        3,
        ["class 0", "class 1", "class 2"],
    )
    assert (cfg["input_size"], cfg["mean"], cfg["std"]) == ([3, 71, 71], [0.0] * 3, [1.0] * 3)
    assert (cfg["crop_pct"], cfg["crop_mode"], cfg["interpolation"]) == (0.9, "center", "bicubic")
    assert (cfg["classifier"], cfg["first_conv"]) == ("fc", "conv1")
    card = (tmp_path / "folder" / "README.md").read_text()
    assert card.startswith('---\ntags: ["image-classification", "timm", "xception"]\nlibrary_name: "timm"\n---\n')
    assert "| values, of 0 to 255 | (x - 0) / 255 |" in card
    assert "| white, of 16 bits | 4095 |" in card
    assert config["label_descriptions"]["class 1"] == "what class 1 is"
    words = "top1 90.00 %, loss 0.25, on 180 images, of folder, split 'val', by the run itself at step 157, x"
    assert f"| accuracy | {words} |" in card
    writing.write(network._replace(measured={}), tmp_path / "other")
    assert "| accuracy | not measured |" in (tmp_path / "other" / "README.md").read_text()


def test_a_size_that_is_not_square_goes_to_timm_and_comes_back(tmp_path):
    """`input_size` is [C, H, W]. timm covers floor(64 / (64 / 72)) x floor(96 / (64 / 72)) = 72 x 108 pixels."""
    crop = "resize_center_crop(resize_size=(72, 108), kernel=bicubic, antialias=True)"
    network = described(random_network(**LEGACY))._replace(image_size=(64, 96), transforms=crop)
    writing.write(network, tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    cfg = config["pretrained_cfg"]
    assert (cfg["input_size"], cfg["crop_mode"]) == ([3, 64, 96], "center")
    assert (math.floor(64 / cfg["crop_pct"]), math.floor(96 / cfg["crop_pct"])) == (72, 108)
    assert config[DESCRIPTION]["image_size"] == [64, 96]
    assert "| image | 64 x 96 pixels |" in (tmp_path / "folder" / "README.md").read_text()
    found = source.open_source(str(tmp_path / "folder"), None)
    assert (found.image_size, found.transforms) == ((64, 96), crop)
    use = timm_config.read({key: value for key, value in config.items() if key != DESCRIPTION}, 3, 3)
    assert (use.image_size, use.transforms.replace('"', "")) == ((64, 96), crop)


def test_the_card_names_the_file_and_no_folder(tmp_path):
    """Whatever the names are, the card is a table of UTF-8; where the file was is of nobody's business."""
    network = random_network(**NARROW)._replace(
        class_names=("a|b", "c\nd", "é", "e"), transforms="resize | center_crop"
    )
    file = tmp_path / os.fsdecode(b"caf\xe9|.npz")
    writing.write(network, file)
    writing.write(source.open_source(str(file), None), tmp_path / "folder")
    content = (tmp_path / "folder" / "README.md").read_bytes()
    rows = content.decode("utf-8").splitlines()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert rf"| weights from | file caf\xe9\|.npz, sha256 {digest} |" in rows
    assert r"| logits | 4: a\|b, c\nd, é, e |" in rows
    assert r"| resizing | `resize \| center_crop` |" in rows
    assert os.fsencode(tmp_path) not in content
    assert os.fsencode(tmp_path) not in (tmp_path / "folder" / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": [' + "{}," * (MAX_CONFIG // 3) + "{}]}", r"it has more than 2,097,152 bytes; expected less\."),
        ('{"a":' * 101 + "1" + "}" * 101, r"it has more than 100 levels; expected less\."),
        ("[1]", r"it is a list; expected an object of JSON\."),
        ("{", r"it is no JSON: Expecting property name"),
    ],
)
def test_a_hub_folders_configuration_is_read_to_a_limit(tmp_path, text, message):
    writing.write(random_network(**NARROW), tmp_path / "folder")
    (tmp_path / "folder" / "config.json").write_text(text)
    with pytest.raises(UserError, match=rf"folder/config\.json cannot be read: {message}"):
        source.open_source(str(tmp_path / "folder"), None)


@pytest.mark.parametrize("name", ["m.keras", "m.weights.h5"])
def test_keras_computes_the_same(tmp_path, full, name):
    """Keras loads what was written; its logits are ours within 1e-5 of their spread (float32)."""
    written = writing.write(full, tmp_path / name)
    ending = f"the model ends in a {full.activation}, so that it gives probabilities, not logits"
    assert written.notes == ((ending,) if name.endswith(".keras") else ())
    if name.endswith(".keras"):
        model = keras.models.load_model(tmp_path / name)
    else:
        model = keras.applications.Xception(weights=None, include_top=False, pooling="avg", input_shape=(71, 71, 3))
        x = keras.layers.Dense(8, activation="relu", name="fc1")(model.output)
        x = keras.layers.Dense(3, activation="sigmoid", name="predictions")(keras.layers.Dropout(0.2)(x))
        model = keras.Model(model.input, x)
        model.load_weights(tmp_path / name)
    images = structured_images(4, 71, 71)
    theirs = np.asarray(model(images))
    logits = create_model(**FULL).apply(full.variables, jnp.asarray(images), train=False)
    theirs = np.log(theirs / (1 - theirs))
    assert np.ptp(theirs) > 0.1
    assert np.abs(theirs - logits).max() < 1e-5 * max(np.ptp(theirs), np.abs(theirs).max())
    found = source.read_file(tmp_path / name)  # whole, by our description, of which Keras takes no notice
    assert_same_arrays(found, full)
    assert found._replace(variables=None, origin={}) == full._replace(variables=None, origin={})
    model.save(again := tmp_path / "again.keras")
    found = source.read_file(again)  # Keras' own, without it
    assert_same_arrays(found, full)
    assert (found.activation, found.image_size, found.framework) == ("sigmoid", 71, "keras")
    assert (found.class_names, found.measured) == ((), {})


@pytest.mark.parametrize("name", ["m.keras", "m.weights.h5"])
def test_a_description_beside_the_arrays_of_another_network(tmp_path, full, name):
    """It is compared with the arrays, as in every format. Files of a Keras that wrote no names are read by order."""
    writing.write(full, tmp_path / name)
    form = "keras" if name == "m.keras" else "hdf5"
    contents = reading.read(tmp_path / name, form)
    said = contents.config["xception_flax"]
    assert said == json.loads(json.dumps(description.describe(full)))
    with pytest.raises(UserError, match=r"m\..*predictions/kernel must have shape \(8, 4\), got \(8, 3\)"):
        keras_models.variables_of(contents, FULL | {"num_classes": 4}, 3, tmp_path / name)
    with pytest.raises(UserError, match=r"m\..*our network has no params/fc1/kernel"):
        keras_models.variables_of(contents, FULL | {"fc_layers": ()}, 3, tmp_path / name)
    if form == "hdf5":
        with h5py.File(tmp_path / name, "a") as file:
            file.visititems(lambda _, group: group.attrs.pop("name", None) and None)
        nameless = reading.read(tmp_path / name, form)
        assert {entry[:1] for entry, arrays in nameless.entries if arrays} == {"/"}
        assert_same_arrays(source.read_file(tmp_path / name), full)
        with h5py.File(tmp_path / name, "a") as file:
            file.attrs["xception_flax"] = "[" * 9
        with pytest.raises(
            UserError, match=r"m\.weights\.h5 cannot be read as weights of Keras: xception_flax is no JSON"
        ):
            source.read_file(tmp_path / name)


def test_keras_own_inception_v3(tmp_path):
    network = random_network(name="inception_v3", num_classes=3)
    writing.write(network._replace(image_size=75), tmp_path / "m.keras")
    assert_same_arrays(source.read_file(tmp_path / "m.keras"), network)


def test_keras_smallest_images():
    """By Keras itself: one pixel less is refused."""
    for name, build in (("xception", keras.applications.Xception), ("inception_v3", keras.applications.InceptionV3)):
        side = writing.KERAS_MIN_SIZE[name]
        with pytest.raises(ValueError, match=f"Input size must be at least {side}x{side}"):
            build(weights=None, include_top=False, input_shape=(side + 9, side - 1, 3))


def test_what_does_not_fit_is_refused(tmp_path, full, monkeypatch):
    """Nothing is written, and nothing that is there is touched. What Keras has not is said without Keras."""
    monkeypatch.setitem(sys.modules, "keras", None)
    narrow = random_network(**NARROW)
    (tmp_path / "there.npz").write_bytes(b"mine")
    for network, name, message in [
        (full, "w.onnx", r"'\.onnx' is no format to write; there are: \.keras, \.npz, \.safetensors, \.weights\.h5\."),
        (full, "there.npz", r"there\.npz is there already; nothing was written"),
        (full, "none/w.npz", r"none is no folder; make it, or take another one for w\.npz"),
        (
            full._replace(image_size=64),
            "w.keras",
            r"Keras cannot build xception for images of 64 pixels, only from 71 on; write \.safetensors or \.npz",
        ),
        (full._replace(image_size=(90, 64)), "w.keras", r"Keras cannot build xception for images of 90x64 pixels, "),
        (narrow._replace(image_size=48), "w.keras", r"Keras has xception in one size; this one has other widths or d"),
        (narrow, "w.keras", r"Keras has xception in one size; this one has other widths or depths"),
        (random_network(name="xception41", num_classes=1, width=0.02), "w.keras", r"Keras has no xception41; write "),
    ]:
        with pytest.raises(UserError, match=message):
            writing.write(network, tmp_path / name)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"there.npz": b"mine"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"name": "resnet", "num_classes": 4}}, r"of a network that is not here: unknown model 'resnet'"),
        (
            {"model": dict(NARROW, num_classes=5), "class_names": []},
            r"predictions/bias must have shape \(5,\), got \(4,\)|predictions/kernel must have shape \(40, 5\)",
        ),
        ({"model": None}, r"its description \(xception_flax\) is damaged: TypeError"),
        ({"model": {"name": {}}}, r"its description \(xception_flax\) is damaged: TypeError"),
        ({"framework": [1]}, r"is damaged: framework must be a text, got \[1\]"),
        ({"activation": "tanh"}, r"is damaged: activation must be 'softmax' or 'sigmoid', got 'tanh'"),
        ({"image_size": math.inf}, r"is damaged: image_size must be an integer, \[height, width\] or null, got inf"),
        ({"image_size": 75.9}, r"is damaged: image_size must be an integer, \[height, width\] or null, got 75\.9"),
        ({"image_size": -5}, r"is damaged: image_size must be in \[1, 10,000\], got -5"),
        ({"image_size": 10**9}, r"is damaged: image_size must be in \[1, 10,000\], got 1000000000"),
        ({"channels": 0}, r"is damaged: channels must be in \[1, 4\], got 0"),
        ({"channels": True}, r"is damaged: channels must be an integer, got True"),
        ({"transforms": 1}, r"is damaged: transforms must be a text or null, got 1"),
        ({"normalize": {"mean": [10**400], "std": [1]}}, r"mean of normalize must be at most 3\.4e\+38"),
        ({"normalize": {"mean": [math.nan], "std": [1]}}, r"mean of normalize must be a finite number, got nan"),
        ({"normalize": {"mean": "123", "std": [1]}}, r"is damaged: mean must be a list, got '123'"),
        ({"normalize": {"mean": [1, 2], "std": [1]}}, r"mean of normalize must be a number a channel, or one for all"),
        ({"normalize": {"mean": [1], "std": [0]}}, r"std of normalize must be positive, got 0"),
        ({"normalize": {"mean": [1]}}, r"is damaged: std must be a list, got None"),
        ({"max_value": 254}, r"is damaged: max_value must be in \[255, 65,535\], got 254"),
        ({"min_decoded_side": None}, r"is damaged: min_decoded_side must be an integer, got None"),
        ({"min_decoded_side": -1}, r"is damaged: min_decoded_side must be in \[0, 10,000\], got -1"),
        ({"orientation": "aply"}, r"is damaged: orientation must be 'ignore' or 'apply', got 'aply'"),
        ({"measured": {"top1": "0.9"}}, r"is damaged: top1 in what was measured is '0\.9'; expected a number"),
        ({"measured": {"date": 1}}, r"is damaged: date in what was measured is 1; expected a text"),
        ({"measured": {"top1": math.nan}}, r"is damaged: top1 in what was measured must be a finite number, got nan"),
        ({"measured": {"top1": 1.5}}, r"is damaged: top1 in what was measured must be in \[0, 1\], got 1\.5"),
        ({"measured": {"loss": 10**400}}, r"is damaged: loss in what was measured must be at most 3\.4e\+38"),
        ({"measured": {"step": 1.5}}, r"is damaged: step in what was measured is 1\.5; expected an integer"),
        ({"measured": {"count": -1}}, r"is damaged: count in what was measured must be in \[0, .*got -1"),
        ({"measured": [1]}, r"is damaged: measured must be names and values, got \[1\]"),
        ({"class_names": ["a"]}, r"is damaged: class_names are 1 and class_descriptions 0, of 4 classes"),
        ({"class_names": "abcd"}, r"is damaged: class_names must be a list, got 'abcd'"),
        ({"class_names": ["a", "b", "c", 4]}, r"is damaged: class_names must be texts, got 4"),
        ({"class_names": ["a", "b", "c", "b"]}, r"is damaged: class_names has 'b' twice; expected a name of its own"),
        ({"class_descriptions": ["a"]}, r"is damaged: class_names are 4 and class_descriptions 1, of 4 classes"),
        ({"channels": 1}, r"block1_conv1/kernel must have shape \(3, 3, 1, 8\), got \(3, 3, 3, 8\)"),
    ],
)
def test_a_description_that_was_changed(tmp_path, change, message):
    network = random_network(**NARROW)
    arrays = {"/".join(place): value for place, value in flatten_dict(network.variables).items()}
    with pytest.raises(UserError, match=rf"^w\.npz: .*(?:{message})"):
        description.read(description.describe(network) | change, arrays, Path("w.npz"))
    for wrong in ({"params/more": np.zeros(1)}, None):
        others = dict(list(arrays.items())[1:]) if wrong is None else arrays | wrong
        with pytest.raises(UserError, match=r"has no place for params/more|has no params/|has no batch_stats/"):
            description.read(description.describe(network), others, Path("w.npz"))


def test_descriptions_of_older_files():
    """They lack the keys that came later, whose defaults are what was done then; all others must be there."""
    network = random_network(**NARROW)
    said = description.describe(described(network))
    later = ("class_descriptions", "measured", "min_decoded_side", "max_value", "orientation")
    older = {key: value for key, value in said.items() if key not in later}
    _, found = description.checked(older, Path("w.npz"))
    assert [found[key] for key in later] == [(), {}, 0, None, "ignore"]
    for key in older:
        with pytest.raises(UserError, match=rf"^w\.npz: its description \(xception_flax\) is damaged: .*{key}"):
            description.checked({name: value for name, value in older.items() if name != key}, Path("w.npz"))


def test_a_description_that_is_no_json(tmp_path):
    network = random_network(**NARROW)
    writing.write(network, tmp_path / "w.safetensors")
    content = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(re.sub(rb'"xception_flax":"{', b'"xception_flax":"[', content, count=1))
    with pytest.raises(UserError, match=r"w\.safetensors: its description \(xception_flax\) is no JSON"):
        source.read_file(tmp_path / "w.safetensors")
