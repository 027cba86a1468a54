"""Losses by name. A run minimises the mean of its loss over a batch plus a penalty of the parameters."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from xception_flax.text.errors import UserError
from xception_flax.text.lookup import lookup, written
from xception_flax.text.ranges import check_range
from xception_flax.training.optimizers import decay_mask

PyTree = Any


def softmax(
    logits: jax.Array, labels: jax.Array, /, *, label_smoothing: float, class_weights: np.ndarray | None = None
) -> jax.Array:
    """Cross-entropy for one label an image: `[N, C]`, `[N]` integers or `[N, C]` floating shares -> `[N]` (nats).

    Args:
      label_smoothing: share of the target that is spread over all classes.
      class_weights: `[C]`; the loss is multiplied with the weight of the label, or the mean of the weights by the
        shares.
    """
    targets = shares_of_classes("softmax", logits, labels)
    losses = optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, label_smoothing))
    return weighted(losses, logits, targets, class_weights)


def shares_of_classes(name: str, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the labels of the loss `name`, which takes one an image, as shares `[N, C]` that sum to 1.

    Raises:
      UserError: an image has several labels.
    """
    soft = labels.ndim == 2 and jnp.issubdtype(labels.dtype, jnp.floating)  # labels of several classes are integers
    if labels.ndim != 1 and not soft:
        raise UserError(
            f"loss {name!r} takes one label an image, got labels of shape {labels.shape}; for several labels "
            "set loss.name=sigmoid and metrics.name=multi_label."
        )
    return labels.astype(logits.dtype) if soft else jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)


def weighted(losses: jax.Array, logits: jax.Array, targets: jax.Array, weights: np.ndarray | None) -> jax.Array:
    """Returns the losses `[N]` times the mean of the classes' weights `[C]` by the shares `targets` `[N, C]`."""
    if weights is None:
        return losses
    _check_number(weights, logits)
    return losses * jnp.sum(targets * weights[None], axis=-1)


def sigmoid(
    logits: jax.Array, labels: jax.Array, /, *, label_smoothing: float, class_weights: np.ndarray | None = None
) -> jax.Array:
    """Binary cross-entropy summed over the classes, for any number of labels an image (JFT).

    `[N, C]`, `[N, C]` of 0 and 1 or shares between them -> `[N]` (nats).

    Args:
      label_smoothing: moves each target towards 1/2.
      class_weights: `[C]`; they multiply the part of the loss by which a class that is there should be found.
    """
    if labels.shape != logits.shape:
        raise UserError(
            f"loss 'sigmoid' takes a row of 0 and 1 an image, got labels of shape {labels.shape} for logits of "
            f"shape {logits.shape}; for one label an image set loss.name=softmax and metrics.name=single_label."
        )
    targets = labels.astype(logits.dtype) * (1 - label_smoothing) + label_smoothing / 2
    if class_weights is None:
        return jnp.sum(optax.sigmoid_binary_cross_entropy(logits, targets), axis=-1)
    _check_number(class_weights, logits)
    found, absent = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    return -jnp.sum(class_weights[None] * targets * found + (1 - targets) * absent, axis=-1)


class Entry(NamedTuple):
    """One choice of loss.

    Attributes:
      function: `function(logits, labels, *, label_smoothing, class_weights=None)` returns `[N]`. Its further
        parameters, between `/` and `*`, are keys of the group `loss`.
      activation: what makes probabilities of the logits: 'softmax' where an image has one label, or 'sigmoid'.
    """

    function: Callable[..., jax.Array]
    activation: str


#: The losses by name, for `loss.name` of a recipe.
LOSSES = {"softmax": Entry(softmax, "softmax"), "sigmoid": Entry(sigmoid, "sigmoid")}


class Loss(NamedTuple):
    """A run minimises the mean of `example` over the batch plus `penalty` of the parameters."""

    example: Callable[[jax.Array, jax.Array], jax.Array]  # logits, labels -> [N], with smoothing; labels may be soft
    plain: Callable[[jax.Array, jax.Array], jax.Array]  # the same without smoothing, for evaluation
    penalty: Callable[[PyTree], jax.Array]  # params -> scalar


def create_loss(
    name: str,
    label_smoothing: float = 0.0,
    weight_decay: float = 0.0,
    class_weights: str | Sequence[float] | None = None,
    *,
    class_shares: Sequence[float] | None = None,
    **options: Any,
) -> Loss:
    """Returns the loss `name`.

    Args:
      name: 'softmax' for one label an image, 'sigmoid' for any number of labels.
      label_smoothing: share of the target that is spread over all classes (Inception V3: 0.1).
      weight_decay: factor of an L2 penalty in the loss (paper, section 4.3): `weight_decay / 2 * sum of squares` of all
        kernels, whose gradient is `weight_decay * kernel`. Unlike `optimizer.decoupled_weight_decay`, it passes through
        momentum and clipping with the rest of the gradient.
      class_weights: one factor a class, in the order of the classes, for training alone: evaluations count every image
        alike. For 'softmax' the loss of an image is multiplied with the factor of its class (`class_weight` of Keras);
        for 'sigmoid' the part of each class that it has (`pos_weight` of torch). 'balanced' makes rare classes count as
        much as frequent ones: for 'softmax' images / (classes * images of the class), as in scikit-learn; for 'sigmoid'
        images without the class / images with it. None: all 1.
      class_shares: the share of the training images that have each class, for 'balanced'; None if no loss is computed.
      **options: the loss' own keywords.

    Raises:
      UserError: unknown name, or a value out of its range.
    """
    entry = lookup(LOSSES, name, "loss.name")
    check_range("loss.label_smoothing", label_smoothing, 0, 1, below=True)
    check_range("loss.weight_decay", weight_decay, 0)
    weights = _weights(class_weights, entry.activation, class_shares)
    function = partial(entry.function, **options)

    def penalty(params: PyTree) -> jax.Array:
        squares = jax.tree.map(
            lambda p, decayed: jnp.sum(jnp.square(p.astype(jnp.float32))) if decayed else 0.0,
            params,
            decay_mask(params),
        )
        return weight_decay / 2 * jax.tree.reduce(jnp.add, squares, jnp.zeros((), jnp.float32))

    return Loss(
        example=partial(function, label_smoothing=label_smoothing, class_weights=weights),
        plain=partial(function, label_smoothing=0.0),
        penalty=penalty,
    )


def _weights(given: str | Sequence[float] | None, activation: str, shares: Sequence[float] | None) -> np.ndarray | None:
    """Returns `loss.class_weights` as float32 `[C]`, or None for all 1."""
    if given is None:
        return None
    if not isinstance(given, str):
        for weight in given:
            check_range("loss.class_weights", weight, 0)
        if not any(given):
            raise UserError(f"loss.class_weights must have one that is not 0, got {written(given)}.")
        return np.asarray(given, np.float32)
    if given != "balanced":
        raise UserError(f"loss.class_weights must be 'balanced', a number a class, or None, got {written(given)}.")
    if shares is None:
        return None
    share = np.asarray(shares, np.float64)
    if not share.min() > 0:
        raise UserError(
            f"loss.class_weights=balanced: class number {int(share.argmin())} has no images to train on; "
            "give a number for each class."
        )
    if activation == "softmax":
        return (1 / (len(share) * share)).astype(np.float32)
    if not share.max() < 1:
        raise UserError(
            f"loss.class_weights=balanced: all images have class number {int(share.argmax())}; give a number for each."
        )
    return ((1 - share) / share).astype(np.float32)


def _check_number(weights: np.ndarray, logits: jax.Array) -> None:
    if len(weights) != logits.shape[-1]:
        raise UserError(
            f"loss.class_weights must have one for each of the {logits.shape[-1]} classes, got {len(weights)}."
        )
