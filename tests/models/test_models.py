"""Networks: exact sizes, shapes, names and cost."""

import inspect
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xception_flax import MODELS, create_model, ops
from xception_flax.models.costs import list_layers
from xception_flax.text.errors import UserError

# At 1000 classes and the default image size: trainable parameters, moving statistics, multiply-adds,
# shapes of the stages. Parameters of the aligned networks are timm's (golden/timm.npz has them too).
PYRAMID = [(150, 150, 128), (75, 75, 256), (38, 38, 728), (19, 19, 1024), (10, 10, 2048)]
XCEPTION = [(147, 147, 64), (74, 74, 128), (37, 37, 256), (19, 19, 728), (10, 10, 2048)]
INCEPTION = [(147, 147, 64), (71, 71, 192), (35, 35, 288), (17, 17, 768), (8, 8, 2048)]
SIZES = {
    "xception": (299, 22_855_952, 54_528, 8_357_403_496, XCEPTION),  # paper, table 3
    "xception_towers": (299, 22_855_952, 54_528, 8_357_403_496, XCEPTION),  # one tower a channel: the same
    "inception_v3": (299, 23_817_352, 34_432, 5_713_216_096, INCEPTION),  # Keras Applications
    "xception41": (299, 26_969_560, 115_312, 9_204_134_312, PYRAMID),
    "xception65": (299, 39_916_312, 185_200, 13_852_682_216, PYRAMID),
    "xception71": (299, 42_338_736, 198_976, 17_946_553_928, PYRAMID),
    "xception41p": (299, 26_907_752, 53_504, 9_204_134_312, PYRAMID),
    "xception65p": (299, 39_819_560, 88_448, 13_852_682_216, PYRAMID),
    # 25 * (3 * 32 + 32 * 64 + 64 * 128) + 129 * 128 + 129 * 1000 weights
    "lenet": (32, 403_912, 0, 28_816_384, [(16, 16, 32), (8, 8, 64), (4, 4, 128)]),
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


class Rows(dict):
    """A table with a row for each network."""

    def __missing__(self, name: str):
        pytest.fail(f"{name!r} has no row in NARROW of tests/models/test_models.py: add its narrowest fields")


# The narrowest of each, for what holds at any width.
NARROW = Rows(
    xception=dict(width=0.05, middle_repeats=1),
    xception_towers=dict(width=0.05, middle_repeats=1, width_multiple=8, towers=3),
    inception_v3=dict(width=0.05),
    **{
        name: dict(width=0.05, middle_repeats=1)
        for name in ("xception41", "xception65", "xception71", "xception41p", "xception65p")
    },
    lenet=dict(width=0.25),
)


def abstract_variables(model, channels: int = 3):
    images = jax.ShapeDtypeStruct((1, 75, 75, channels), jnp.float32)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)


def random_variables(model, images):
    """Random weights, without compiling an initialization: kernels of variance 2 / fan_in, other arrays disturbed."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(leaf.dtype)
        if path[-1].key == "kernel":
            return noise * (2 / math.prod(leaf.shape[:-1])) ** 0.5
        return 0.1 * noise + (1 if path[-1].key in ("scale", "var") else 0)

    variables = dict(abstract_variables(model, images.shape[-1]))
    return jax.tree_util.tree_map_with_path(draw, variables)


def apply(model, variables, images, **options):
    options = dict(train=False) | options
    return jax.jit(lambda v, x: model.apply(v, x, **options))(variables, images)


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_the_size_table_is_complete():
    assert set(SIZES) == set(MODELS), "add a row to SIZES, or take one away"
    assert set(NARROW) == set(MODELS), "add a row to NARROW, or take one away"


@pytest.mark.parametrize("name", MODELS)
def test_contract(name):
    """What a network must have, as docs/forking.md lists it."""
    model = create_model(name, num_classes=5, **NARROW[name])
    for field in ("num_classes", "dtype"):
        assert hasattr(model, field), f"{name} has no field {field!r}"
    for method in ("__call__", "endpoints"):
        assert hasattr(model, method), f"{name} has no method {method!r}"
        parameters = inspect.signature(getattr(model, method)).parameters
        assert list(parameters) == ["images", "train"], f"{name}: {method} must be (images, *, train)"
        assert parameters["train"].kind is inspect.Parameter.KEYWORD_ONLY, f"{name}: {method} must take train by name"
    images = jax.ShapeDtypeStruct((2, 75, 80, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    assert set(variables) <= {"params", "batch_stats"}, f"{name} has other collections than params and batch_stats"
    assert "predictions" in variables["params"], f"{name}: the classifier must be named 'predictions' (classifier_head)"

    def run(**options):
        return jax.eval_shape(lambda v, x: model.apply(v, x, train=False, **options), variables, images)

    logits, endpoints = run(), run(method="endpoints")
    assert logits == endpoints.get("logits"), f"{name}: endpoints must have the 'logits' that a call returns"
    assert (logits.shape, logits.dtype) == ((2, 5), jnp.float32), f"{name}: logits must be [N, num_classes] float32"
    assert endpoints["pooled"].ndim == 2, f"{name}: endpoints must have 'pooled', [N, C]"
    assert getattr(model, "strides", None), f"{name} has no strides, {{stage: pixels of the image}}"
    marked = run(mutable=["intermediates"])[1].get("intermediates", {})
    for stage, stride in model.strides.items():
        assert stage in endpoints, f"{name}: strides have {stage!r}, which the endpoints lack"
        expected = [pytest.approx(size / stride, abs=4) for size in images.shape[1:3]]
        assert list(endpoints[stage].shape[1:-1]) == expected, (
            f"{name}: {stage!r} must be [N, H / stride, W / stride, C]"
        )
        assert stage in marked, f"{name}: {stage!r} must pass through mark_stage, for explain"


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    size, parameters, statistics, macs, stages = SIZES[name]
    model = create_model(name)
    variables = abstract_variables(model)
    assert count(variables["params"]) == parameters
    assert count(variables.get("batch_stats", {})) == statistics
    layers = list_layers(model, (size, size, 3))
    assert sum(layer.parameters for layer in layers) == parameters
    assert sum(layer.statistics for layer in layers) == statistics
    assert sum(layer.macs for layer in layers) == macs

    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    endpoints = jax.eval_shape(lambda v, x: model.apply(v, x, train=False, method="endpoints"), variables, images)
    shapes = {name: value.shape for name, value in endpoints.items()}
    assert shapes == {
        **{f"stage{i}": (2, *stage) for i, stage in enumerate(stages, start=1)},
        "pooled": (2, stages[-1][-1]),
        "logits": (2, 1000),
    }
    assert list(model.strides) == [name for name in shapes if name.startswith("stage")]
    for i, (height, _, _) in enumerate(stages, start=1):
        assert model.strides[f"stage{i}"] == 2**i
        assert height == pytest.approx(size / 2**i, abs=4)  # a stem without padding loses some


def test_the_docs_have_the_sizes():
    page = (Path(__file__).parents[2] / "docs" / "networks.md").read_text()
    for name, (_, parameters, _, macs, _) in SIZES.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        number, unit = row.split("|")[3].split()[:2]
        assert row.split("|")[2].strip() == f"{parameters:,}", name
        assert float(number) == pytest.approx(macs / {"G": 1e9, "M": 1e6}[unit], rel=1e-3), name


@pytest.mark.parametrize("name", MODELS)
def test_a_backbone_has_no_classifier(name):
    """num_classes=0: the same network without `predictions`, with the pooled features as logits."""
    model = create_model(name, num_classes=5, **NARROW[name])
    backbone = model.clone(num_classes=0)
    images = jax.random.normal(jax.random.key(0), (2, 75, 80, 3))
    variables = random_variables(model, images)
    params = {key: value for key, value in variables["params"].items() if key not in ("predictions", "fc1")}
    shapes = jax.tree.map(jnp.shape, abstract_variables(backbone)["params"])
    assert shapes == jax.tree.map(jnp.shape, params)
    endpoints = apply(model, variables, images, method="endpoints")
    assert endpoints["logits"].shape == (2, 5)
    embedding = apply(backbone, {**variables, "params": params}, images)
    # Two programs, compiled separately, add up in different orders.
    np.testing.assert_allclose(embedding, endpoints["pooled"], rtol=1e-4, atol=1e-6)
    last = np.maximum(endpoints[list(model.strides)[-1]], 0)  # with pre-activation the last ReLU is still to come
    np.testing.assert_allclose(embedding, last.mean((1, 2)), rtol=1e-4, atol=1e-5)
    assert np.ptp(embedding, axis=0).max() > 0


@pytest.mark.parametrize("size", [(64, 64), (75, 70)], ids=str)
@pytest.mark.parametrize("name", ["xception", "xception_towers", "xception41", "xception71", "xception41p"])
def test_output_stride_is_the_same_network_on_a_finer_grid(name, size):
    """With the same weights and any size: the dilated features at every k-th pixel are the strided ones."""
    model = create_model(name, num_classes=5, **NARROW[name])
    images = jax.random.normal(jax.random.key(0), (2, *size, 3))
    variables = random_variables(model, images)
    plain = apply(model, variables, images, method="endpoints")
    shapes = jax.tree.map(jnp.shape, abstract_variables(model))
    for output_stride in (8, 16):
        dilated = model.clone(output_stride=output_stride)
        assert jax.tree.map(jnp.shape, abstract_variables(dilated)) == shapes
        fine = apply(dilated, variables, images, method="endpoints")
        for stage, stride in model.strides.items():
            step = stride // dilated.strides[stage]
            assert step == max(1, stride // output_stride)
            assert np.ptp(plain[stage]) > 0
            tolerance = 1e-5 * np.abs(plain[stage]).max()
            np.testing.assert_allclose(fine[stage][:, ::step, ::step], plain[stage], rtol=0, atol=tolerance)
        assert fine["stage5"].shape[1] > 1.5 * plain["stage5"].shape[1]


def test_output_stride_with_symmetric_pooling():
    """timm's reading of Xception, at sizes whose halves are even and odd."""
    model = create_model("xception", num_classes=0, padding="SYMMETRIC", **NARROW["xception"])
    images = jax.random.normal(jax.random.key(0), (1, 97, 80, 3))
    variables = random_variables(model, images)
    plain = apply(model, variables, images, method="endpoints")["stage5"]
    fine = apply(model.clone(output_stride=8), variables, images, method="endpoints")["stage5"]
    np.testing.assert_allclose(fine[:, ::4, ::4], plain, rtol=0, atol=1e-5 * np.abs(plain).max())
    same = apply(model.clone(padding="SAME"), variables, images, method="endpoints")["stage5"]
    assert np.abs(same - plain).max() > 1e-2 * np.abs(plain).max()


@pytest.mark.parametrize("name", ["xception", "xception_towers", "inception_v3", "xception41", "xception41p"])
def test_remat_keeps_less_for_the_backward_pass(name):
    """Bytes that the gradient keeps of the forward pass, from shapes: 0.14, 0.27, 0.70, 0.09 and 0.08 of all.

    A block of Inception has few arrays between its input and its output.
    """
    model = create_model(name, num_classes=5, dropout_rate=0.0, **NARROW[name] | {"width": 0.1})
    images = jax.ShapeDtypeStruct((8, 128, 128, 3), jnp.float32)

    def kept(network) -> int:
        def residuals(variables, images):
            def logits(params):
                variables_ = {**variables, "params": params}
                return network.apply(variables_, images, train=True, mutable=["batch_stats"])[0]

            return jax.tree.leaves(jax.vjp(logits, variables["params"])[1])

        shapes = jax.eval_shape(residuals, abstract_variables(network), images)
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in shapes)

    assert kept(model.clone(remat=True)) < (0.75 if name == "inception_v3" else 0.3) * kept(model)


@pytest.mark.parametrize("name", ["xception", "xception41p"])
def test_remat_changes_memory_only(name):
    """Same names, logits, statistics and gradients; the insides of the blocks are computed twice."""
    model = create_model(name, num_classes=5, dropout_rate=0.0, **NARROW[name])
    images = jax.random.normal(jax.random.key(0), (2, 75, 75, 3))
    variables = random_variables(model, images)
    results, barriers = {}, {}
    for remat in (False, True):
        network = model.clone(remat=remat)

        def loss(params, images, network=network):
            logits, updates = network.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            return jnp.sum(jnp.sin(logits)), updates

        step = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(variables["params"], images)
        barriers[remat] = step.as_text().count("optimization_barrier")  # these keep XLA from undoing it
        results[remat] = step.compile(compiler_options={"xla_backend_optimization_level": 0})(
            variables["params"], images
        )
    assert barriers[True] > barriers[False]
    assert jax.tree.structure(results[True]) == jax.tree.structure(results[False])
    scale = max(np.abs(g).max() for g in jax.tree.leaves(results[False][1]))
    for a, b in zip(jax.tree.leaves(results[True]), jax.tree.leaves(results[False]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * scale)


def test_auxiliary_tower_of_inception_v3():
    """TF-slim's: 128 filters 1x1, 768 filters 5x5, a classifier; off by default, and not in the logits."""
    model = create_model("inception_v3", auxiliary=True)
    layers = {layer.path[0]: layer for layer in list_layers(model, (299, 299, 3))}
    assert layers["auxiliary_conv1"].shape == (5, 5, 128)
    assert layers["auxiliary_conv2"].shape == (1, 1, 768)
    assert layers["auxiliary_predictions"].shape == (1000,)
    extra = sum(layer.parameters for name, layer in layers.items() if name.startswith("auxiliary"))
    assert extra == 768 * 128 + 128 + 25 * 128 * 768 + 768 + 769 * 1000
    images = jax.ShapeDtypeStruct((2, 299, 299, 3), jnp.float32)
    endpoints = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, train=False, method="endpoints")[0], images
    )
    assert endpoints["auxiliary_logits"].shape == (2, 1000)
    with pytest.raises(UserError, match="needs 'stage4' features of 17 x 17, which 299 pixels give, got 7 x 7"):
        list_layers(model, (139, 139, 3))


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
    shapes = {
        layer.path[0].removesuffix("_bn"): layer.shape for layer in list_layers(create_model("xception"), (299, 299, 3))
    }
    assert {name: shapes[name] for name in XCEPTION_SHAPES} == XCEPTION_SHAPES


def test_xception_cost_at_299_pixels():
    """8.357 GMAC an image: 90.6 % pointwise, 7.8 % dense convolutions, 1.6 % depthwise."""
    layers = list_layers(create_model("xception"), (299, 299, 3))
    total = sum(layer.macs for layer in layers)
    assert total / 1e9 == pytest.approx(8.357, abs=5e-4)

    def share(of):
        return 100 * sum(layer.macs for layer in layers if of(layer.path)) / total

    assert share(lambda p: p[-1] == "pointwise") == pytest.approx(90.6, abs=0.05)
    assert share(lambda p: p[-1] == "depthwise") == pytest.approx(1.6, abs=0.05)
    assert share(lambda p: len(p) == 1 and p[0] != "predictions") == pytest.approx(7.8, abs=0.05)


def test_xception_parameter_names_are_public():
    """Names and shapes stay, as checkpoints and forks have them. A new name is a new line, not a changed one."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_variables(create_model("xception")))
    lines = [f"{'/'.join(k.key for k in path)} {'x'.join(map(str, leaf.shape))}" for path, leaf in leaves]
    golden = Path(__file__).parents[1] / "golden" / "xception_parameters.txt"
    assert "\n".join(lines) + "\n" == golden.read_text()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("height", "width", "channels"), [(32, 32, 1), (33, 71, 3), (64, 40, 4)])
def test_any_size_and_channels(name, height, width, channels):
    model = create_model(name, num_classes=7, **NARROW[name])
    if name == "inception_v3":  # its least size is 75
        height, width = height + 43, width + 43
    images = jax.ShapeDtypeStruct((2, height, width, channels), jnp.float32)
    logits, _ = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, train=False), images)
    assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)


@pytest.mark.parametrize("name", MODELS)
def test_other_channels_than_the_weights_have_are_refused(name):
    model = create_model(name, num_classes=7, **NARROW[name])
    variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), abstract_variables(model))
    message = r"^\w+: .* kernel of .* x 1 x (\d+) .*, the weights have .* x 3 x \1; give images"
    with pytest.raises(UserError, match=message):
        model.apply(variables, jnp.zeros((1, 75, 75, 1)), train=False)


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
        variables = random_variables(model, images)
        scale = variables["params"]["block5_sepconv3_bn"]["scale"]
        variables["params"]["block5_sepconv3_bn"]["scale"] = jnp.zeros_like(scale)
        spreads[residual] = np.ptp(apply(model, variables, images), axis=0).max()
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
        variables = random_variables(model, images)
        results[name] = (count(variables), np.asarray(apply(model, variables, images)))
    assert len({size for size, _ in results.values()}) == 1
    assert len({logits.tobytes() for _, logits in results.values()}) == 3


def test_bfloat16_computes_in_bfloat16_and_keeps_float32():
    model = create_model("xception", num_classes=3, width=0.1, middle_repeats=1, dtype="bfloat16")
    images = jax.random.normal(jax.random.key(0), (4, 48, 48, 3))
    variables = random_variables(model, images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits, state = apply(model, variables, images, capture_intermediates=True, mutable=["intermediates"])
    assert state["intermediates"]["block7_sepconv2_bn"]["__call__"][0].dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    exact = apply(model.clone(dtype=jnp.float32), variables, images)
    assert 0 < np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize(("train", "padding"), [(False, "SAME"), (True, "SAME"), (True, "SYMMETRIC")])
def test_chains_compute_what_single_layers_do(monkeypatch, train, padding):
    """As on GPUs, where a normalization is computed with the operation after it: logits, gradients, statistics.

    Where Flax is asked for the results of single layers, they are computed one by one.
    """
    with jax.enable_x64(True):
        fields = dict(width=0.05, middle_repeats=1, padding=padding, dropout_rate=0.0)
        model = create_model("xception", num_classes=3, **fields, dtype="float64", param_dtype="float64")
        images = jax.random.normal(jax.random.key(0), (3, 37, 40, 3), jnp.float64)
        variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), random_variables(model, images))

        def gradients(**options):
            def loss(params):
                logits, state = model.apply(
                    variables | {"params": params}, images, train=train, mutable=["batch_stats"], **options
                )
                return jnp.sum(jnp.sin(logits)), (logits, state)

            return jax.grad(loss, has_aux=True)(variables["params"])

        expected = gradients()
        monkeypatch.setattr(ops, "takes_chains", lambda images, train: True)
        calls = []
        pool = ops.normalized_max_pool
        monkeypatch.setattr(ops, "normalized_max_pool", lambda *x, **options: calls.append(1) or pool(*x, **options))
        results = gradients()
        assert len(calls) == 4
        for ours, theirs in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9 * np.abs(theirs).max())
        state = model.apply(variables, images, train=False, capture_intermediates=True, mutable=["intermediates"])[1]
        assert len(calls) == 4
        assert "block2_sepconv1_bn" in state["intermediates"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "xcepton"}, "unknown model 'xcepton'; did you mean 'xception'"),
        ({"widht": 0.5}, "model 'xception' has no attribute 'widht'; did you mean 'width'"),
        ({"pretrained": True}, r"has no attribute 'pretrained'; xception_flax\.load\('keras:xception'\) fetches"),
        ({"in_chans": 1}, "no attribute 'in_chans'; the first layer takes as many channels as the images have"),
        ({"features_only": True}, r"'features_only'; model\.apply\(\.\.\., method='endpoints'\) returns"),
        ({"include_top": False}, "no attribute 'include_top'; num_classes=0 leaves the classifier out"),
        ({"num_classes": "ten"}, "model.num_classes must be an integer, got 'ten'"),
        ({"width": None}, "model.width must be a number, got None"),
        ({"fc_layers": 64}, "model.fc_layers must be a list of integers, got 64"),
        ({"num_classes": -1}, r"num_classes \(0: no classifier\) must be in \[0, 16,777,216\], got -1"),
        ({"output_stride": 4}, r"output_stride must be one of \(8, 16, 32\), got 4"),
        ({"name": "xception41", "output_stride": 64}, r"output_stride must be one of \(8, 16, 32\), got 64"),
        ({"name": "inception_v3", "output_stride": 16}, "model 'inception_v3' has no attribute 'output_stride'"),
        ({"width": float("inf")}, "width must be positive and finite, got inf"),
        ({"width": float("nan")}, "width must be positive and finite, got nan"),
        *(
            ({"name": "xception41", "entry_flow": blocks}, r"entry_flow must be \(channels, stride\) of blocks")
            for blocks in (
                ((8, 2), (8, 4)),
                ((128, 2), (256,), (728, 2)),
                ((128, 2), (256, 2), ("a", 2)),
                ((-128, 2), (0, 2), (728, 2)),
            )
        ),
        ({"name": "inception_v3", "auxiliary": True, "num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"name": "lenet", "features": ()}, r"features must be 1 to 13 widths, got \(\)"),
        ({"padding": "VALID"}, "padding must be 'SAME' or 'SYMMETRIC', got 'VALID'"),
        ({"width_multiple": 0}, r"width_multiple must be in \[1, 16,777,216\], got 0"),
        ({"dropout_rate": 1.0}, r"dropout_rate must be in \[0, 1\), got 1.0"),
        ({"mid_activation": "gelu"}, "unknown model.mid_activation 'gelu'"),
        ({"width": 0}, "width must be positive, got 0"),
        ({"middle_repeats": -1}, r"middle_repeats must be in \[0, 1,000\], got -1"),
        ({"bn_decay": 1.0}, "bn_decay"),
        ({"bn_epsilon": -1.0}, "bn_epsilon must be positive, got -1.0"),
        ({"fc_layers": (64, "x")}, "fc_layers must be positive integers"),
        ({"dtype": "int8"}, "model.dtype must be one of bfloat16, float16, float32, float64, got 'int8'"),
        ({"dtype": "float33"}, "model.dtype must be one of .*, got 'float33'"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        create_model(**{"name": "xception", **fields})


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "xception",
            (1, 31, 64, 3),
            "Xception needs images of at least 32 x 32 pixels, got 31 x 64; give larger ones",
        ),
        ("inception_v3", (1, 75, 74, 3), "Inception V3 needs images of at least 75 x 75 pixels, got 75 x 74"),
        ("xception65", (1, 64, 31, 3), "Aligned Xception needs images of at least 32 x 32 pixels, got 64 x 31"),
        ("lenet", (1, 7, 8, 3), "LeNet needs images of at least 8 x 8 pixels, got 7 x 8"),
        ("xception", (1, 3, 64, 64), r"\(1, 3, 64, 64\) looks like \[N, C, H, W\], transpose it"),
        ("xception", (64, 64, 3), r"images must be \[N, H, W, C\], got shape \(64, 64, 3\)"),
    ],
)
def test_bad_images_are_refused(name, shape, message):
    model = create_model(name, **NARROW[name])
    with pytest.raises(UserError, match=message):
        model.init(jax.random.key(0), jnp.zeros(shape), train=False)


@pytest.mark.parametrize("name", [name for name in NARROW if name != "lenet"])
def test_frozen_normalization_trains_as_it_infers(name):
    """Without dropout the two are the same program, and the statistics are returned as they came."""
    model = create_model(name, num_classes=5, dropout_rate=0.0, bn_frozen=True, **NARROW[name])
    variables, images = abstract_variables(model), jax.ShapeDtypeStruct((2, 75, 75, 3), jnp.float32)
    train = jax.make_jaxpr(lambda v, x: model.apply(v, x, train=True, mutable="batch_stats"))(variables, images)
    infer = jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False))(variables, images)
    assert list(map(str, train.eqns)) == list(map(str, infer.eqns))
    assert set(train.jaxpr.outvars[1:]) <= set(train.jaxpr.invars)
    assert len(train.jaxpr.outvars) - 1 == len(jax.tree.leaves(variables["batch_stats"]))
