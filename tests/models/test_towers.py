"""Numbers of towers between regular and depthwise separable convolution, and the paper's figures 1 to 4."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from xception_flax import create_model
from xception_flax.models import layers, ops, towers
from xception_flax.models.costs import list_layers
from xception_flax.text.errors import UserError

ORDERS = ("depthwise_first", "pointwise_first")


def value_and_gradients(function, params, x):
    """Value, and gradients by the parameters and by the input, of a projection on fixed random weights."""

    def project(params, x):
        y = function(params, x)
        return jnp.sum(y * np.random.default_rng(1).normal(size=y.shape)), y

    (_, y), grads = jax.jit(jax.value_and_grad(project, argnums=(0, 1), has_aux=True))(params, x)
    return y, *grads


def assert_equal(a, b, tolerance: float) -> None:
    """Each array of two trees within `tolerance` of its largest value."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.abs(other).max() > 0
        assert np.abs(one - other).max() <= tolerance * np.abs(other).max()


def block_diagonal(params: dict) -> np.ndarray:
    """The dense kernel that equals the spatial convolutions of a `TowerConv`: zero between segments."""
    blocks = []
    for name in ("spatial", "spatial_smaller"):
        if name in params:
            kernel = params[name]["kernel"]
            blocks += jnp.split(kernel, kernel.shape[-1] // kernel.shape[-2], axis=-1)
    channels = sum(block.shape[-1] for block in blocks)
    dense, start = jnp.zeros((3, 3, channels, channels), blocks[0].dtype), 0
    for block in blocks:
        end = start + block.shape[-1]
        dense = dense.at[:, :, start:end, start:end].set(block)
        start = end
    return dense


@pytest.mark.parametrize(
    ("channels", "count", "sizes"),
    [
        (12, 1, (12,)),
        (12, 3, (4, 4, 4)),
        (10, 4, (3, 3, 2, 2)),
        (5, None, (1, 1, 1, 1, 1)),
        (728, 3, (243, 243, 242)),
    ],
)
def test_segments(channels, count, sizes):
    assert layers.segments(channels, count) == sizes


@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize("order", ORDERS)
def test_any_number_of_towers_is_a_dense_convolution_with_zeros(rng, order, count):
    """Value and all gradients, for each number of towers of 8 channels; float64, to 1e-13."""
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(2, 6, 5, 8 if order == "depthwise_first" else 5)))
        module = layers.TowerConv(8, count, order, dtype=jnp.float64, param_dtype=jnp.float64)
        params = module.init(jax.random.key(0), x)["params"]

        def dense(params, x):
            spatial, pointwise = block_diagonal(params), params["pointwise"]["kernel"][0, 0]
            # One k x k convolution, as nothing is between the two, and a 1x1 keeps the zero padding zero.
            equation = "hwcd,df->hwcf" if order == "depthwise_first" else "df,hwfg->hwdg"
            operands = (spatial, pointwise) if order == "depthwise_first" else (pointwise, spatial)
            return ops.convolution(x, jnp.einsum(equation, *operands))

        ours = value_and_gradients(lambda p, x: module.apply({"params": p}, x), params, x)
        assert_equal(ours, value_and_gradients(dense, params, x), 1e-13)


def test_one_tower_is_the_regular_convolution_and_one_a_channel_the_separable(rng):
    """With the kernels of `SeparableConv` bit for bit, and those of a regular convolution to 1e-6; gradients too."""
    x = rng.normal(size=(2, 6, 5, 8)).astype(np.float32)
    separable = layers.SeparableConv(12)
    params = separable.init(jax.random.key(0), x)["params"]
    extreme = layers.TowerConv(12, towers=8)
    renamed = {"spatial": params["depthwise"], "pointwise": params["pointwise"]}
    y, grads, grad_x = value_and_gradients(lambda p, x: extreme.apply({"params": p}, x), renamed, x)
    expected, expected_grads, expected_grad_x = value_and_gradients(
        lambda p, x: separable.apply({"params": p}, x), params, x
    )
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(grad_x, expected_grad_x)
    np.testing.assert_array_equal(grads["spatial"]["kernel"], expected_grads["depthwise"]["kernel"])
    np.testing.assert_array_equal(grads["pointwise"]["kernel"], expected_grads["pointwise"]["kernel"])

    regular = layers.TowerConv(8, towers=1)
    params = regular.init(jax.random.key(0), x)["params"]
    identity = {"kernel": jnp.eye(8)[None, None]}
    y, grads, grad_x = value_and_gradients(
        lambda kernel, x: regular.apply({"params": {"spatial": {"kernel": kernel}, "pointwise": identity}}, x),
        params["spatial"]["kernel"],
        x,
    )
    expected = value_and_gradients(lambda kernel, x: ops.convolution(x, kernel), params["spatial"]["kernel"], x)
    assert_equal((y, grads, grad_x), expected, 1e-6)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("channels", [12, 10])
def test_parameters_and_multiply_adds_follow_the_formula(order, channels):
    """C * F + 9 * (sum of squares of the segments), for every number of towers; as many multiply-adds a pixel."""
    inputs, features = (channels, 7) if order == "depthwise_first" else (7, channels)
    for count in range(1, channels + 1):
        module = layers.TowerConv(features, count, order)
        size, larger = divmod(channels, count)
        squares = larger * (size + 1) ** 2 + (count - larger) * size**2
        if channels % count == 0:
            assert squares == channels**2 // count
        expected = inputs * features + 9 * squares
        measured = list_layers(_WithoutTrain(module), (6, 5, inputs))
        assert sum(layer.parameters for layer in measured) == expected
        assert sum(layer.macs for layer in measured) == expected * 6 * 5


class _WithoutTrain(nn.Module):
    layer: nn.Module

    def __call__(self, x, *, train):
        return self.layer(x)


@pytest.mark.parametrize("mid_activation", [None, "relu"])
@pytest.mark.parametrize(("features", "count"), [(12, 3), (12, 4), (10, 3), (8, 8), (6, 1)])
def test_figure_2_equals_figure_3(rng, features, count, mid_activation):
    """With the weights rearranged: value, gradients of every weight and of the input; float64, to 1e-14."""
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(2, 6, 5, 7)))
        float64 = dict(dtype=jnp.float64, param_dtype=jnp.float64)
        fields = dict(features=features, towers=count, mid_activation=mid_activation, **float64)
        figure_2, figure_3 = towers.SimplifiedInceptionModule(**fields), towers.SegmentedInceptionModule(**fields)
        params = figure_2.init(jax.random.key(0), x)["params"]
        y, grads, grad_x = value_and_gradients(lambda p, x: figure_2.apply({"params": p}, x), params, x)
        merged = towers.merge_towers(params)
        ours = value_and_gradients(lambda p, x: figure_3.apply({"params": p}, x), merged, x)
        assert_equal(ours, (y, towers.merge_towers(grads), grad_x), 1e-14)


def test_figure_2_is_its_towers_side_by_side(rng):
    x = rng.normal(size=(2, 6, 5, 7)).astype(np.float32)
    module = towers.SimplifiedInceptionModule(6)
    params = module.init(jax.random.key(0), x)["params"]
    assert set(params) == {f"tower{i}_{size}" for i in (1, 2, 3) for size in ("1x1", "3x3")}
    expected = [
        ops.convolution(
            nn.relu(ops.pointwise_convolution(x, params[f"tower{i}_1x1"]["kernel"])), params[f"tower{i}_3x3"]["kernel"]
        )
        for i in (1, 2, 3)
    ]
    np.testing.assert_allclose(module.apply({"params": params}, x), np.concatenate(expected, -1), rtol=1e-5, atol=1e-6)


def test_figure_4_is_the_separable_convolution_in_the_other_order(rng):
    """1x1 first, then one 3x3 a channel, with a non-linearity between (section 1.2)."""
    x = rng.normal(size=(2, 6, 5, 7)).astype(np.float32)
    module = towers.ExtremeInceptionModule(12)
    params = module.init(jax.random.key(0), x)["params"]
    assert params["pointwise"]["kernel"].shape == (1, 1, 7, 12)
    assert params["spatial"]["kernel"].shape == (3, 3, 1, 12)
    mapped = nn.relu(ops.pointwise_convolution(x, params["pointwise"]["kernel"]))
    expected = ops.depthwise_convolution(mapped, params["spatial"]["kernel"])
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, rtol=1e-6)
    same = towers.SegmentedInceptionModule(12, towers=12).apply({"params": params}, x)
    np.testing.assert_array_equal(same, module.apply({"params": params}, x))


def test_figure_1_is_four_towers(rng):
    x = rng.normal(size=(2, 6, 5, 7)).astype(np.float32)
    module = towers.InceptionModule(4)
    params = module.init(jax.random.key(0), x)["params"]

    def conv(x, name):
        return nn.relu(ops.convolution(x, params[name]["kernel"]))

    expected = [
        conv(x, "tower1_1x1"),
        conv(conv(x, "tower2_1x1"), "tower2_3x3"),
        conv(conv(conv(x, "tower3_1x1"), "tower3_3x3_1"), "tower3_3x3_2"),
        conv(ops.average_pool(x), "tower4_1x1"),
    ]
    y = module.apply({"params": params}, x)
    assert y.shape == (2, 6, 5, 16)
    np.testing.assert_allclose(y, np.concatenate(expected, -1), rtol=1e-5, atol=1e-6)


def test_one_tower_a_channel_makes_xception():
    """The same network to the bit, once its depthwise kernels are called spatial."""
    fields = dict(num_classes=5, width=0.1, middle_repeats=1)
    images = jax.random.normal(jax.random.key(0), (2, 48, 48, 3))
    xception, tower_network = (
        create_model("xception", **fields),
        create_model("xception_towers", width_multiple=8, **fields),
    )
    variables = jax.jit(lambda: xception.init(jax.random.key(1), images, train=False))()
    renamed = unflatten_dict(
        {
            tuple("spatial" if key == "depthwise" else key for key in path): leaf
            for path, leaf in flatten_dict(variables).items()
        }
    )
    expected = jax.jit(lambda v: xception.apply(v, images, train=False))(variables)
    assert np.ptp(expected, axis=0).max() > 1e-3
    np.testing.assert_array_equal(jax.jit(lambda v: tower_network.apply(v, images, train=False))(renamed), expected)


@pytest.mark.parametrize("count", [1, 2, 8, 64])
def test_parameters_of_a_whole_network_follow_the_formula(count):
    """The 9 C depthwise weights of each separable convolution become 9 * (sum of squares of its segments)."""
    inputs = [64, 128, 128, 256, 256, 728, *(8 * [728, 728, 728]), 728, 728, 1024, 1536]
    network = sum(
        layer.parameters for layer in list_layers(create_model("xception_towers", towers=count), (299, 299, 3))
    )
    assert network == 22_855_952 + sum(9 * (sum(s * s for s in layers.segments(c, count)) - c) for c in inputs)


@pytest.mark.parametrize("keep", ["parameters", "macs"])
@pytest.mark.parametrize("count", [1, 4, None])
def test_equal_width_keeps_the_cost(count, keep):
    """Within 1 % of Xception's, 22,855,952 parameters or 8.357 billion multiply-adds."""
    width = towers.equal_width(count, keep=keep)
    network = list_layers(create_model("xception_towers", towers=count, width=width), (299, 299, 3))
    target = {"parameters": 22_855_952, "macs": 8_357_403_496}[keep]
    assert sum(getattr(layer, keep) for layer in network) == pytest.approx(target, rel=0.01)
    assert width == 1.0 if count is None else width < 1.0


def test_equal_width_with_the_pointwise_convolution_first():
    width = towers.equal_width(3, order="pointwise_first")
    fields = dict(towers=3, order="pointwise_first", width=width)
    network = list_layers(create_model("xception_towers", **fields), (299, 299, 3))
    assert sum(layer.parameters for layer in network) == pytest.approx(22_855_952, rel=0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layers.segments(8, 0), r"towers must be from 1 .* to the 8 channels of the layer .*, got 0"),
        (lambda: layers.segments(8, 9), "got 9"),
        (lambda: layers.segments(8, 3.5), "got 3.5"),
        (lambda: layers.segments(8, "3"), "got '3'"),
        (lambda: _init(create_model("xception_towers", towers=65)), "to the 64 channels of the layer .*, got 65"),
        (
            lambda: _init(create_model("xception_towers", towers=2, order="first")),
            "unknown order 'first'; ",
        ),
        (lambda: towers.equal_width(2, keep="flops"), "unknown keep 'flops'"),
        (
            lambda: towers.equal_width(64),
            "64 towers need a width of 1.0 or more, at which they cost more than Xception",
        ),
        (lambda: towers.equal_width(65), "to the 64 channels of the layer .*, got 65"),
    ],
)
def test_bad_towers_are_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()


def _init(model):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=False))
