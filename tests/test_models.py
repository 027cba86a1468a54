"""Networks: exact sizes, shapes, names and cost."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xception_flax import MODELS, create_model

# Trainable parameters and moving statistics at 1000 classes.
SIZES = {
    "xception": (22_855_952, 54_528),  # paper, table 3
}

# Output of each stage of Xception at 299 px (paper, section 3 and figure 5).
XCEPTION_SHAPES = {
    "block1_conv1": (149, 149, 32),
    "block1_conv2": (147, 147, 64),
    "block2_sepconv2": (147, 147, 128),
    "block2_residual": (74, 74, 128),
    "block3_residual": (37, 37, 256),
    "block4_residual": (19, 19, 728),
    **{f"block{b}_sepconv3": (19, 19, 728) for b in range(5, 13)},
    "block13_sepconv2": (19, 19, 1024),
    "block13_residual": (10, 10, 1024),
    "block14_sepconv1": (10, 10, 1536),
    "block14_sepconv2": (10, 10, 2048),
    "predictions": (1000,),
}


def abstract_variables(model, channels: int = 3):
    images = jax.ShapeDtypeStruct((1, 64, 64, channels), jnp.float32)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)


def outputs(model, size: int) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Shape of the output of every module by its path, without the batch."""
    variables = abstract_variables(model)

    def call(variables, images):
        return model.apply(variables, images, train=False, capture_intermediates=True, mutable=["intermediates"])

    _, state = jax.eval_shape(call, variables, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
    leaves = jax.tree_util.tree_leaves_with_path(state["intermediates"])
    return {tuple(key.key for key in path[:-2]): leaf.shape[1:] for path, leaf in leaves}


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_the_size_table_is_complete():
    assert set(SIZES) == set(MODELS)


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    variables = abstract_variables(create_model(name))
    assert (count(variables["params"]), count(variables["batch_stats"])) == SIZES[name]


def test_xception_parameters_by_kind():
    """Convolutions, depthwise, pointwise, batch normalization, classifier."""
    sizes = dict.fromkeys(("convolution", "depthwise", "pointwise", "batch normalization", "classifier"), 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_variables(create_model("xception"))["params"]):
        name = jax.tree_util.keystr(path)
        kind = next(
            kind
            for kind, mark in {
                "depthwise": "['depthwise']",
                "pointwise": "['pointwise']",
                "batch normalization": "_bn']",
                "classifier": "['predictions']",
                "convolution": "['block",
            }.items()
            if mark in name
        )
        sizes[kind] += math.prod(leaf.shape)
    assert sizes == {
        "convolution": 992_096,
        "depthwise": 207_432,
        "pointwise": 19_552_896,
        "batch normalization": 54_528,
        "classifier": 2_049_000,
    }


def test_xception_shapes_at_299_pixels():
    shapes = outputs(create_model("xception"), 299)
    assert {name: shapes[(name,)] for name in XCEPTION_SHAPES} == XCEPTION_SHAPES


def test_xception_cost_at_299_pixels():
    """8.357 GMAC an image: 90.6 % pointwise, 7.8 % dense convolutions, 1.6 % depthwise."""
    model = create_model("xception")
    shapes, macs = outputs(model, 299), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_variables(model)["params"]):
        path = tuple(key.key for key in path)
        if path[-1] == "kernel":
            # Each weight of a kernel is used once for each pixel of the output.
            macs[path[:-1]] = math.prod(leaf.shape) * math.prod(shapes[path[:-1]][:-1])
    total = sum(macs.values())
    assert total / 1e9 == pytest.approx(8.357, abs=5e-4)

    def share(of):
        return 100 * sum(n for path, n in macs.items() if of(path)) / total

    assert share(lambda p: p[-1] == "pointwise") == pytest.approx(90.6, abs=0.05)
    assert share(lambda p: p[-1] == "depthwise") == pytest.approx(1.6, abs=0.05)
    assert share(lambda p: len(p) == 1 and p[0] != "predictions") == pytest.approx(7.8, abs=0.05)


def test_xception_parameter_names_are_public():
    """Names and shapes stay: checkpoints and forks hold them. A new name is a new line, not a changed one."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_variables(create_model("xception")))
    lines = [f"{'/'.join(k.key for k in path)} {'x'.join(map(str, leaf.shape))}" for path, leaf in leaves]
    golden = Path(__file__).parent / "golden" / "xception_parameters.txt"
    assert "\n".join(lines) + "\n" == golden.read_text()


@pytest.mark.parametrize(("height", "width", "channels"), [(32, 32, 1), (33, 71, 3), (64, 40, 4)])
def test_any_size_and_channels(height, width, channels):
    model = create_model("xception", num_classes=7, width=0.05, middle_repeats=1)
    images = jnp.zeros((2, height, width, channels))
    variables = model.init(jax.random.key(0), images, train=False)
    logits = model.apply(variables, images, train=False)
    assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)


def test_width_one_half_has_a_quarter_of_the_pointwise_parameters():
    names = [f"block{b}_sepconv1" for b in range(5, 13)]
    full, half = (abstract_variables(create_model("xception", width=w))["params"] for w in (1.0, 0.5))
    for name in names:
        assert full[name]["pointwise"]["kernel"].shape == (1, 1, 728, 728)
        assert half[name]["pointwise"]["kernel"].shape == (1, 1, 368, 368)  # 364, to a multiple of 8


def test_middle_repeats_renumbers_the_exit_flow():
    params = abstract_variables(create_model("xception", middle_repeats=2))["params"]
    assert {"block6_sepconv3", "block7_residual", "block8_sepconv2"} <= set(params)
    assert not any(name.startswith("block9") for name in params)


def test_without_residual_there_is_no_residual_convolution():
    """Section 4.6. The four 1x1 convolutions and their batch normalization go: 984k + 2 x 2136 parameters."""
    with_, without = (abstract_variables(create_model("xception", residual=r))["params"] for r in (True, False))
    gone = set(with_) - set(without)
    assert gone == {f"block{b}_residual{bn}" for b in (2, 3, 4, 13) for bn in ("", "_bn")}
    convolutions = 64 * 128 + 128 * 256 + 256 * 728 + 728 * 1024
    assert count(with_) - count(without) == convolutions + 2 * (128 + 256 + 728 + 1024)


def test_without_residual_the_input_of_a_middle_block_does_not_reach_its_output():
    """With zero scales in the last batch normalization a residual block is the identity, else it is zero."""
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    spreads = {}
    for residual in (True, False):
        model = create_model("xception", num_classes=3, width=0.05, middle_repeats=1, residual=residual)
        variables = model.init(jax.random.key(1), images, train=False)
        scale = variables["params"]["block5_sepconv3_bn"]["scale"]
        variables["params"]["block5_sepconv3_bn"]["scale"] = jnp.zeros_like(scale)
        spreads[residual] = np.ptp(model.apply(variables, images, train=False), axis=0).max()
    assert spreads[False] == 0
    assert spreads[True] > 1e-4


def test_fully_connected_variant():
    """Table 2: two 4096-wide layers before the classifier."""
    params = abstract_variables(create_model("xception", fc_layers=(4096, 4096)))["params"]
    assert params["fc1"]["kernel"].shape == (2048, 4096)
    assert params["fc2"]["kernel"].shape == (4096, 4096)
    assert params["predictions"]["kernel"].shape == (4096, 1000)


def test_mid_activation_changes_values_and_no_parameter():
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    results = {}
    for name in (None, "relu", "elu"):
        model = create_model("xception", num_classes=3, width=0.05, middle_repeats=1, mid_activation=name)
        variables = model.init(jax.random.key(1), images, train=False)
        results[name] = (count(variables), np.asarray(model.apply(variables, images, train=False)))
    assert len({size for size, _ in results.values()}) == 1
    assert len({logits.tobytes() for _, logits in results.values()}) == 3


def test_bfloat16_computes_in_bfloat16_and_keeps_float32():
    model = create_model("xception", num_classes=3, width=0.1, middle_repeats=1, dtype="bfloat16")
    images = jax.random.normal(jax.random.key(0), (4, 48, 48, 3))
    variables = model.init(jax.random.key(1), images, train=False)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits, state = model.apply(variables, images, train=False, capture_intermediates=True, mutable=["intermediates"])
    assert state["intermediates"]["block7_sepconv2_bn"]["__call__"][0].dtype == (jnp.bfloat16)
    assert logits.dtype == jnp.float32
    exact = model.clone(dtype=jnp.float32).apply(variables, images, train=False)
    assert 0 < np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "xcepton"}, "unknown model 'xcepton'; did you mean 'xception'"),
        ({"widht": 0.5}, "model 'xception' has no attribute 'widht'; did you mean 'width'"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"dropout_rate": 1.0}, r"dropout_rate must be in \[0, 1\), got 1.0"),
        ({"mid_activation": "gelu"}, "unknown mid_activation 'gelu'"),
        ({"width": 0}, "width must be positive, got 0"),
        ({"middle_repeats": -1}, "middle_repeats must not be negative, got -1"),
        ({"bn_decay": 1.0}, "bn_decay"),
        ({"bn_epsilon": -1.0}, "bn_epsilon must be positive, got -1.0"),
        ({"fc_layers": (64, "x")}, "fc_layers must be positive integers"),
        ({"dtype": "int8"}, "model.dtype must be a floating-point type such as 'bfloat16', got 'int8'"),
        ({"dtype": "float33"}, "model.dtype must be a floating-point type"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        create_model(**{"name": "xception", **fields})


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 31, 64, 3), "at least 32 x 32 pixels, got 31 x 64; raise the recipe's data.image_size"),
        ((64, 64, 3), r"images must be \[N, H, W, C\], got shape \(64, 64, 3\)"),
    ],
)
def test_bad_images_are_refused(shape, message):
    model = create_model("xception", width=0.05)
    with pytest.raises(ValueError, match=message):
        model.init(jax.random.key(0), jnp.zeros(shape), train=False)
