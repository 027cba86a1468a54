"""What our own files say of a network beside its arrays: `Pretrained` without variables, as JSON."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from xception_flax import models
from xception_flax.data.decoding import ORIENTATIONS, WHITE
from xception_flax.data.transforms.geometry import MAX_SIDE
from xception_flax.text import sizes
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import cut, written
from xception_flax.text.naming import repeated, shown
from xception_flax.text.ranges import check_number, check_range
from xception_flax.text.sizes import ImageSize
from xception_flax.training.metrics import SHARES
from xception_flax.weights import timm
from xception_flax.weights.pretrained import Pretrained
from xception_flax.weights.reader.room import DESCRIPTION
from xception_flax.weights.shapes import shapes_of

MAX_CHANNELS = 4  # of an image
LARGEST_COUNT = 2**63 - 1  # of images and steps
MAX_REASON = 500  # letters of what is wrong

# Keys that files of every version have.
_REQUIRED = ("framework", "channels", "class_names", "image_size", "transforms", "normalize", "activation")


def describe(pretrained: Pretrained) -> dict[str, Any]:
    """Returns the description of a network."""
    size = pretrained.image_size
    return {
        "framework": pretrained.framework,
        "model": dict(pretrained.model),
        "channels": pretrained.channels,
        "class_names": list(pretrained.class_names),
        "class_descriptions": list(pretrained.class_descriptions),
        "image_size": list(size) if isinstance(size, tuple) else size,
        "transforms": pretrained.transforms,
        "normalize": pretrained.normalize and {name: list(values) for name, values in pretrained.normalize.items()},
        "min_decoded_side": pretrained.min_decoded_side,
        "max_value": pretrained.max_value,
        "orientation": pretrained.orientation,
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
        names = ", ".join(cut(shown(name)) for name in sorted(unknown)[:5])
        raise UserError(f"{path}: the network in its description has no place for {names}.")
    rest = unflatten_dict({place: leaf for place, leaf in flat.items() if place not in ours})
    if rest and not theirs:
        missing = sorted("/".join(place) for place in flatten_dict(rest))
        raise UserError(f"{path} has no {', '.join(missing[:5])}, which the network in its description needs.")
    if rest:
        try:
            ours |= flatten_dict(timm.from_timm(theirs, rest))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    return Pretrained(variables=unflatten_dict(ours), channels=channels, **said)


def checked(description: Any, path: Path) -> tuple[int, dict[str, Any]]:
    """Returns the channels of the images, and all other keywords of `Pretrained` but the variables.

    Raises:
      UserError: the description is damaged, or of a network that is not here.
    """
    try:
        network = models.create_model(**description["model"])
    except UserError as error:
        raise UserError(f"{path}: its description is of a network that is not here: {error}") from None
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:  # whatever a hand may write
        raise _damaged(path, error) from None
    try:
        if missing := [key for key in _REQUIRED if key not in description]:
            raise ValueError(f"it has no {', '.join(missing)}")
        found = partial(_found, description)
        channels = found("channels", int)
        check_range("channels", channels, 1, MAX_CHANNELS)
        said = {
            "framework": found("framework", str),
            "model": {key: tuple(v) if isinstance(v, list) else v for key, v in description["model"].items()},
            "class_names": _texts("class_names", found("class_names", list)),
            "class_descriptions": _texts("class_descriptions", found("class_descriptions", list, [])),
            "image_size": _image_size(description["image_size"]),
            "transforms": found("transforms", str, None),
            "normalize": _normalize(found("normalize", dict, None), channels),
            "min_decoded_side": found("min_decoded_side", int, 0),
            "max_value": found("max_value", int, None),
            "orientation": found("orientation", str, "ignore"),
            "activation": found("activation", str),
            "measured": {name: _measured(name, value) for name, value in found("measured", dict, {}).items()},
        }
        for name, low, high in [
            ("min_decoded_side", 0, MAX_SIDE),
            ("max_value", 255, WHITE),
        ]:
            if said[name] is not None:
                check_range(name, said[name], low, high)
        if said["orientation"] not in ORIENTATIONS:
            raise ValueError(f"orientation must be 'ignore' or 'apply', got {written(said['orientation'])}")
        if said["activation"] not in ("softmax", "sigmoid"):
            raise ValueError(f"activation must be 'softmax' or 'sigmoid', got {written(said['activation'])}")
        names, texts = (len(said[key]) for key in ("class_names", "class_descriptions"))
        if names not in (0, network.num_classes) or texts not in (0, names):
            raise ValueError(
                f"class_names are {names} and class_descriptions {texts}, of {network.num_classes} classes"
            )
        if (twice := repeated(said["class_names"])) is not None:
            raise ValueError(f"class_names has {written(twice)} twice; expected a name of its own for each class")
    except ValueError as error:  # of `UserError` too
        raise _damaged(path, error) from None
    return channels, said


def _damaged(path: Path, error: Exception) -> UserError:
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__} "
    return UserError(
        f"{path}: its description ({DESCRIPTION}) is damaged: {kind}{str(error).rstrip('.')[:MAX_REASON]}."
    )


_KINDS = {int: "an integer", str: "a text", list: "a list", dict: "names and values"}


def _found(description: Mapping[str, Any], key: str, kind: type, *default: Any) -> Any:
    """The value of a key, of exactly this type; the default where there is none, and what the default is too."""
    value = description.get(key, *default)
    if type(value) is not kind and not (value is None and default == (None,)):
        none = " or null" if default == (None,) else ""
        raise ValueError(f"{key} must be {_KINDS[kind]}{none}, got {written(value)}")
    return value


def _image_size(value: Any) -> ImageSize | None:
    """A number of pixels or `[height, width]`, in the normal form."""
    if value is None:
        return None
    if isinstance(value, str) or not sizes.fits(value):
        raise ValueError(f"image_size must be an integer, [height, width] or null, got {written(value)}")
    sizes.check_size("image_size", value, MAX_SIDE)
    return sizes.normal(value)


def _texts(key: str, values: list[Any]) -> tuple[str, ...]:
    if wrong := [value for value in values if not isinstance(value, str)]:
        raise ValueError(f"{key} must be texts, got {written(wrong[0])}")
    return tuple(values)


def _normalize(values: dict[str, Any] | None, channels: int) -> dict[str, tuple[float, ...]] | None:
    """`mean` and `std`: a number a channel, or one for all."""
    if values is None:
        return None
    for name in ("mean", "std"):
        numbers = _found(values, name, list)
        if len(numbers) not in (1, channels) or not all(type(number) in (int, float) for number in numbers):
            raise ValueError(f"{name} of normalize must be a number a channel, or one for all, got {written(numbers)}")
        for number in numbers:
            check_number(f"{name} of normalize", number)
            if name == "std":
                check_range("std of normalize", number, 0, above=True)
    return {name: tuple(map(float, values[name])) for name in ("mean", "std")}


def _measured(name: str, value: Any) -> str | float:
    """A value of what was measured; see `runs.restore.Run.measured`."""
    if name in ("source", "split", "weights", "date", "version"):
        kinds, expected = (str,), "a text"
    elif name in ("count", "step"):
        kinds, expected = (int,), "an integer"
    else:
        kinds, expected = (int, float), "a number"
    if type(value) not in kinds:
        raise ValueError(f"{name} in what was measured is {written(value)}; expected {expected}")
    if not isinstance(value, str):
        check_number(f"{name} in what was measured", value)
        if name in SHARES or name in ("count", "step"):
            check_range(f"{name} in what was measured", value, 0, 1 if name in SHARES else LARGEST_COUNT)
    return value
