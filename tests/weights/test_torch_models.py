"""What is found in the files of torch: timm's, torchvision's, Cadene's; their names, by seeded arrays."""

from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from golden.seeded import stream
from xception_flax import create_model
from xception_flax.text.errors import UserError
from xception_flax.weights import timm, timm_config
from xception_flax.weights.channels import adapt_channels
from xception_flax.weights.shapes import shapes_of, width_fields
from xception_flax.weights.torch_models import recognize

PATH = Path("weights.pth")
SMALL = {"inception_v3": 0.05}  # width; its blocks differ in more than the others' at 0.1


def state_of(architecture: str, channels: int = 3, **fields) -> tuple[dict, dict]:
    """Our variables of a small network, and the arrays that timm would have for it."""
    model = timm.NETWORKS[architecture] | {"width": SMALL.get(architecture, 0.1), "num_classes": 5} | fields
    rng = stream(architecture)
    variables = jax.tree.map(lambda leaf: rng.rand(*leaf.shape).astype(np.float32), shapes_of(model, channels))
    return variables, timm.to_timm(variables)


def assert_equal(found: dict, expected: dict) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def below(prefix: str, state: dict) -> dict:
    return {f"{prefix}{name}": array for name, array in state.items()}


def without_head(state: dict) -> dict:
    return {name: array for name, array in state.items() if not name.startswith(("fc.", "head."))}


@pytest.mark.parametrize("architecture", timm.NETWORKS)
def test_networks_of_timm(architecture):
    variables, state = state_of(architecture)
    found = recognize(state | {"bn1.num_batches_tracked": np.zeros((), np.int64)}, {"epoch": 3}, PATH)
    assert_equal(found.variables, variables)
    fields = timm.NETWORKS[architecture]
    assert {name: found.model[name] for name in fields} == fields
    assert found.model["num_classes"] == 5
    assert shapes_of(found.model, 3) == jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), variables)
    assert found.framework == "timm"
    assert found.origin == {"architecture": architecture}
    assert found.left_out == ()
    assert (found.normalize, found.image_size, found.transforms, found.class_names) == (None, None, None, ())
    create_model(**found.model)


def test_the_width_of_a_whole_network_is_not_named():
    variables, _ = state_of("legacy_xception", width=1.0)
    assert "width" not in recognize(timm.to_timm(variables), {}, PATH).model


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels(channels):
    variables, state = state_of("legacy_xception", channels)
    found = recognize(state, {}, PATH)
    assert_equal(found.variables, variables)
    assert found.variables["params"]["block1_conv1"]["kernel"].shape == (3, 3, channels, 8)


@pytest.mark.parametrize(
    "prefix",
    ["model.", "module.", "net.", "backbone.", "state_dict.", "model_state.", "state_dict.model.module.backbone."],
)
def test_prefixes_are_seen_through(prefix):
    variables, state = state_of("legacy_xception")
    beside = {"loss.weight": np.ones(3), "optimizer.0": np.ones(2), "optimizer.1": np.ones(2)}
    found = recognize(below(prefix, state) | beside, {}, PATH)
    assert_equal(found.variables, variables)
    assert found.origin == {"architecture": "legacy_xception", "prefix": prefix}
    assert found.left_out == ("loss: loss.weight", "optimizer: optimizer.0, optimizer.1")


@pytest.mark.parametrize(
    ("raw", "average"), [("state_dict.", "state_dict_ema."), ("", "model_ema.module."), ("model.", "ema.model.")]
)
def test_averages_are_taken_rather_than_what_they_are_of(raw, average):
    variables, state = state_of("xception41p")
    others = {name: array + 1 for name, array in state.items()}
    found = recognize(below(raw, others) | below(average, state), {}, PATH)
    assert_equal(found.variables, variables)
    assert found.origin == {"architecture": "xception41p", "prefix": average, "rather_than": [raw]}
    assert found.left_out == ()


def test_of_several_networks_the_whole_one_or_none():
    variables, state = state_of("legacy_xception")
    part = {name: array for name, array in state.items() if "block7" not in name}
    found = recognize(below("student.", part) | below("teacher.", state), {}, PATH)
    assert_equal(found.variables, variables)
    assert found.origin["prefix"] == "teacher."
    assert found.origin["rather_than"] == ["student."]
    with pytest.raises(UserError, match=r"weights.pth has 2 whole networks, below student\., teacher\., and does not"):
        recognize(below("student.", state) | below("teacher.", state), {}, PATH)
    with pytest.raises(UserError, match=r"of 2 networks, the one below 'student\.': by its names it is legacy_xcep"):
        recognize(below("student.", part) | below("teacher.", part), {}, PATH)
    many = {f"{i}.{name}": array for i in range(9) for name, array in state.items()}
    with pytest.raises(UserError, match=r"has 9 networks, below 0\., 1\., .* and 4 more; expected one"):
        recognize(many, {}, PATH)


# Classifiers ---------------------------------------------------------------------------------------


def test_cadene_and_faceforensics():
    """Kernels of the 1x1 convolutions without the two dimensions in the oldest; a dropout before the classifier."""
    variables, state = state_of("legacy_xception", num_classes=2)
    oldest = {name: a[:, :, 0, 0] if name.endswith("pointwise.weight") else a for name, a in state.items()}
    assert oldest["conv3.pointwise.weight"].shape == (152, 104)
    for head in ("last_linear.", "last_linear.1."):
        theirs = {f"model.{name.replace('fc.', head)}": array for name, array in oldest.items()}
        found = recognize(theirs, {}, PATH)
        assert_equal(found.variables, variables)
        assert found.model["num_classes"] == 2
        assert found.left_out == ()


def test_classifiers_that_are_not_ours():
    variables, state = state_of("legacy_xception")
    backbone = without_head(state)
    features = state["fc.weight"].shape[1]
    expected = {"params": variables["params"].copy(), "batch_stats": variables["batch_stats"]}
    del expected["params"]["predictions"]

    hidden = {f"fc.{i}.{leaf}": np.ones(shape) for i in (0, 3) for leaf, shape in (("weight", (4, 4)), ("bias", 4))}
    twice = {f"{head}.weight": state["fc.weight"] for head in ("fc", "last_linear")}
    pooled = {"fc.weight": np.ones((5, 2 * features)), "fc.bias": np.ones(5)}
    for head, words in (
        (hidden, "the classifier, which is not one dense layer: fc.0.weight, fc.0.bias, fc.3.weight, fc.3.bias"),
        (twice, "the classifier, which is not one dense layer: fc.weight, last_linear.weight"),
        (pooled, f"the classifier, of {2 * features} features in place of their {features} means"),
        ({"head.weight": np.ones((5, features))}, "head: head.weight"),
        ({"fc.weight": np.ones(())}, "the classifier, which is not one dense layer: fc.weight"),
        ({}, None),
    ):
        found = recognize(backbone | head, {}, PATH)
        assert_equal(found.variables, expected)
        assert found.model["num_classes"] == 0
        assert found.left_out == ((words,) if words else ())
    found = recognize(state, {"architecture": "legacy_xception", "model_args": {"global_pool": "max"}}, PATH)
    assert found.left_out == ("the classifier, of features pooled by 'max' in place of their mean",)


def test_one_logit_is_for_a_sigmoid_and_no_bias_is_none():
    variables, state = state_of("xception41", num_classes=1)
    assert recognize(state, {}, PATH).activation == "sigmoid"
    del state["head.fc.bias"]
    found = recognize(state, {}, PATH)
    variables["params"]["predictions"]["bias"] = np.zeros(1, np.float32)
    assert_equal(found.variables, variables)


def test_auxiliary_tower():
    """torchvision's file has it; where only the classifier was replaced, as is usual, it has other classes."""
    variables, state = state_of("inception_v3", auxiliary=True)
    found = recognize(state, {}, PATH)
    assert_equal(found.variables, variables)
    assert found.model["auxiliary"] is True
    assert found.left_out == ()
    assert state["AuxLogits.conv1.conv.weight"].shape[2:] == (5, 5)
    state |= {"fc.weight": state["fc.weight"][:2], "fc.bias": state["fc.bias"][:2]}
    found = recognize(state, {}, PATH)
    assert found.model["auxiliary"] is False
    assert found.model["num_classes"] == 2
    (words,) = found.left_out
    assert words.startswith("AuxLogits: AuxLogits.")
    assert words.endswith("and 7 more")


def test_inception_v3_without_scales_has_ones_in_timm():
    variables = jax.tree.map(
        lambda leaf: np.full(leaf.shape, 0.5, np.float32), shapes_of({"name": "inception_v3", "width": 0.05}, 3)
    )
    state = timm.to_timm(variables)
    np.testing.assert_array_equal(state["Mixed_7c.branch3x3dbl_3b.bn.weight"], 1)
    np.testing.assert_array_equal(state["Mixed_7c.branch3x3dbl_3b.bn.bias"], 0.5)
    assert recognize(state, {}, PATH).model["bn_scale"] is True


# What does not fit ---------------------------------------------------------------------------------


def error_of(arrays: dict, config: dict | None = None) -> str:
    with pytest.raises(UserError) as caught:
        recognize(arrays, config or {}, PATH)
    return str(caught.value)


def test_what_differs_is_listed():
    _, state = state_of("xception41")
    missing = {name: array for name, array in state.items() if not name.startswith("blocks.3.")}
    wrong = state | {"blocks.3.stack.conv1.bn_dw.weight": np.ones(3), "blocks.4.stack.conv1.attention": np.ones(3)}
    lines = error_of(wrong).split("\n")
    assert len(lines) == 2
    assert lines[0] == (
        "weights.pth: by its names it is xception41 of timm; 'blocks.3.stack.conv1.bn_dw.weight' of the timm model: "
        "params/block5_sepconv1_depthwise_bn/scale must have shape (72,), got (3,)."
    )
    assert lines[1] == "our network has no place for blocks.4.stack.conv1.attention of the timm model."
    del missing["blocks.2.shortcut.conv.weight"]
    missing["blocks.3.stack.conv1.conv_dw.weight"] = state["blocks.3.stack.conv1.conv_dw.weight"]
    lines = error_of(missing).split("\n")
    assert len(lines) == 10
    assert lines[9] == "There are 21 more such lines."  # of 29 arrays of block 3 and one of block 2


def test_what_is_no_network_of_ours():
    _, state = state_of("xception41")
    assert "it has conv.weight" in error_of({"conv.weight": np.ones((3, 3, 3, 3))})
    assert error_of({}).endswith("behind any prefix; it has no arrays.")
    assert "it has 14 blocks; there are 13 in xception41, 21 in" in error_of(
        state | {"blocks.13.norm.weight": np.ones(1)}
    )
    _, state = state_of("legacy_xception")
    no_kernel = {name: array for name, array in state.items() if name != "conv1.weight"}
    assert "it has no 'conv1.weight' of four dimensions" in error_of(no_kernel)
    for kernel in (np.ones((8, 0, 3, 3)), np.ones(8), np.ones((0, 3, 3, 3))):
        assert "it has no 'conv1.weight' of four dimensions" in error_of(state | {"conv1.weight": kernel})
    assert "bn2.bias is of type int8; expected floating-point" in error_of(state | {"bn2.bias": np.ones(8, np.int8)})
    assert "fc.weight" in recognize(state | {"fc.weight": np.ones((0, 208))}, {}, PATH).left_out[0]


def test_half_precision_stays():
    _, state = state_of("legacy_xception")
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float64):
        found = recognize({name: array.astype(dtype) for name, array in state.items()}, {}, PATH)
        assert {leaf.dtype for leaf in jax.tree.leaves(found.variables)} == {np.dtype(dtype)}


# timm's config.json --------------------------------------------------------------------------------

# As timm 1.0.31 writes it, but for what nothing here needs.
CONFIG = {
    "architecture": "xception65",
    "num_classes": 3,
    "global_pool": "avg",
    "label_names": ["cat", "cow", "dog"],
    "model_args": {"num_classes": 3, "in_chans": 3, "output_stride": 16, "global_pool": "avg", "drop_rate": 0.2},
    "pretrained_cfg": {
        "tag": "ra3_in1k",
        "input_size": [3, 299, 299],
        "interpolation": "bicubic",
        "crop_pct": 0.94,
        "crop_mode": "center",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    },
}


def use_of(channels: int = 3, num_classes: int = 3, **changes) -> timm_config.Use:
    return timm_config.read(CONFIG | {"pretrained_cfg": CONFIG["pretrained_cfg"] | changes}, channels, num_classes)


def test_config_of_the_hub():
    variables, state = state_of("xception65", num_classes=3)
    found = recognize(state, CONFIG, PATH)
    assert_equal(found.variables, variables)
    assert (found.model["output_stride"], found.model["dropout_rate"]) == (16, 0.2)
    assert found.class_names == ("cat", "cow", "dog")
    assert found.image_size == 299
    assert found.normalize == {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}  # ImageNet's
    # timm scales the shorter side to floor(299 / 0.94).
    assert found.transforms == 'resize_center_crop(resize_size=318, kernel="bicubic", antialias=True)'
    assert found.left_out == ()
    older = {"architecture": "xception65", "labels": ["a", "b", "c"], **CONFIG["pretrained_cfg"]}
    use = timm_config.read(older, 3, 3)
    assert (use.class_names, use.normalize, use.transforms) == (("a", "b", "c"), found.normalize, found.transforms)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # legacy_xception's; Cadene says: 333, then 299.
        ({"crop_pct": 0.8975}, 'resize_center_crop(resize_size=333, kernel="bicubic", antialias=True)'),
        (
            {"crop_pct": None, "interpolation": "bilinear", "crop_mode": None},  # timm's default is 0.875
            'resize_center_crop(resize_size=341, kernel="bilinear", antialias=True)',
        ),
        ({"crop_pct": 1.0}, 'resize_center_crop(resize_size=299, kernel="bicubic", antialias=True)'),
        (
            {"crop_mode": "squash"},
            'resize(image_size=318, kernel="bicubic", antialias=True) | '
            'resize_center_crop(resize_size=318, kernel="bicubic", antialias=True)',
        ),
        # timm's ResizeKeepRatio for sizes that are not square: floor(224 / 0.875) = 256, floor(320 / 0.875) = 365.
        (
            {"input_size": [3, 224, 320], "crop_pct": 0.875},
            'resize_center_crop(resize_size=(256, 365), kernel="bicubic", antialias=True)',
        ),
        ({"crop_mode": "squash", "crop_pct": 1.0}, 'resize(image_size=299, kernel="bicubic", antialias=True)'),
    ],
)
def test_transforms_of_timm(changes, expected):
    use = use_of(**changes)
    assert use.transforms == expected
    assert use.left_out == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"crop_mode": "border"}, "how its images are scaled and cropped (crop_pct 0.94, crop_mode 'border', interpol"),
        ({"interpolation": "lanczos"}, "how its images are scaled and cropped (crop_pct 0.94, crop_mode 'center', int"),
        ({"interpolation": ["bicubic"]}, "how its images are scaled"),
        ({"crop_pct": 1.1}, "how its images are scaled"),
        ({"crop_pct": -1}, "how its images are scaled"),
        ({"crop_pct": "a"}, "how its images are scaled"),
        ({"crop_border_pixels": 4}, "how its images are scaled"),
        (
            {"input_size": [299, 320]},
            "its images, whose input_size is [299, 320]; expected [C, H, W]",
        ),
        ({"input_size": [3, 0, 0]}, "its images, whose"),
        ({"input_size": "abc"}, "its images, whose"),
        ({"mean": [0.5, 0.4]}, "its normalization, whose mean is [0.5, 0.4]; expected a number a channel"),
        ({"std": None}, "its normalization, whose std is None"),
        ({"std": [0, 0, 0]}, "its normalization, whose std is [0, 0, 0]"),
        ({"mean": "abc"}, "its normalization, whose mean is 'abc'"),
    ],
)
def test_what_a_config_says_in_vain_is_named(changes, words):
    (left_out,) = use_of(**changes).left_out
    assert left_out.startswith(words)


def test_config_for_other_channels_and_classes():
    assert use_of(channels=1, mean=[0.5] * 3, std=[0.25] * 3).normalize == {"mean": (127.5,), "std": (63.75,)}
    assert use_of(channels=1).left_out[0].startswith("its normalization, whose mean is [0.485, 0.456, 0.406]")
    assert use_of(num_classes=2).left_out == ("its 3 label_names, for 2 classes",)
    numbered = CONFIG | {"label_names": {"1": "cow", "0": "cat"}}
    assert timm_config.read(numbered, 3, 2).class_names == ("cat", "cow")
    assert (
        timm_config.read(CONFIG | {"label_names": {"1": "cow"}}, 3, 1).left_out[0].startswith("its label_names, [None]")
    )
    assert timm_config.read(CONFIG | {"label_names": "cow"}, 3, 3).left_out[0].startswith("its label_names, 'cow'")


def test_descriptions_of_classes():
    """timm has them by name (`label_descriptions`), transformers' `TimmWrapperConfig` in the order of the names."""

    def read(**labels):
        return timm_config.read(CONFIG | labels, 3, 3)

    texts = {"dog": "a dog", "cat": "a cat", "cow": "a cow"}
    for found in (texts, ["a cat", "a cow", "a dog"]):
        assert read(label_descriptions=found).class_names == ("cat", "cow", "dog")
        assert read(label_descriptions=found).class_descriptions == ("a cat", "a cow", "a dog")
    inner = {
        "label_names": None,
        "pretrained_cfg": {"label_names": ["x", "y", "z"], "label_descriptions": ["X", "Y", "Z"]},
    }
    assert read(**inner).class_descriptions == ("X", "Y", "Z")
    for found in ({"dog": "a dog"}, ["a cat"], "cat", [1, 2, 3]):
        use = read(label_descriptions=found)
        assert (use.class_names, use.class_descriptions) == (("cat", "cow", "dog"), ())
        assert use.left_out[0].startswith("its label_descriptions, ")
    use = read(label_names=["crane", "crane", "dog"], label_descriptions=["a", "b", "c"])
    assert (use.class_names, use.class_descriptions) == ((), ())
    assert use.left_out == ("its label_names, two of which are 'crane'",)
    _, state = state_of("xception65", num_classes=3)
    assert recognize(state, CONFIG | {"label_descriptions": texts}, PATH).class_descriptions == (
        "a cat",
        "a cow",
        "a dog",
    )


def test_other_networks_of_timm_are_refused():
    _, state = state_of("legacy_xception")
    config = {"model_args": {"act_layer": "gelu"}}
    assert "timm builds the network of its config.json with act_layer='gelu', which none here has" in error_of(
        state, config
    )
    assert "dropout_rate in model_args of its config.json must be a number" in error_of(
        state, {"model_args": {"drop_rate": "0.1"}}
    )
    assert "model_args of its config.json must be names and values, got [1]" in error_of(state, {"model_args": [1]})
    assert "output_stride must be one of" in error_of(state, {"model_args": {"output_stride": 7}})


# Shapes and channels -------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [0.02, 0.05, 0.1, 0.125, 0.3, 0.5, 0.75, 1.5, 2.0])
def test_width_from_channels(width):
    features = (32, 64, 128, 256, 728, 1024, 1536, 2048)
    for multiple in (8, 1):
        widths = [(f, max(multiple, multiple * round(f * width / multiple))) for f in features]
        found = width_fields(widths, multiples=(8, 1))
        multiple = found.get("width_multiple", 8)
        assert [max(multiple, multiple * round(f * found["width"] / multiple)) for f in features] == [
            w for _, w in widths
        ]
    assert width_fields([(32, 32), (64, 64)]) == {}
    assert width_fields([(32, 32), (64, 128)]) == {}
    assert width_fields([(32, 0)]) == {}


def test_adapt_channels_as_timm():
    """adapt_input_conv of timm 1.0.31 gave these."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 3, 3, 8)).astype(np.float32)
    assert adapt_channels(kernel, 3) is kernel
    one, four, seven = (adapt_channels(kernel, channels) for channels in (1, 4, 7))
    np.testing.assert_allclose(one[:, :, 0], kernel.sum(2), rtol=1e-6)
    np.testing.assert_allclose(four, kernel[:, :, [0, 1, 2, 0]] * (3 / 4), rtol=1e-6)
    np.testing.assert_allclose(seven, kernel[:, :, [0, 1, 2, 0, 1, 2, 0]] * (3 / 7), rtol=1e-6)
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float64):
        low = kernel.astype(dtype)
        wide = np.promote_types(dtype, np.float32)
        assert adapt_channels(low, 1).dtype == dtype
        np.testing.assert_array_equal(adapt_channels(low, 1), low.astype(wide).sum(2, keepdims=True).astype(dtype))
    # A gray image gives what it gave as three equal channels.
    np.testing.assert_allclose(adapt_channels(one, 3).sum(2), kernel.sum(2), rtol=1e-5, atol=1e-6)
