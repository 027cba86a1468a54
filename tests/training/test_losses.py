"""Each loss against its formula in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

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


def test_class_weights_multiply_the_loss_of_their_class(rng):
    """Softmax: the loss of an image; sigmoid: of what should be found, as torch's `pos_weight`. Not in evaluation."""
    weights, logits, labels = [0.5, 2.0, 0.0], rng.normal(size=(4, 3)), np.array([0, 1, 2, 1])
    log_p = np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
    loss = losses.create_loss("softmax", label_smoothing=0.3, class_weights=weights)
    one_hot = np.eye(3)[labels]
    expected = -(np.array(weights)[labels] * ((0.7 * one_hot + 0.1) * log_p).sum(-1))
    np.testing.assert_allclose(loss.example(jnp.asarray(logits), jnp.asarray(labels)), expected, rtol=1e-5)
    np.testing.assert_allclose(
        loss.plain(jnp.asarray(logits), jnp.asarray(labels)), -(one_hot * log_p).sum(-1), rtol=1e-5
    )
    soft = np.array([[0.5, 0.5, 0.0]])  # mixed images: the mean of the weights
    loss = losses.create_loss("softmax", class_weights=weights)
    expected = -1.25 * (soft * log_p[:1]).sum(-1)
    np.testing.assert_allclose(loss.example(jnp.asarray(logits[:1]), jnp.asarray(soft)), expected, rtol=1e-5)
    several, p = rng.random((4, 3)) < 0.5, 1 / (1 + np.exp(-logits))
    loss = losses.create_loss("sigmoid", class_weights=weights)
    expected = -np.sum(several * np.log(p) * np.array(weights)[None] + ~several * np.log(1 - p), axis=-1)
    np.testing.assert_allclose(loss.example(jnp.asarray(logits), jnp.asarray(several)), expected, rtol=1e-5)


def test_balanced_weights_are_scikit_learns():
    labels = np.array([0] * 70 + [1] * 27 + [2] * 3)
    shares = np.bincount(labels) / 100
    loss = losses.create_loss("softmax", class_weights="balanced", class_shares=shares)
    weighted = np.asarray(loss.example(jnp.zeros((3, 3)), jnp.arange(3))) / np.log(3)
    np.testing.assert_allclose(weighted, compute_class_weight("balanced", classes=np.arange(3), y=labels), rtol=1e-5)
    assert weighted @ shares == pytest.approx(1)  # the mean over the data
    loss = losses.create_loss("sigmoid", class_weights="balanced", class_shares=[0.25, 0.5])
    found = loss.example(jnp.zeros((1, 2)), jnp.array([[1, 1]]))
    assert float(found[0]) == pytest.approx((3 + 1) * np.log(2))


def test_a_new_loss_has_keys_of_its_own_and_balances_by_its_activation(monkeypatch):
    """As a fork adds one: `factor` is a key of the group `loss`."""

    def scaled(logits, labels, /, factor: float = 1.0, *, label_smoothing, class_weights=None):
        return factor * losses.softmax(logits, labels, label_smoothing=label_smoothing, class_weights=class_weights)

    monkeypatch.setitem(losses.LOSSES, "scaled", losses.Entry(scaled, "softmax"))
    loss = losses.create_loss("scaled", factor=3.0, class_weights="balanced", class_shares=[0.25, 0.75])
    found = np.asarray(loss.example(jnp.zeros((2, 2)), jnp.arange(2)))
    np.testing.assert_allclose(found, 3 * np.log(2) * np.array([2, 2 / 3]), rtol=1e-6)
    assert float(loss.plain(jnp.zeros((1, 2)), jnp.array([0]))[0]) == pytest.approx(3 * np.log(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: losses.create_loss("softmax", class_weights="balance"),
            "must be 'balanced', a number a class, or None",
        ),
        (
            lambda: losses.create_loss("softmax", class_weights=[1.0, -1.0]),
            "class_weights must be 0 or positive, got -1",
        ),
        (lambda: losses.create_loss("softmax", class_weights=[0.0, 0.0]), "must have one that is not 0"),
        (lambda: losses.create_loss("softmax", class_weights=()), "must have one that is not 0"),
        (
            lambda: losses.create_loss("softmax", class_weights="balanced", class_shares=[1.0, 0.0]),
            "class number 1 has no images to train on; give a number for each class",
        ),
        (
            lambda: losses.create_loss("sigmoid", class_weights="balanced", class_shares=[1.0, 0.5]),
            "all images have class number 0; give a number for each",
        ),
        (
            lambda: losses.create_loss("softmax", class_weights=[1.0, 2.0]).example(
                jnp.zeros((1, 3)), jnp.zeros(1, int)
            ),
            "must have one for each of the 3 classes, got 2",
        ),
        (lambda: losses.create_loss("softmx"), "unknown loss.name 'softmx'; did you mean 'softmax'"),
        (lambda: losses.create_loss("softmax", label_smoothing=1.0), r"label_smoothing must be in \[0, 1\), got 1.0"),
        (lambda: losses.create_loss("softmax", weight_decay=-1.0), "weight_decay must be 0 or positive, got -1.0"),
    ],
)
def test_bad_losses_are_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()
