"""DeepLab's Xceptions in checkpoints that TensorFlow wrote: their features and logits, and what is in the way."""

from pathlib import Path

import numpy as np
import pytest

from golden.archives import unpacked
from golden.seeded import structured_images
from xception_flax import create_model
from xception_flax.inference import class_names, preprocessing
from xception_flax.training.sharding import create_mesh
from xception_flax.weights import deeplab, reading
from xception_flax.weights.shapes import shapes_of
from xception_flax.weights.source import open_source

PATH = Path("model.ckpt.index")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return unpacked("deeplab.tar.xz", tmp_path_factory.mktemp("deeplab"))


@pytest.fixture
def arrays(folder):
    """Of a classification network."""
    contents = reading.read(folder / "xception_71" / "model.ckpt.index", "tensorflow")
    return {name: array for name, (array,) in contents.entries}


@pytest.mark.parametrize("name", ["xception_41", "xception_65", "xception_71"])
def test_logits_are_those_of_deeplab(folder, name):
    """The largest difference is 1e-4 of their spread over the images, in float32; measured: 5e-5."""
    found = open_source(str(folder / name), create_mesh())
    ours = name.replace("_", "")
    classes = 0 if name == "xception_41" else 7
    width = {"xception_71": 0.048}.get(name, 0.02)  # the shortest number that makes 0.047's channels
    assert found.model == {"name": ours, "num_classes": classes, "width": width}
    assert found.framework == "deeplab"
    assert found.origin["scope"] == f"{name}/"
    images = structured_images(3, 64, 75)
    endpoints = create_model(**found.model).apply(found.variables, images, train=False, method="endpoints")
    with np.load(folder / name / "golden.npz") as golden:
        assert set(golden) == ({"pooled", "logits"} if classes else {"pooled"})
        for key, expected in golden.items():
            spread = np.ptp(expected, axis=0).max()
            assert spread > 0.1 * np.abs(expected).max()
            np.testing.assert_allclose(endpoints[key], expected, rtol=0, atol=1e-4 * spread)


def test_segmentation_is_the_backbone_by_its_averages(folder):
    """The file has the averages that the golden features are of, and weights of half their size."""
    found = open_source(str(folder / "xception_41" / "model.ckpt"), create_mesh())
    assert found.origin["weights"] == "ExponentialMovingAverage"
    assert [part.partition(":")[0] for part in found.left_out] == [
        *("aspp0", "concat_projection", "decoder", "image_pooling", "logits")
    ]
    assert found.left_out[-1] == "logits: logits/semantic/biases, logits/semantic/weights"


def test_slots_of_an_optimizer_are_no_weights(folder):
    contents = reading.read(folder / "xception_65" / "model.ckpt.index", "tensorflow")
    names = {name for name, _ in contents.entries}
    content = (folder / "xception_65" / "model.ckpt.index").read_bytes()
    assert b"/Momentum" in content
    assert {name for name in names if name.endswith("/Momentum")} == set()  # not even read
    assert "global_step" not in names
    assert open_source(str(folder / "xception_65" / "model.ckpt.index"), create_mesh()).left_out == ()


def test_what_images_and_classes_are(arrays):
    found = deeplab.recognize(arrays, PATH)
    prepared, assumed = preprocessing.of_pretrained(found)
    assert (prepared.mean, prepared.std) == ((127.5,), (127.5,))
    # timm's of its conversions, xception71.tf_in1k and the others: 299 px, crop_pct 0.903, bicubic.
    assert prepared.transforms == "resize_center_crop(resize_size=331, kernel=bicubic, antialias=True)"
    assert len(assumed) == 2
    sixty_five = found._replace(model={"name": "xception65"})
    assert preprocessing.of_pretrained(sixty_five)[0].transforms == prepared.transforms
    names = class_names.of(1001)
    assert (len(names), names[:2], names[-1]) == (1001, ("background", "tench"), "toilet tissue")


@pytest.mark.parametrize("name", ["xception41", "xception65", "xception71"])
def test_every_array_has_a_name_of_its_own(name):
    template = shapes_of({"name": name, "num_classes": 1001}, 3)
    names = deeplab.deeplab_names(template, name)
    assert len(set(names.values())) == len(names)
    last = {"xception41": 14, "xception65": 22, "xception71": 24}[name]
    scope = "exit_flow/block2/unit_1/xception_module/separable_conv3_pointwise"
    assert names["params", f"block{last}_sepconv3_pointwise", "kernel"] == f"{scope}/weights"
    assert names["batch_stats", f"block{last}_sepconv3_pointwise_bn", "var"] == f"{scope}/BatchNorm/moving_variance"
    assert names["params", "predictions", "bias"] == "logits/biases"


def test_of_each_weight_its_average_is_taken_if_it_has_one(arrays):
    """As TensorFlow's `ExponentialMovingAverage.variables_to_restore` maps names; `origin` says which they are."""
    assert "weights" not in deeplab.recognize(arrays, PATH).origin
    name, other = (f"xception_71/entry_flow/conv1_{i}/weights" for i in (1, 2))
    found = deeplab.recognize(arrays | {f"{name}/ExponentialMovingAverage": arrays[name] + 1}, PATH)
    kernels = [found.variables["params"][f"block1_conv{i}"]["kernel"] for i in (1, 2)]
    np.testing.assert_array_equal(kernels[0], arrays[name] + 1)
    np.testing.assert_array_equal(kernels[1], arrays[other])
    said = f"ExponentialMovingAverage of 1 of {len(arrays)} arrays: entry_flow/conv1_1/weights"
    assert found.origin["weights"] == said
    assert found.left_out == ()
    momentum = f"{name}/Momentum"
    more = {f"{momentum}/ExponentialMovingAverage": arrays[name], momentum: arrays[name]}
    assert "weights" not in deeplab.recognize(arrays | more, PATH).origin


def test_scopes_are_seen_through(arrays):
    found = deeplab.recognize({f"tower/{name}": array for name, array in arrays.items()}, PATH)
    assert found.origin == {"architecture": "xception_71", "scope": "tower/xception_71/"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: {}, "has no network that is known here; expected the arrays of DeepLab's .* it has no arrays"),
        (
            lambda arrays: {"layer-0/kernel/.ATTRIBUTES/VARIABLE_VALUE": np.ones(1)},
            "is a checkpoint of Keras in TensorFlow's format; load it into the model with Keras",
        ),
        (
            lambda arrays: arrays | {f"other/{name}": array for name, array in arrays.items()},
            r"has 2 networks, in the scopes xception_71/, other/xception_71/; expected one",
        ),
        (
            lambda arrays: {name: array for name, array in arrays.items() if "entry_flow/block4" not in name},
            r"it has 4 blocks in its entry flow and 16 in its middle flow; there are 3 and 8 in xception41",
        ),
        (
            lambda arrays: {name: a for name, a in arrays.items() if "unit_7/" not in name or "gamma" not in name},
            r"by its names it is xception71 of DeepLab; it has no 'middle_flow/block1/unit_7/.*gamma', params/block13_",
        ),
        (
            lambda arrays: arrays | {"xception_71/squeeze/weights": np.ones(1)},
            "xception71 of DeepLab; our network has no place for squeeze/weights",
        ),
        (
            lambda arrays: arrays | {"xception_71/logits/weights": np.ones((1, 1, 3, 7))},
            r"'logits/weights', params/predictions/kernel here, must have shape \(96, 7\), got \(3, 7\)",
        ),
        (
            lambda arrays: arrays | {"xception_71/x/separable_conv1/pointwise_weights": np.ones(1)},
            r"regularize_depthwise=True",
        ),
    ],
)  # fmt: skip
def test_other_networks_are_named(arrays, change, message):
    with pytest.raises(ValueError, match=rf"^{PATH}.*{message}"):
        deeplab.recognize(change(arrays), PATH)
