"""What our own files say of a network beside its arrays: `Pretrained` without variables, as JSON."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from xception_flax import models
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import written
from xception_flax.weights import timm
from xception_flax.weights.pretrained import Pretrained
from xception_flax.weights.reader.room import DESCRIPTION
from xception_flax.weights.shapes import shapes_of


def describe(pretrained: Pretrained) -> dict[str, Any]:
    """Returns the description of a network."""
    return {
        "framework": pretrained.framework,
        "model": dict(pretrained.model),
        "channels": pretrained.channels,
        "class_names": list(pretrained.class_names),
        "class_descriptions": list(pretrained.class_descriptions),
        "image_size": pretrained.image_size,
        "transforms": pretrained.transforms,
        "normalize": pretrained.normalize and {name: list(values) for name, values in pretrained.normalize.items()},
        "activation": pretrained.activation,
        "measured": dict(pretrained.measured),
    }


def read(description: Any, arrays: Mapping[str, np.ndarray], path: Path) -> Pretrained:
    """Returns a network from a file with our description.

    Args:
      description: as `describe` returns it.
      arrays: by our names, 'params/block1_conv1/kernel', or by timm's.
      path: of the file, for messages.

    Raises:
      UserError: the description is damaged, or the arrays are not those of its network.
    """
    channels, said = checked(description, path)
    flat = flatten_dict(shapes_of(said["model"], channels))
    ours = {place: arrays[name] for place in flat if (name := "/".join(place)) in arrays}
    theirs = {name: array for name, array in arrays.items() if name.partition("/")[0] not in ("params", "batch_stats")}
    if wrong := [place for place, array in ours.items() if array.shape != flat[place].shape]:
        place = wrong[0]
        raise UserError(f"{path}: {'/'.join(place)} must have shape {flat[place].shape}, got {ours[place].shape}.")
    if unknown := arrays.keys() - theirs.keys() - {"/".join(place) for place in ours}:
        raise UserError(f"{path}: the network in its description has no place for {', '.join(sorted(unknown)[:5])}.")
    rest = unflatten_dict({place: leaf for place, leaf in flat.items() if place not in ours})
    if rest and not theirs:
        missing = sorted("/".join(place) for place in flatten_dict(rest))
        raise UserError(f"{path} has no {', '.join(missing[:5])}, which the network in its description needs.")
    if rest:
        try:
            ours |= flatten_dict(timm.from_timm(theirs, rest))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    return Pretrained(variables=unflatten_dict(ours), **said)


def checked(description: Any, path: Path) -> tuple[int, dict[str, Any]]:
    """Returns the channels of the images, and all keywords of `Pretrained` but the variables.

    Raises:
      UserError: the description is damaged, or of a network that is not here.
    """
    try:
        network = models.create_model(**description["model"])
        said = {
            "framework": str(description["framework"]),
            "model": {key: tuple(v) if isinstance(v, list) else v for key, v in description["model"].items()},
            "class_names": tuple(map(str, description["class_names"])),
            "class_descriptions": tuple(map(str, description.get("class_descriptions", ()))),  # older files lack it
            "image_size": None if description["image_size"] is None else int(description["image_size"]),
            "transforms": None if description["transforms"] is None else str(description["transforms"]),
            "normalize": description["normalize"]
            and {name: tuple(map(float, description["normalize"][name])) for name in ("mean", "std")},
            "activation": {"softmax": "softmax", "sigmoid": "sigmoid"}[description["activation"]],
            "measured": {name: _measured(name, value) for name, value in description.get("measured", {}).items()},
        }
        names, texts = (len(said[key]) for key in ("class_names", "class_descriptions"))
        if names not in (0, network.num_classes) or texts not in (0, names):
            raise ValueError(f"{names} names and {texts} descriptions of {network.num_classes} classes")
        return int(description["channels"]), said
    except UserError as error:
        raise UserError(f"{path}: its description is of a network that is not here: {error}") from None
    except (TypeError, ValueError, KeyError, AttributeError) as error:  # whatever a hand may write
        raise UserError(
            f"{path}: its description ({DESCRIPTION}) is damaged: {type(error).__name__} {error}."
        ) from None


def _measured(name: str, value: Any) -> str | float:
    """A value of what was measured; see `runs.restore.Run.measured`."""
    is_text = name in ("source", "split", "weights", "date", "version")
    if isinstance(value, bool) or not isinstance(value, str if is_text else int | float):
        raise TypeError(
            f"{name} in what was measured is {written(value)}; expected a {'text' if is_text else 'number'}"
        )
    return value
