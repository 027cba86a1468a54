"""What the shapes of a network's arrays say of its fields, and the fields of its arrays' shapes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xception_flax.models import create_model

SIZE = 96  # pixels a side of images that every network takes
AUXILIARY_SIZE = 299  # and that the auxiliary tower of Inception V3 takes


def shapes_of(model: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """Returns the shapes of a network's variables.

    Args:
      model: keywords of `models.create_model`.
      channels: of the images.

    Raises:
      UserError: a field is unknown or out of its range.
    """
    network = create_model(**model)
    size = AUXILIARY_SIZE if model.get("auxiliary") else SIZE
    images = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    return dict(jax.eval_shape(lambda x: network.init(jax.random.key(0), x, train=False), images))


def width_fields(widths: Iterable[tuple[int, int]], multiples: Sequence[int] = (8,)) -> dict[str, Any]:
    """Returns the fields `width` and `width_multiple` that make layers as wide as they are.

    Of all widths that do, it is one of the fewest decimals.

    Args:
      widths: of each layer: its channels in the network of width 1, and those that it has.
      multiples: of the channels, one of which may be the network's; 8 is every network's own.

    Returns:
      no fields where `width` is 1, or where no width makes these layers.
    """
    widths = set(widths)
    if all(plain == there for plain, there in widths):
        return {}
    for multiple in multiples:
        # Rounded to a multiple, and at least one of them.
        lower = max((there - multiple / 2) / plain if there > multiple else 0 for plain, there in widths)
        upper = min((there + multiple / 2) / plain for plain, there in widths)
        if any(there % multiple or not there for _, there in widths) or lower >= upper:
            continue
        rounded = (round((lower + upper) / 2, digits) for digits in range(1, 18))
        width = next((value for value in rounded if lower < value < upper), (lower + upper) / 2)
        return {"width": width} | ({"width_multiple": multiple} if multiple != 8 else {})
    return {}
