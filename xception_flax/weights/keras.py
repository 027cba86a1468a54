"""Converts the weights of `keras.applications.Xception` and `InceptionV3` to our variables and back, by one table.

The layers of Xception have the same names in Keras and here, except for the four residual convolutions. Keras numbers
those (`conv2d`, `conv2d_1`, ..., in older files `convolution2d_1`, ...); here they are `block2_residual` and so on.
Keras numbers all convolutions of Inception V3 in the order of their creation; here they have names.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from xception_flax.text.errors import UserError

PyTree = Any

# Our names of the layers that Keras numbers, in its order.
XCEPTION_NUMBERED = ("block2_residual", "block3_residual", "block4_residual", "block13_residual")
_MIXED_35 = ("1x1", "5x5_1", "5x5_2", "3x3dbl_1", "3x3dbl_2", "3x3dbl_3", "pool")
_REDUCE_35 = ("3x3", "3x3dbl_1", "3x3dbl_2", "3x3dbl_3")
_MIXED_17 = ("1x1", *(f"7x7_{i}" for i in (1, 2, 3)), *(f"7x7dbl_{i}" for i in (1, 2, 3, 4, 5)), "pool")
_REDUCE_17 = ("3x3_1", "3x3_2", "7x7x3_1", "7x7x3_2", "7x7x3_3", "7x7x3_4")
_MIXED_8 = ("1x1", "3x3_1", "3x3_2a", "3x3_2b", "3x3dbl_1", "3x3dbl_2", "3x3dbl_3a", "3x3dbl_3b", "pool")
INCEPTION_V3_NUMBERED = (
    *(f"stem_conv{i}" for i in (1, 2, 3, 4, 5)),
    *(f"mixed{i}_{conv}" for i in (0, 1, 2) for conv in _MIXED_35),
    *(f"mixed3_{conv}" for conv in _REDUCE_35),
    *(f"mixed{i}_{conv}" for i in (4, 5, 6, 7) for conv in _MIXED_17),
    *(f"mixed8_{conv}" for conv in _REDUCE_17),
    *(f"mixed{i}_{conv}" for i in (9, 10) for conv in _MIXED_8),
)

# Keras' names of layers that its caller gave none, with their number.
NUMBERED_CONV = r"conv(?:olution)?2d(?:_([0-9]{1,6}))?"
NUMBERED_NORM = r"batch_?normalization(?:_([0-9]{1,6}))?"


class Weight(NamedTuple):
    """One array of a Keras layer, in the order of `layer.get_weights()`."""

    collection: str  # of our variables
    path: tuple[str, ...]  # in the variables, below the layer's name
    to_flax: Callable[[np.ndarray], np.ndarray] = lambda w: w
    to_keras: Callable[[np.ndarray], np.ndarray] = lambda w: w


# A depthwise kernel is [kh, kw, C, multiplier] in Keras, and [kh, kw, 1, C * multiplier] in XLA.
_DEPTHWISE = Weight(
    "params",
    ("depthwise", "kernel"),
    to_flax=lambda w: w.reshape(*w.shape[:2], 1, -1),
    to_keras=lambda w: w.reshape(*w.shape[:2], w.shape[-1], 1),
)
_STATISTICS = (Weight("batch_stats", ("mean",)), Weight("batch_stats", ("var",)))

# Kinds of layers by the number of their arrays. In these networks only two arrays are ambiguous.
_KINDS: dict[int, tuple[Weight, ...]] = {
    1: (Weight("params", ("kernel",)),),
    3: (Weight("params", ("bias",)), *_STATISTICS),  # Inception V3's normalization, without scale
    4: (Weight("params", ("scale",)), Weight("params", ("bias",)), *_STATISTICS),
}
_SEPARABLE = (_DEPTHWISE, Weight("params", ("pointwise", "kernel")))
_DENSE = (Weight("params", ("kernel",)), Weight("params", ("bias",)))


def _weights_of(layer: str, count: int) -> tuple[Weight, ...]:
    weights = (_SEPARABLE if "sepconv" in layer else _DENSE) if count == 2 else _KINDS.get(count)
    if weights is None:
        raise UserError(f"Keras layer {layer!r} has {count} arrays; no layer of Xception or Inception V3 has so many.")
    return weights


def _our_names(keras_names: Sequence[str], variables: Mapping[str, PyTree]) -> dict[str, str]:
    """Returns our name of each Keras layer. Numbered layers are matched by rank, the order of their creation."""
    numbered = INCEPTION_V3_NUMBERED if "stem_conv1" in variables["params"] else XCEPTION_NUMBERED
    names = {name: name for name in keras_names}
    for pattern, suffix in ((NUMBERED_CONV, ""), (NUMBERED_NORM, "_bn")):
        found = sorted((int(match[1] or 0), name) for name in keras_names if (match := re.fullmatch(pattern, name)))
        if len(found) > len(numbered):
            raise UserError(f"{len(found)} Keras layers such as {found[-1][1]!r}, expected {len(numbered)}.")
        names |= {name: ours + suffix for (_, name), ours in zip(found, numbered, strict=False)}
    return names


def from_keras(layers: Iterable[tuple[str, Sequence[np.ndarray]]], template: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Returns our variables with the weights of a Keras model.

    Args:
      layers: (name, arrays) of each layer of the model, in any order:
        `[(layer.name, layer.get_weights()) for layer in model.layers]`.
      template: variables of our model, or their shapes; each is filled exactly once.

    Raises:
      UserError: a layer, an array or a shape does not match, or one of our variables is not filled. It lists up to
        ten of these.
    """
    layers = [(name, arrays) for name, arrays in layers if len(arrays)]
    names = _our_names([name for name, _ in layers], template)
    expected, variables, wrong = flatten_dict(template), {}, []
    for theirs, arrays in layers:
        for weight, array in zip(_weights_of(theirs, len(arrays)), arrays, strict=True):
            place = (weight.collection, names[theirs], *weight.path)
            array = np.asarray(array)
            if place not in expected:
                wrong.append(f"Keras layer {theirs!r}: our network has no {'/'.join(place)}.")
            elif place in variables:
                wrong.append(f"Keras layer {theirs!r}: {'/'.join(place)} is filled twice.")
            else:
                ranks = (2, 4) if place[-1] == "kernel" else (1,)
                value = variables[place] = weight.to_flax(array) if array.ndim in ranks else array
                if value.shape != expected[place].shape:
                    wrong.append(
                        f"Keras layer {theirs!r}: {'/'.join(place)} must have shape {tuple(expected[place].shape)}, "
                        f"got {value.shape}."
                    )
    if missing := expected.keys() - variables.keys():
        wrong.append(f"no Keras layer for {', '.join(sorted('/'.join(p) for p in missing)[:5])}.")
    if wrong:
        raise UserError("\n".join(wrong[:9] + ([f"and {len(wrong) - 9} more such differences."] if wrong[9:] else [])))
    return unflatten_dict(variables)


def to_keras(variables: Mapping[str, PyTree], layers: Iterable[tuple[str, int]]) -> list[list[np.ndarray]]:
    """Returns the arrays for each Keras layer, in the order of `layer.set_weights()`; the inverse of `from_keras`.

    Args:
      variables: of our model.
      layers: (name, number of arrays) of each layer that has arrays.

    Raises:
      UserError: our network does not have one of the layers, or has scales that Keras' has not.
    """
    layers, ours = list(layers), flatten_dict(variables)
    names = _our_names([name for name, _ in layers], variables)
    result = []
    for theirs, count in layers:
        arrays = []
        if count == 3 and ("params", names[theirs], "scale") in ours:
            raise UserError(
                f"Keras layer {theirs!r} has no scale; our network has one (bn_scale=True), as torch's does."
            )
        for weight in _weights_of(theirs, count):
            place = (weight.collection, names[theirs], *weight.path)
            if place not in ours:
                raise UserError(f"Keras layer {theirs!r}: our network has no {names[theirs]!r}.")
            arrays.append(weight.to_keras(np.asarray(ours[place])))
        result.append(arrays)
    return result
