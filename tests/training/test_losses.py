"""Each loss against its formula in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from xception_flax.text.errors import UserError
from xception_flax.training import losses


def test_sigmoid_loss_is_binary_cross_entropy_summed_over_classes(rng):
    logits, labels = rng.normal(size=(3, 7)), rng.random((3, 7)) < 0.4
    p = 1 / (1 + np.exp(-logits))
    expected = -np.sum(np.where(labels, np.log(p), np.log(1 - p)), axis=-1)
    loss = losses.create_loss("sigmoid", label_smoothing=0.2)
    np.testing.assert_allclose(loss.plain(jnp.asarray(logits), jnp.asarray(labels)), expected, rtol=1e-5)
    targets = 0.8 * labels + 0.1
    smoothed = -np.sum(targets * np.log(p) + (1 - targets) * np.log(1 - p), axis=-1)
    np.testing.assert_allclose(loss.example(jnp.asarray(logits), jnp.asarray(labels)), smoothed, rtol=1e-5)


def test_soft_labels_are_for_floating_types(rng):
    """Integer rows of 0 and 1 mean several labels, which the loss for one label refuses."""
    logits, soft = rng.normal(size=(3, 4)), rng.dirichlet(np.ones(4), 3)
    loss = losses.create_loss("softmax", label_smoothing=0.2)
    expected = -np.sum((0.8 * soft + 0.05) * np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)), -1)
    np.testing.assert_allclose(loss.example(jnp.asarray(logits), jnp.asarray(soft)), expected, rtol=1e-5)
    with pytest.raises(UserError, match="takes one label an image"):
        loss.example(jnp.asarray(logits), jnp.ones((3, 4), jnp.uint8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.create_loss("softmx"), "unknown loss.name 'softmx'; did you mean 'softmax'"),
        (lambda: losses.create_loss("softmax", label_smoothing=1.0), r"label_smoothing must be in \[0, 1\), got 1.0"),
        (lambda: losses.create_loss("softmax", weight_decay=-1.0), "weight_decay must be 0 or positive, got -1.0"),
    ],
)
def test_bad_losses_are_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()
