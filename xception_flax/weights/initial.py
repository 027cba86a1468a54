"""What a run begins with: random values, or the weights of another network, from `source`.

Every array of the network must be there with its shape, and the recipe must compute with it what it was trained for.
The classifier alone may differ, and then stays random.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from xception_flax import models
from xception_flax.runs.restore import Run
from xception_flax.text.counting import counted
from xception_flax.text.errors import UserError
from xception_flax.text.ranges import check_range
from xception_flax.training import recalibration, state
from xception_flax.weights.channels import adapt_channels, add_alpha
from xception_flax.weights.pretrained import formula
from xception_flax.weights.source import open_source

Place = tuple[str, ...]  # of an array: ('params', 'predictions', 'kernel')

# Fields of a network with which the same weights are as good.
FREE_FIELDS = {
    *("num_classes", "dropout_rate", "bn_decay", "bn_frozen", "output_stride", "auxiliary"),
    *("remat", "dtype", "param_dtype", "parent", "name"),
}
# Fields that decide nothing but names and shapes of arrays, which are compared anyway.
SHAPE_FIELDS = {"width", "width_multiple", "middle_repeats", "entry_flow", "fc_layers"}

RGBA = 4  # channels of images with alpha

MAX_LISTED = 10  # arrays that differ, in a message


class Initial(NamedTuple):
    """Weights to begin with.

    Attributes:
      arrays: by place, each where it belongs on the devices; what `state.make_init`'s `init` takes.
      random: places in the network that the weights have no array for: the classifier's, or all.
      origin: what the weights are, as JSON.
      notes: what is to be known about their use, in words.
    """

    arrays: dict[Place, jax.Array]
    random: tuple[Place, ...]
    origin: dict[str, Any]
    notes: tuple[str, ...] = ()

    def meta(self) -> dict[str, Any]:
        """Returns what a checkpoint remembers of it."""
        return self.origin | {"arrays": len(self.arrays), "random": ["/".join(place) for place in self.random]}

    def __str__(self) -> str:
        origin = ", ".join(f"{key} {value}" for key, value in self.origin.items())
        random = ", ".join("/".join(place) for place in self.random) or "none"
        notes = "".join(f"; {note}" for note in self.notes)
        return f"initial weights: {len(self.arrays)} arrays of {origin}{notes}; left random: {random}"


def load(
    weights: str,
    checkpoint: str,
    bn_batches: int = 0,
    *,
    model: nn.Module,
    image_shape: tuple[int, int, int],
    mesh: Mesh,
    class_names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
) -> Initial:
    """Returns the weights that a run begins with.

    Args:
      weights: as in `recipes.groups.Init`.
      checkpoint: the same.
      bn_batches: the same; only checked here.
      model: the network that takes them.
      image_shape: `(H, W, C)` of one image.
      mesh: where they go.
      class_names: what the logits stand for.
      mean, std: the recipe's normalization, on the scale 0 to 255. Compared with what the weights are for where that
        is known, else believed.

    Raises:
      UserError: there are no such weights. An array is missing, superfluous, not finite or of another shape, except in
        the classifier, where it stays random if its classes are others. Or the recipe has the network compute something
        else than the weights are for.
    """
    shapes = flatten_dict(state.abstract_variables(model, image_shape, mesh))
    check_range("init.bn_batches (0: off)", bn_batches, 0, recalibration.MAX_BATCHES)
    if bn_batches and not getattr(model, "bn_frozen", False):  # training would average the new statistics away
        has_field = hasattr(model, "bn_frozen")
        hint = "set model.bn_frozen=True" if has_field else f"{type(model).__name__} has no such field; leave it out"
        raise UserError(f"init.bn_batches={bn_batches} computes statistics that stay; {hint}.")
    if weights == "random":
        return Initial({}, tuple(shapes), {"weights": "random"})
    source = f"keras:{_network_name(model)}" if weights == "keras" else weights
    try:
        found = open_source(source, mesh, checkpoint)
    except UserError as error:
        raise UserError(f"init.weights: {error}") from None
    notes = []
    if isinstance(found, Run):
        theirs, normalize, skipped = found.model, found.recipe.normalize, FREE_FIELDS
        had = found.recipe.data.channels
        origin = {"workdir": str(Path(weights).expanduser().absolute()), "step": found.step, "weights": found.weights}
    else:
        theirs, normalize, skipped = models.create_model(**found.model), found.normalize, FREE_FIELDS | SHAPE_FIELDS
        had, origin = found.channels, dict(found.origin)
        notes += [f"without {part}" for part in found.left_out]
        if normalize is None:
            notes.append(f"taken to be for images as {formula(mean, std)}")
    values = flatten_dict(found.variables)
    ours = {"mean": mean, "std": std}
    if normalize is not None and image_shape[-1] == RGBA and had < RGBA:
        # Of alpha the weights know nothing; its normalization is the recipe's.
        normalize = {name: (*_each(normalize[name], RGBA - 1), ours[name][-1]) for name in ours}
    _check_settings(source, theirs, model, skipped, normalize, ours)
    values, note = _for_channels(values, shapes, had, image_shape[-1])
    notes += note
    same_classes = len(found.class_names) == 0 or tuple(found.class_names) == tuple(class_names)
    values = _without_other_classifier(values, shapes, same_classes)
    _check_shapes(source, values, shapes)
    _check_finite(source, values, shapes)
    arrays = {place: _placed(value, shapes[place].sharding) for place, value in values.items()}
    return Initial(arrays, tuple(place for place in shapes if place not in arrays), origin, tuple(notes))


# What is no array ----------------------------------------------------------------------------------


def _network_name(model: nn.Module) -> str:
    """The name of a network in `models.MODELS`, of those with one class for one name."""
    return next((name for name, entry in models.MODELS.items() if type(model) is entry), type(model).__name__)


def _check_settings(
    source: str,
    theirs: nn.Module,
    ours: nn.Module,
    skipped: Collection[str],
    wanted: Mapping[str, Sequence[float]] | None,
    normalize: Mapping[str, Sequence[float]],
) -> None:
    """Raises UserError where the recipe has other fields, or another normalization, than the weights are for.

    Args:
      theirs, ours: the network of the weights, and of the recipe.
      skipped: fields that are not compared.
      wanted, normalize: the normalization of the weights, None where it is not known, and of the recipe.
    """
    if type(theirs) is not type(ours):
        raise UserError(
            f"{source} has weights of {type(theirs).__name__}, and this recipe is of {type(ours).__name__}; "
            "set model.name."
        )
    names = sorted({field.name for field in dataclasses.fields(theirs)} - set(skipped))
    fields = {name: (getattr(theirs, name), getattr(ours, name)) for name in names}
    wrong = {f"model.{name}": value for name, (value, own) in fields.items() if _plain(value) != _plain(own)}
    for name, values in (wanted or {}).items():
        count = max(len(values), len(normalize[name]))  # a value a channel, or one for all
        if _each(values, count) != _each(normalize[name], count):
            wrong[f"normalize.{name}"] = tuple(values)
    if wrong:
        settings = " ".join(f"--config.{key}={value}" for key, value in wrong.items())
        raise UserError(f"the weights of {source} are for another setting of this recipe; set {settings}")


def _each(values: Sequence[float], count: int) -> tuple[float, ...]:
    """Returns a value for each of `count` channels, of one for all; others as they are."""
    return tuple(values) * count if len(values) == 1 else tuple(values)


def _plain(value: Any) -> Any:
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


# Arrays --------------------------------------------------------------------------------------------


def _for_channels(
    values: dict[Place, Any], shapes: Mapping[Place, Any], had: int, channels: int
) -> tuple[dict[Place, Any], list[str]]:
    """Returns the arrays, which are for images of `had` channels, for `channels`, and what was done, in words.

    Those of another number are the kernels that meet the images, whatever their names.
    """

    def meets_images(place: Place) -> bool:
        return place in shapes and [tree[place].shape[2:3] for tree in (values, shapes)] == [(had,), (channels,)]

    first = [place for place in values if had != channels and place[-1] == "kernel" and meets_images(place)]
    if not first:
        return values, []
    adapt, note = partial(adapt_channels, channels=channels), f"for {had} channels, adapted to {channels}"
    if channels == RGBA and had < RGBA:
        adapt = add_alpha
        note = f"for {counted(had, 'channel')}, extended to {channels} by zeros for alpha"
    return values | {place: adapt(np.asarray(values[place])) for place in first}, [f"its first kernel, {note}"]


def _without_other_classifier(
    values: dict[Place, Any], shapes: Mapping[Place, Any], same_classes: bool
) -> dict[Place, Any]:
    """Leaves out what would stand for other classes, and hidden layers in front of it that the recipe has not."""
    bias = ("params", "predictions", "bias")
    if not same_classes or getattr(values.get(bias), "shape", None) != getattr(shapes.get(bias), "shape", None):
        values = {place: value for place, value in values.items() if place[1] != "predictions"}
    hidden = [place for place in values.keys() | shapes.keys() if re.fullmatch("fc[0-9]+", place[1])]
    if any(
        place not in values or place not in shapes or values[place].shape != shapes[place].shape for place in hidden
    ):
        values = {p: value for p, value in values.items() if p not in hidden and p[1] != "predictions"}
    return values


def _check_shapes(source: str, values: Mapping[Place, Any], shapes: Mapping[Place, Any]) -> None:
    """Raises UserError where an array other than the classifier's is missing, superfluous or of another shape."""
    head = re.compile("fc[0-9]+|predictions|auxiliary.*")
    wrong = []
    for place in sorted(values.keys() | shapes.keys()):
        theirs, ours = (tuple(tree[place].shape) if place in tree else None for tree in (values, shapes))
        if theirs != ours and not (theirs is None and head.fullmatch(place[1])):
            wrong.append(f"{'/'.join(place)}: {theirs or 'none'} there, {ours or 'none'} in the network of this recipe")
    if wrong:
        more = f"\n  and {len(wrong) - MAX_LISTED} more" if len(wrong) > MAX_LISTED else ""
        raise UserError(
            f"the weights of {source} do not fit the network of this recipe (model.*, data.channels):\n  "
            + "\n  ".join(wrong[:MAX_LISTED])
            + more
        )


def _check_finite(source: str, values: Mapping[Place, Any], shapes: Mapping[Place, Any]) -> None:
    """Raises UserError where an array of a file has a NaN or an infinity once it is of the network's type."""
    for place, value in values.items():
        if isinstance(value, jax.Array):  # of a run, which checks that before it saves
            continue
        dtype = shapes[place].dtype
        with np.errstate(over="ignore"):
            finite = np.isfinite(value.astype(dtype)).all()
        if not finite:
            raise UserError(
                f"{source}: values of {'/'.join(place)} are not finite (in {dtype}); take another file of weights."
            )


def _placed(value: np.ndarray | jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
    if isinstance(value, jax.Array):  # a checkpoint is read to where it belongs
        return value
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
