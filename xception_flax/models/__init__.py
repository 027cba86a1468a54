"""The networks, by name."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from xception_flax.models.aligned import ENTRY_FLOW, ENTRY_FLOW_71, AlignedXception
from xception_flax.models.inception_v3 import InceptionV3
from xception_flax.models.lenet import LeNet
from xception_flax.models.towers import XceptionTowers
from xception_flax.models.xception import Xception
from xception_flax.text import values
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import lookup, suggest, written

#: The networks by name, for `model.name` of a recipe.
MODELS: dict[str, Callable[..., nn.Module]] = {
    "xception": Xception,
    "xception_towers": XceptionTowers,
    "inception_v3": InceptionV3,
    # DeepLab's, and timm's with pre-activation; the epsilons are timm's.
    "xception41": partial(AlignedXception, entry_flow=ENTRY_FLOW, middle_repeats=8),
    "xception65": partial(AlignedXception, entry_flow=ENTRY_FLOW, middle_repeats=16),
    "xception71": partial(AlignedXception, entry_flow=ENTRY_FLOW_71, middle_repeats=16),
    "xception41p": partial(
        AlignedXception, entry_flow=ENTRY_FLOW, middle_repeats=8, preactivation=True, bn_epsilon=1e-5
    ),
    "xception65p": partial(AlignedXception, entry_flow=ENTRY_FLOW, middle_repeats=16, preactivation=True),
    "lenet": LeNet,
}

# JAX has no convolutions of its other floating-point types, which have 8 bits or less.
FLOAT_TYPES = tuple(map(jnp.dtype, ("bfloat16", "float16", "float32", "float64")))


_WEIGHTS = "xception_flax.load('keras:xception') fetches a network with its weights, in a recipe init.weights"

# What other libraries call it, timm above all, and how it is had here.
ELSEWHERE = {
    "pretrained": _WEIGHTS,
    "weights": _WEIGHTS,
    "in_chans": "the first layer takes as many channels as the images have",
    "features_only": "model.apply(..., method='endpoints') returns the features of all stages",
    "include_top": "num_classes=0 leaves the classifier out",
    "classes": "it is num_classes",
    "drop_rate": "it is dropout_rate",
    "input_shape": "the network takes images of any size and number of channels",
}


class _NoFields(nn.Module):
    pass


# 'parent' and 'name': every linen module takes them, and they are not fields of the network.
NO_FIELDS = frozenset(inspect.signature(_NoFields).parameters)


def create_model(name: str, num_classes: int = 1000, **fields: object) -> nn.Module:
    """Returns the network `name` as a linen module.

    Args:
      name: a key of `MODELS`.
      num_classes: width of the logits; 0 for a backbone without classifier, in a recipe -1 for the classes that the
        training data have.
      **fields: the network's own attributes, such as `width`; types such as `dtype` may be given by
        name ('bfloat16').

    Raises:
      UserError: an unknown name or attribute, or a value out of its range.

    Example:
      >>> import jax
      >>> from xception_flax import create_model
      >>> model = create_model("xception", num_classes=10, width=0.05, middle_repeats=0)
      >>> images = jax.numpy.zeros([2, 71, 71, 3])
      >>> variables = model.init(jax.random.key(0), images, train=False)
      >>> model.apply(variables, images, train=False).shape
      (2, 10)
    """
    constructor = lookup(MODELS, name, "model")
    signature = inspect.signature(constructor).parameters
    known = signature.keys() - NO_FIELDS
    for field, value in {"num_classes": num_classes, **fields}.items():
        if field not in known:
            hint = ELSEWHERE.get(field) or suggest(field, known)
            raise UserError(f"model {name!r} has no attribute {written(field)}; {hint}")
        kind = signature[field].annotation
        if field in ("dtype", "param_dtype"):
            fields[field] = _float_type(field, value)
        # Numbers and sequences of other libraries stay as they are.
        elif isinstance(value, str | bool | int | float | None) and not values.fits(value, kind):
            raise UserError(f"model.{field} must be {values.describe(kind)}, got {written(value)}.")
    return constructor(num_classes=num_classes, **fields)


def _float_type(field: str, value: Any) -> jnp.dtype:
    try:
        dtype = jnp.dtype(value)
    except (TypeError, ValueError, SyntaxError):  # NumPy parses some texts as a list of fields
        dtype = None
    if dtype is None or dtype not in FLOAT_TYPES:  # NumPy takes None for float64
        raise UserError(f"model.{field} must be one of {', '.join(map(str, FLOAT_TYPES))}, got {written(value)}.")
    return dtype
