"""Weights to begin with: files that Keras itself writes, timm's formats, workdirs; a whole run from them; mistakes."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import cv2
import h5py
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from keras.src.legacy.saving import legacy_h5_format

import train
from golden.seeded import structured_images
from tests.weights.test_keras import keras_apply, narrow_keras_model
from tests.weights.test_writing import random_network
from xception_flax import create_model
from xception_flax.recipes import reading
from xception_flax.runs.restore import restore
from xception_flax.runs.workdir import read_recipe
from xception_flax.text.errors import UserError
from xception_flax.training import sharding, state
from xception_flax.weights import fetching, initial, timm, writing
from xception_flax.weights import keras as keras_weights

CLASSES = tuple("abcd")
CLASSIFIER = (("params", "predictions", "bias"), ("params", "predictions", "kernel"))
FINETUNE = str(Path(__file__).parents[2] / "configs" / "finetune_folder.py")


@pytest.fixture(autouse=True, scope="module")
def keras_promotes_ranks() -> Iterator[None]:
    """As Keras' own layers do; ours are held to the strict rule by all other tests."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def model():
    return create_model("xception", num_classes=4, width=0.02, bn_frozen=True)


@pytest.fixture(scope="module")
def keras_model(model) -> keras.Model:
    """Keras' Xception, narrow, with random weights and statistics, and ten classes."""
    keras_model = narrow_keras_model("xception", model.clone(num_classes=10), 71, 71)
    rng = np.random.default_rng(0)
    for layer in keras_model.layers:
        norm = isinstance(layer, keras.layers.BatchNormalization)
        arrays = [rng.uniform(0.8, 1.2, w.shape) if norm else rng.normal(0, 0.3, w.shape) for w in layer.get_weights()]
        layer.set_weights(arrays)
    return keras_model


def write_as_published(keras_model: keras.Model, path: Path) -> Path:
    """As Keras 1 and 2 wrote, which the published files are from: Keras 3 has the format, but no name for it."""
    with h5py.File(path, "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, keras_model)
    return path


def without_names(path: Path) -> None:
    """Makes a file of today's Keras one of 3.3.3 or 3.5.0, which have been seen to write the same but for the names."""
    with h5py.File(path, "r+") as file:
        groups = []
        file.visititems(lambda place, item: groups.append(item) if place.endswith("/vars") else None)
        for group in groups:
            del group.attrs["name"]


@pytest.fixture(scope="module")
def keras_file(keras_model, tmp_path_factory) -> Path:
    return write_as_published(keras_model, tmp_path_factory.mktemp("keras") / "narrow.h5")


def load(weights, model, mesh, **options):
    given = dict(image_shape=(71, 71, 3), class_names=CLASSES[: model.num_classes], mean=(127.5,), std=(127.5,))
    init = {"weights": str(weights), "checkpoint": options.pop("checkpoint", "latest")}
    return initial.load(**init, model=model, mesh=mesh, **given | options)


def shapes_of(model) -> dict:
    images = jax.ShapeDtypeStruct((1, 71, 71, 3), jnp.float32)
    return dict(jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images))


def random_variables(model) -> dict:
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype), shapes_of(model))


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for place, value in expected.items():
        np.testing.assert_array_equal(found[place], value, err_msg="/".join(place))


# Formats -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["published", "weights of Keras 3", "weights of Keras 3.5", "model as HDF5"])
def test_every_file_of_keras_is_read(model, keras_model, one_device, tmp_path, layout):
    """Each array, bit for bit, as `get_weights()` has it; a classifier only where it is for as many classes."""
    path = tmp_path / ("w.weights.h5" if layout.startswith("weights") else "w.h5")
    if layout == "published":
        write_as_published(keras_model, path)
    else:
        (keras_model.save_weights if layout.startswith("weights") else keras_model.save)(path)
    if layout == "weights of Keras 3.5":
        without_names(path)
    layers = [(layer.name, layer.get_weights()) for layer in keras_model.layers]
    ten = model.clone(num_classes=10)
    expected = flatten_dict(keras_weights.from_keras(layers, shapes_of(ten)))

    found = load(path, ten, one_device, class_names=tuple("0123456789"))
    assert_equal(found.arrays, expected)
    assert found.random == ()
    assert found.origin == {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}

    found = load(path, model, one_device)
    assert_equal(found.arrays, {place: value for place, value in expected.items() if place not in CLASSIFIER})
    assert set(found.random) == set(CLASSIFIER)
    assert found.meta()["arrays"] == len(expected) - 2


def test_keras_own_file_without_classifier(one_device, tmp_path):
    """The whole network of Keras Applications, `include_top=False`: 20,861,480 parameters (Keras' documentation)."""
    keras_model = keras.applications.Xception(weights=None, include_top=False)
    path = write_as_published(keras_model, tmp_path / "notop.h5")
    found = load(path, create_model("xception", num_classes=4), one_device)
    counted = {place[0]: 0 for place in found.arrays}
    for place, value in found.arrays.items():
        counted[place[0]] += value.size
    assert counted["params"] + counted["batch_stats"] == keras_model.count_params() == 20_861_480
    assert set(found.random) == set(CLASSIFIER)


@pytest.mark.parametrize(("network", "name"), [("legacy_xception", "w.safetensors"), ("xception41", "w.npz")])
def test_timms_formats(one_device, tmp_path, network, name):
    legacy = dict(name="xception", padding="SYMMETRIC", bn_epsilon=1e-5)
    fields = dict(width=0.02, num_classes=10) | (legacy if network == "legacy_xception" else dict(name=network))
    model = create_model(**fields)
    variables = random_variables(model)
    arrays = timm.to_timm(variables) | {"bn1.num_batches_tracked": np.zeros((), np.int64)}
    if name.endswith("npz"):
        np.savez(tmp_path / name, **arrays)
    else:
        contiguous = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
        safetensors.numpy.save_file(contiguous, tmp_path / name)
    assert_equal(load(tmp_path / name, model, one_device, class_names=range(10)).arrays, flatten_dict(variables))
    found = load(tmp_path / name, model.clone(num_classes=4), one_device)
    assert set(found.random) == set(CLASSIFIER)
    if network == "legacy_xception":  # the same shapes, and another network
        wrong = r"set --config\.model\.bn_epsilon=1e-05 --config\.model\.padding=SYMMETRIC$"
        with pytest.raises(UserError, match=wrong):
            load(tmp_path / name, model.clone(padding="SAME", bn_epsilon=1e-3), one_device)


def test_arrays_go_where_the_state_has_them(monkeypatch, model, keras_file):
    monkeypatch.setattr(sharding, "MIN_SHARDED_ELEMENTS", 64)
    mesh = sharding.create_mesh(data=2, fsdp=4)
    shapes = flatten_dict(state.abstract_variables(model, (71, 71, 3), mesh))
    found = load(keras_file, model, mesh)
    assert all(value.sharding == shapes[place].sharding for place, value in found.arrays.items())
    shares = [v for v in found.arrays.values() if v.addressable_shards[0].data.size * 4 == v.size]
    assert len(shares) > 30


# A run ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Four classes of eight structured images, by classes alone."""
    root = tmp_path_factory.mktemp("photos")
    for i, image in enumerate(structured_images(32, 80, 80)):
        path = root / CLASSES[i % 4] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(cv2.imencode(".png", np.uint8((image + 1) * 127.5))[1].tobytes())
    return root


@pytest.fixture(scope="module")
def run(keras_file, photos, tmp_path_factory) -> tuple[Path, Path]:
    """The workdir of two steps of fine-tuning, the backbone frozen, and the file that they began with."""
    workdir, file = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("file") / "narrow.h5"
    shutil.copy(keras_file, file)
    overrides = {
        "init.weights": file,
        "optimizer.backbone_factor": 0,
        "model.width": 0.02,
        "data.image_size": 71,
        "data.val_fraction": 0.3,
        "batch_size": 8,
        "epochs": 0.7,
        "checkpoint_every_epochs": 0.35,
        "schedule.warmup_epochs": 0,
        "mesh.fsdp": 2,
    }
    arguments = [f"--config.{key}={value}" for key, value in overrides.items()]
    config = reading.load(f"{FINETUNE}:{photos}", arguments)
    assert train.train(config, workdir) == 0
    return workdir, file


def test_a_run_begins_with_the_weights_of_keras(run, keras_model, one_device):
    """A frozen backbone is saved as it began: each array, to rounding in the averages, and what it makes of images."""
    workdir, _ = run
    layers = [(layer.name, layer.get_weights()) for layer in keras_model.layers if layer.name != "predictions"]
    found = {weights: restore(workdir, one_device, "latest", weights) for weights in ("raw", "ema")}
    variables = flatten_dict(found["raw"].variables)
    backbone = found["raw"].model.clone(num_classes=0)
    expected = flatten_dict(keras_weights.from_keras(layers, shapes_of(backbone)))
    assert_equal({place: value for place, value in variables.items() if place not in CLASSIFIER}, expected)
    for place, value in flatten_dict(found["ema"].variables).items():
        if place not in CLASSIFIER:
            np.testing.assert_allclose(value, expected[place], rtol=1e-6)
    assert np.ptp(variables["params", "predictions", "kernel"]) > 0
    assert (found["raw"].step, found["raw"].class_names) == (2, CLASSES)

    images = structured_images(4, 71, 71)
    features = keras.Model(keras_model.inputs, keras_model.get_layer("avg_pool").output)
    theirs = np.asarray(keras_apply(features, [v.value for v in features.trainable_variables], images, False)[0])
    kept = {"params": dict(found["raw"].variables["params"]), "batch_stats": found["raw"].variables["batch_stats"]}
    bias, kernel = (kept["params"]["predictions"][name] for name in ("bias", "kernel"))
    logits = jax.jit(lambda v, x: found["raw"].model.apply(v, x, train=False))(kept, images)
    spread = np.ptp(theirs @ kernel, axis=0).max()
    assert spread > 0.05 * np.abs(theirs @ kernel).max()
    assert np.abs(logits - (theirs @ kernel + bias)).max() < 1e-4 * spread


def test_it_goes_on_without_the_file(run, tmp_path, capsys):
    """A checkpoint knows what the run began with; the file is read once."""
    workdir, file = run
    shutil.copytree(workdir, tmp_path / "w")
    shutil.rmtree(tmp_path / "w" / "checkpoints" / "2")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    moved = file.rename(file.with_name("moved"))
    try:
        assert train.train(read_recipe(workdir), tmp_path / "w") == 0
    finally:
        moved.rename(file)
    assert "going on from the checkpoint of step 1" in capsys.readouterr().err
    for folder in (workdir, tmp_path / "w"):
        meta = json.loads((folder / "checkpoints" / "2" / "meta" / "metadata").read_text())
        assert meta["init"] == {
            "file": str(file),
            "sha256": digest,
            "arrays": 234,
            "random": ["params/predictions/bias", "params/predictions/kernel"],
        }


def test_a_run_is_weights_to_begin_with(run, model, one_device):
    """Its classifier too, where the classes are the same ones: four others are others."""
    workdir, _ = run
    mine = flatten_dict(restore(workdir, one_device, "best").variables)
    found = load(workdir, model, one_device)
    assert_equal(found.arrays, mine)
    assert found.origin == {"workdir": str(workdir), "step": 2, "weights": "ema"}
    found = load(workdir, model, one_device, class_names=tuple("abce"))
    assert set(found.random) == set(CLASSIFIER)
    for options, message in [
        (dict(mean=(0.0,)), r"set --config\.normalize\.mean=\(127\.5,\)$"),
        (
            dict(model=model.clone(bn_epsilon=0.1, residual=False)),
            r"set --config\.model\.bn_epsilon=0\.001 --config\.mo",
        ),
        (
            dict(model=model.clone(width=0.05)),
            r"set --config\.model\.width=0\.02$",
        ),
        (
            dict(model=create_model("lenet", num_classes=4)),
            r"has weights of Xception, and this recipe is of LeNet; set mod",
        ),
        (dict(checkpoint="7"), r"no checkpoint '7' in .*; take latest, best or a step of: 1, 2"),
    ]:
        with pytest.raises(UserError, match=message):
            load(workdir, **dict(model=model, mesh=one_device) | options)


# What they expect of images -------------------------------------------------------------------------


def test_the_normalization_of_ones_own_file_is_the_recipes(model, keras_file, one_device, monkeypatch):
    """Keras' guides train on [0, 1] too: nothing in the file says it. Of a published file it is known."""
    digest = hashlib.sha256(keras_file.read_bytes()).hexdigest()
    for options, images in [
        (dict(mean=(0.0,), std=(255.0,)), "(x - 0) / 255"),
        (dict(mean=(123.675, 116.28, 103.53), std=(58.4,) * 3), "(x - (123.675, 116.28, 103.53)) / 58.4"),
    ]:
        found = load(keras_file, model, one_device, **options)
        assert str(found) == (
            f"initial weights: 234 arrays of file {keras_file}, sha256 {digest}; taken to be for images as {images}; "
            "left random: params/predictions/bias, params/predictions/kernel"
        )
        assert found.origin == {"file": str(keras_file), "sha256": digest}
    published = (("", hashlib.md5(keras_file.read_bytes()).hexdigest()),)
    monkeypatch.setitem(fetching.KERAS_FILES, "xception", published)
    with pytest.raises(
        UserError, match=r"set --config\.normalize\.mean=\(127\.5,\) --config\.normalize\.std=\(127\.5,\)$"
    ):
        load(keras_file, model, one_device, mean=(0.0,), std=(255.0,))
    assert "taken to be" not in str(load(keras_file, model, one_device))


# Mistakes ------------------------------------------------------------------------------------------


def test_the_published_weights_are_found_where_keras_keeps_them(model, keras_file, one_device, monkeypatch, tmp_path):
    """`test_fetching.py` fetches them. The true file cannot be had here: the table is told what is there."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    shutil.copy(keras_file, tmp_path / "models" / "notop.h5")
    files = (("full.h5", ""), ("notop.h5", hashlib.md5(keras_file.read_bytes()).hexdigest()))
    monkeypatch.setitem(fetching.KERAS_FILES, "xception", files)
    assert len(load("keras", model, one_device).arrays) == 234
    with pytest.raises(UserError, match=r"init\.weights: unknown network that Keras publishes 'lenet'; there are"):
        load("keras", create_model("lenet", num_classes=4), one_device)


def test_mistakes_are_refused(model, keras_file, one_device, tmp_path):
    (tmp_path / "broken.h5").write_bytes(keras_file.read_bytes()[:5000])
    (tmp_path / "text.h5").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    (tmp_path / "text.npz").write_text("no weights")
    with h5py.File(tmp_path / "empty.h5", "w"):
        pass
    (tmp_path / "tf").mkdir()
    (tmp_path / "tf" / "model.ckpt.index").write_bytes(b"")
    (tmp_path / "unread.ckpt").write_bytes(b"\x80\x02")
    for weights, options, message in [
        ("kears", {}, r"init\.weights: kears is neither a file nor a folder; .*, or keras:NETWORK, timm:NAME, hf"),
        (tmp_path, {}, r"is no workdir of a run: it has no config\.json; it has a file of weights: give .*/"),
        (tmp_path / "broken.h5", {}, r"broken\.h5 cannot be read as weights of Keras: "),
        (tmp_path / "text.h5", {}, r"text\.h5 cannot be read as weights of Keras: .*signature"),
        (tmp_path / "empty.h5", {}, r"empty\.h5 has no layers with weights in it; expected a file of Keras"),
        (tmp_path / "text.safetensors", {}, r"text\.safetensors cannot be read as a safetensors file: "),
        (tmp_path / "text.npz", {}, r"text\.npz cannot be read as an \.npz archive of arrays: "),
        (tmp_path / "unread.ckpt", {}, r"must be \.h5 or \.keras \(Keras\).*; with torch, torch\.save\("),
        (tmp_path / "tf" / "model.ckpt", {}, r"model\.ckpt\.index .*; this is empty; it was never written"),
        ("a" * 5000, {}, r"^init\.weights: 'a+ \.\.\. a+' cannot be opened: File name too long"),
        ("~no one/w.h5", {}, r"^init\.weights: '~no one/w\.h5' cannot be opened: "),
        (keras_file, dict(model=model.clone(padding="SYMMETRIC")), r"set --config\.model\.padding=SAME$"),
        (
            keras_file,
            dict(model=model.clone(width=0.05)),
            r"(?s)narrow\.h5 do not fit the network of this recipe \(model\.\*, data\.channels\):\n.*"
            r"block10_sepconv1_bn/mean: \(16,\) there, \(40,\) in the network of this recipe\n.*\n  and \d+ more$",
        ),
        (keras_file, dict(model=create_model("lenet", num_classes=4)), r"h5 has weights of Xception, and this re"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            load(weights, **dict(model=model, mesh=one_device) | options)


def test_images_of_another_number_of_channels(model, keras_file, one_device):
    """The first kernel alone is changed: its sum for gray images, repeated and scaled for five (timm's rule)."""
    place = ("params", "block1_conv1", "kernel")
    plain = load(keras_file, model, one_device)
    kernel = np.asarray(plain.arrays[place])
    for channels, expected in [
        (1, kernel.sum(axis=2, keepdims=True)),
        (5, kernel[:, :, [0, 1, 2, 0, 1]] * np.float32(3 / 5)),
    ]:
        found = load(keras_file, model, one_device, image_shape=(71, 71, channels))
        np.testing.assert_allclose(found.arrays[place], expected, rtol=1e-6)
        assert_equal(found.arrays, plain.arrays | {place: found.arrays[place]})
        assert f"; its first kernel, for 3 channels, adapted to {channels}; " in str(found)


def test_with_alpha_the_network_is_at_first_what_it_was(model, keras_file, one_device, rng):
    """For RGBA the kernel of alpha is 0: the same logits within 1e-5 of their spread, and alpha changes no bit."""
    found = {c: load(keras_file, model.clone(num_classes=10), one_device, image_shape=(71, 71, c)) for c in (3, 4)}
    place = ("params", "block1_conv1", "kernel")
    kernel = np.asarray(found[4].arrays[place])
    np.testing.assert_array_equal(kernel[:, :, :3], found[3].arrays[place])
    assert not kernel[:, :, 3].any()
    assert_equal(found[4].arrays, found[3].arrays | {place: found[4].arrays[place]})
    assert "; its first kernel, for 3 channels, extended to 4 by zeros for alpha; " in str(found[4])

    images = rng.uniform(-1, 1, (2, 71, 71, 4)).astype(np.float32)
    apply = jax.jit(lambda arrays, x: model.clone(num_classes=10).apply(unflatten_dict(arrays), x, train=False))
    expected, logits = apply(found[3].arrays, images[..., :3]), apply(found[4].arrays, images)
    assert np.abs(logits - expected).max() <= 1e-5 * np.ptp(expected)
    np.testing.assert_array_equal(apply(found[4].arrays, images * np.float32([1, 1, 1, -0.5])), logits)


def test_the_normalization_of_alpha_is_the_recipes(tmp_path, one_device):
    """Of the colours it must be what the weights are for, (0, 1, 2) and 58.4 of 0 to 255."""
    gray = dict(mean=(0.0, 1.0, 2.0), std=(58.4,))
    network = random_network(name="xception", num_classes=4, width=0.02)._replace(normalize=gray)
    writing.write(network, tmp_path / "w.npz")
    options = dict(model=create_model(**network.model), mesh=one_device, image_shape=(71, 71, 4))
    load(tmp_path / "w.npz", **options, mean=(0.0, 1.0, 2.0, 127.5), std=(58.4, 58.4, 58.4, 127.5))
    with pytest.raises(UserError, match=r"set --config\.normalize\.mean=\(0\.0, 1\.0, 2\.0, 9\.0\)$"):
        load(tmp_path / "w.npz", **options, mean=(0.0, 1.0, 3.0, 9.0), std=(58.4, 58.4, 58.4, 1.0))
    with pytest.raises(UserError, match=r"set --config\.normalize\.std=\(58\.4, 58\.4, 58\.4, 1\.0\)$"):
        load(tmp_path / "w.npz", **options, mean=(0.0, 1.0, 2.0, 9.0), std=(1.0,))


def test_a_folder_that_is_no_workdir_is_named(model, one_device, tmp_path):
    rewrite = "load it into the model with Keras, and write model.save_weights('model.weights.h5')"
    run = tmp_path / "run"
    for file in (
        "saved/saved_model.pb",
        "orbax/_METADATA",
        "hub/model.safetensors",
        "run/config.json",
    ):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
    (run / "checkpoints" / "236" / "raw").mkdir(parents=True)
    for folder, message in {
        "": "",
        "saved": f"; this is a SavedModel of TensorFlow: {rewrite}",
        "orbax": "; this is a checkpoint of Orbax, and not of such a run",
        "hub": f"; it has a file of weights: give {tmp_path}/hub/model.safetensors",
        "run/checkpoints": f": this is within one; give {run}",
        "run/checkpoints/236": f": this is within one; give {run} and 236 as its checkpoint",
        "run/checkpoints/236/raw": f": this is within one; give {run} and 236 as its checkpoint",
    }.items():
        expected = f"init.weights: {tmp_path / folder} is no workdir of a run: it has no config.json{message}."
        with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
            load(tmp_path / folder, model, one_device)


@pytest.mark.parametrize(("value", "fields"), [(np.nan, {}), (1e39, {}), (7e4, {"param_dtype": "float16"})])
def test_weights_that_are_not_finite_are_refused(one_device, tmp_path, value, fields):
    """The array is named; what counts is the network's own type, in which 1e39 or 70,000 may be no number."""
    model = create_model("xception", num_classes=4, width=0.02, padding="SYMMETRIC", bn_epsilon=1e-5, **fields)
    variables = random_variables(model)
    place = ("params", "block2_sepconv1", "depthwise", "kernel")
    arrays, name = timm.to_timm(variables), "block1.rep.0.conv1.weight"
    arrays[name] = arrays[name].astype(np.float64)
    arrays[name].flat[5] = value
    np.savez(tmp_path / "w.npz", **arrays)
    dtype = fields.get("param_dtype", "float32")
    message = rf"^{tmp_path}/w\.npz: values of {'/'.join(place)} are not finite \(in {dtype}\); take another file"
    with pytest.raises(UserError, match=message):
        load(tmp_path / "w.npz", model, one_device)


def test_a_mistake_writes_nothing(photos, tmp_path):
    small = ["--config.batch_size=8", "--config.model.middle_repeats=0", "--config.data.image_size=71"]
    config = reading.load(f"{FINETUNE}:{photos}", [f"--config.init.weights={tmp_path / 'no.h5'}", *small])
    with pytest.raises(UserError, match=r"no\.h5 is neither a file nor a folder"):
        train.train(config, tmp_path / "w")
    assert not (tmp_path / "w").exists()
