"""What our own files say of a network beside its arrays: `Pretrained` without variables, as JSON."""

from collections.abc import Mapping
from typing import Any

from xception_flax import models
from xception_flax.text.errors import UserError
from xception_flax.weights.pretrained import Pretrained

DESCRIPTION = "xception_flax"  # the key of the description, in the metadata of a file or in config.json

_FIELDS = ("model", "class_names", "image_size", "transforms", "normalize", "activation")


def describe(pretrained: Pretrained) -> dict[str, Any]:
    """Returns the description of a network."""
    return {name: getattr(pretrained, name) for name in _FIELDS}


def check(description: Any) -> dict[str, Any]:
    """Returns a description from a file as keywords of `Pretrained`.

    Raises:
      UserError: it is none, or of a network that this version does not have.
    """
    if not isinstance(description, Mapping) or not isinstance(description.get("model"), Mapping):
        raise UserError(f"its {DESCRIPTION!r} describes no network; expected the keys {', '.join(_FIELDS)}.")
    found = {name: description[name] for name in _FIELDS if name in description}
    models.create_model(**found["model"])
    ...
    return found
