"""Losses by name. A run minimises the mean of its loss over a batch plus a penalty of the parameters."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from xception_flax.text.errors import UserError
from xception_flax.text.lookup import lookup
from xception_flax.text.ranges import check_range
from xception_flax.training.optimizers import decay_mask

PyTree = Any


def softmax(logits: jax.Array, labels: jax.Array, label_smoothing: float) -> jax.Array:
    """Cross-entropy for one label an image: `[N, C]`, `[N]` integers or `[N, C]` floating shares -> `[N]` (nats)."""
    soft = labels.ndim == 2 and jnp.issubdtype(labels.dtype, jnp.floating)  # labels of several classes are integers
    if labels.ndim != 1 and not soft:
        raise UserError(
            f"loss 'softmax' takes one label an image, got labels of shape {labels.shape}; for several labels "
            "set loss.name=sigmoid and metrics.name=multi_label."
        )
    targets = labels.astype(logits.dtype) if soft else jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, label_smoothing))


def sigmoid(logits: jax.Array, labels: jax.Array, label_smoothing: float) -> jax.Array:
    """Binary cross-entropy summed over the classes, for any number of labels an image (JFT).

    `[N, C]`, `[N, C]` of 0 and 1 or shares between them -> `[N]` (nats). Smoothing moves each target towards 1/2.
    """
    if labels.shape != logits.shape:
        raise UserError(
            f"loss 'sigmoid' takes a row of 0 and 1 an image, got labels of shape {labels.shape} for logits of "
            f"shape {logits.shape}; for one label an image set loss.name=softmax and metrics.name=single_label."
        )
    targets = labels.astype(logits.dtype) * (1 - label_smoothing) + label_smoothing / 2
    return jnp.sum(optax.sigmoid_binary_cross_entropy(logits, targets), axis=-1)


LOSSES = {"softmax": softmax, "sigmoid": sigmoid}


class Loss(NamedTuple):
    """A run minimises the mean of `example` over the batch plus `penalty` of the parameters."""

    example: Callable[[jax.Array, jax.Array], jax.Array]  # logits, labels -> [N], with smoothing; labels may be soft
    plain: Callable[[jax.Array, jax.Array], jax.Array]  # the same without smoothing, for evaluation
    penalty: Callable[[PyTree], jax.Array]  # params -> scalar


def create_loss(name: str, label_smoothing: float = 0.0, weight_decay: float = 0.0) -> Loss:
    """Returns the loss `name`.

    Args:
      name: 'softmax' for one label an image, 'sigmoid' for any number of labels.
      label_smoothing: share of the target that is spread over all classes (Inception V3: 0.1).
      weight_decay: factor of an L2 penalty in the loss (paper, section 4.3): `weight_decay / 2 * sum of squares` of all
        kernels, whose gradient is `weight_decay * kernel`. Unlike `optimizer.decoupled_weight_decay`, it passes through
        momentum and clipping with the rest of the gradient.

    Raises:
      UserError: unknown name, or a value out of its range.
    """
    function = lookup(LOSSES, name, "loss.name")
    check_range("loss.label_smoothing", label_smoothing, 0, 1, below=True)
    check_range("loss.weight_decay", weight_decay, 0)

    def penalty(params: PyTree) -> jax.Array:
        squares = jax.tree.map(
            lambda p, decayed: jnp.sum(jnp.square(p.astype(jnp.float32))) if decayed else 0.0,
            params,
            decay_mask(params),
        )
        return weight_decay / 2 * jax.tree.reduce(jnp.add, squares, jnp.zeros((), jnp.float32))

    return Loss(
        example=partial(function, label_smoothing=label_smoothing),
        plain=partial(function, label_smoothing=0.0),
        penalty=penalty,
    )
