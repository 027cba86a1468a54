"""The networks, by name."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from xception_flax.lookup import lookup, suggest
from xception_flax.models.xception import Xception

MODELS: dict[str, Callable[..., nn.Module]] = {
    "xception": Xception,
}


def create_model(name: str, num_classes: int = 1000, **fields: object) -> nn.Module:
    """Returns the network `name` as a linen module.

    Args:
      name: a key of `MODELS`.
      num_classes: width of the logits.
      **fields: the network's own attributes, such as `width`; types such as `dtype` may be given by
        name ('bfloat16').

    Raises:
      ValueError: unknown name or attribute, or a value out of its range.
    """
    constructor = lookup(MODELS, name, "model")
    known = {f.name for f in dataclasses.fields(constructor)} - {"parent", "name"}
    for field in fields:
        if field not in known:
            raise ValueError(f"model {name!r} has no attribute {field!r}; {suggest(field, known)}")
    for field in ("dtype", "param_dtype"):
        if field in fields:
            fields[field] = _float_type(field, fields[field])
    return constructor(num_classes=num_classes, **fields)


def _float_type(field: str, value: object) -> jnp.dtype:
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"model.{field} must be a floating-point type such as 'bfloat16', got {value!r}.")
    return dtype
