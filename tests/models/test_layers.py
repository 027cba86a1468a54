"""Layers: their parameters, and the operations in them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xception_flax.models import layers, ops
from xception_flax.text.errors import UserError


def test_separable_convolution_is_depthwise_then_pointwise(rng):
    x = rng.normal(size=(2, 6, 5, 8)).astype(np.float32)
    module = layers.SeparableConv(12)
    variables = module.init(jax.random.key(0), x)
    kernels = variables["params"]
    assert kernels["depthwise"]["kernel"].shape == (3, 3, 1, 8)
    assert kernels["pointwise"]["kernel"].shape == (1, 1, 8, 12)
    # Section 3: no non-linearity in between, so the whole is one dense convolution with a product kernel.
    dense = kernels["depthwise"]["kernel"][:, :, 0, :, None] * kernels["pointwise"]["kernel"]
    np.testing.assert_allclose(
        module.apply(variables, x), ops.convolution(x, dense, padding="SAME"), rtol=1e-4, atol=1e-5
    )


def test_dilated_separable_convolution(rng):
    """With taps two pixels apart, it is the plain convolution of every second pixel."""
    x = rng.normal(size=(2, 9, 8, 4)).astype(np.float32)
    module = layers.SeparableConv(6, dilation=(2, 2))
    variables = module.init(jax.random.key(0), x)
    plain = module.clone(dilation=(1, 1)).apply(variables, x[:, ::2, ::2])
    np.testing.assert_allclose(module.apply(variables, x)[:, ::2, ::2], plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "function"), [("relu", nn.relu), ("elu", nn.elu)])
def test_mid_activation_stands_between(rng, name, function):
    x = rng.normal(size=(2, 6, 5, 8)).astype(np.float32)
    module = layers.SeparableConv(12, mid_activation=name)
    variables = module.init(jax.random.key(0), x)
    kernels = variables["params"]
    spatial = function(ops.depthwise_convolution(x, kernels["depthwise"]["kernel"]))
    assert (np.asarray(spatial) != np.asarray(ops.depthwise_convolution(x, kernels["depthwise"]["kernel"]))).any()
    np.testing.assert_allclose(
        module.apply(variables, x), ops.pointwise_convolution(spatial, kernels["pointwise"]["kernel"]), rtol=1e-5
    )


def test_unknown_mid_activation_is_refused():
    with pytest.raises(UserError, match="unknown mid_activation 'rellu'; did you mean 'relu'"):
        layers.SeparableConv(12, mid_activation="rellu").init(jax.random.key(0), jnp.zeros((1, 4, 4, 8)))


def test_depthwise_multiplier_and_bfloat16(rng):
    x = rng.normal(size=(2, 6, 5, 4)).astype(np.float32)
    module = layers.DepthwiseConv(multiplier=3, dtype=jnp.bfloat16)
    variables = module.init(jax.random.key(0), x)
    assert variables["params"]["kernel"].shape == (3, 3, 1, 12)
    assert variables["params"]["kernel"].dtype == jnp.float32
    y = module.apply(variables, x)
    assert (y.shape, y.dtype) == ((2, 6, 5, 12), jnp.bfloat16)


def test_weights_for_other_channels_are_refused():
    module = layers.Conv(4)
    variables = module.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
    message = r"Conv: .* need a kernel of 3 x 3 x 1 x 4 \(.*\), the weights have 3 x 3 x 3 x 4; give images and fields"
    with pytest.raises(UserError, match=message):
        module.apply(variables, jnp.zeros((1, 4, 4, 1)))


def test_initial_kernels_keep_the_size_of_the_signal():
    """Variance 1 / fan_in: 1 / 9 for a depthwise kernel, 1 / C for a pointwise one."""
    x = jnp.zeros((1, 4, 4, 1024))
    kernels = layers.SeparableConv(1024).init(jax.random.key(0), x)["params"]
    assert np.var(kernels["depthwise"]["kernel"]) == pytest.approx(1 / 9, rel=0.05)
    assert np.var(kernels["pointwise"]["kernel"]) == pytest.approx(1 / 1024, rel=0.01)


class Head(nn.Module):
    dropout_rate: float = 0.0
    fc_layers: tuple = ()

    @nn.compact
    def __call__(self, x, *, train):
        return layers.classifier_head(
            ops.global_average_pool(x),
            3,
            train=train,
            fc_layers=self.fc_layers,
            dropout_rate=self.dropout_rate,
            dtype=jnp.bfloat16,
        )


def test_head_is_pooling_hidden_layers_and_logistic_regression(rng):
    x = rng.normal(size=(2, 4, 5, 8)).astype(np.float32)
    head = Head(fc_layers=(16, 6))
    variables = head.init(jax.random.key(0), x, train=False)
    params = variables["params"]
    assert {name: p["kernel"].shape for name, p in params.items()} == {
        "fc1": (8, 16),
        "fc2": (16, 6),
        "predictions": (6, 3),
    }
    y = x.mean((1, 2))
    for name in ("fc1", "fc2"):
        y = np.maximum(y @ params[name]["kernel"] + params[name]["bias"][None], 0)
    expected = y @ params["predictions"]["kernel"] + params["predictions"]["bias"][None]
    logits = head.apply(variables, x, train=False)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, rtol=0.02, atol=0.02)  # hidden layers compute in bfloat16


def test_dropout_drops_its_share_in_training_only():
    x = jnp.ones((2000, 1, 1, 8))
    head = Head(dropout_rate=0.5)
    variables = head.init(jax.random.key(0), x[:1], train=False)
    still = head.apply(variables, x, train=False)
    assert np.ptp(still, axis=0).max() == 0
    dropped = head.apply(variables, x, train=True, rngs={"dropout": jax.random.key(1)})
    # Inverted dropout: the mean stays, and a feature is doubled or gone.
    assert np.ptp(dropped, axis=0).max() > 0
    np.testing.assert_allclose(dropped.mean(0), still[0], atol=0.05)
