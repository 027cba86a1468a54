"""The weights of `keras.applications.Xception` as variables of ours, and back: one table, both ways.

Layers have the same names on both sides, but for the four residual convolutions: Keras numbers
them by itself (`conv2d`, `conv2d_1`, ..., in older files `convolution2d_1`, ...), here they are
`block2_residual` and so on.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

PyTree = Any

RESIDUAL_BLOCKS = ("block2_residual", "block3_residual", "block4_residual", "block13_residual")

_RESIDUAL_CONV = re.compile(r"conv(olution)?2d(_\d+)?$")
_RESIDUAL_NORM = re.compile(r"batch_?normalization(_\d+)?$")


class Weight(NamedTuple):
    """One array of a Keras layer, in the order of `layer.get_weights()`."""

    collection: str  # of our variables
    path: tuple[str, ...]  # below the layer's name
    to_flax: Callable[[np.ndarray], np.ndarray] = lambda w: w
    to_keras: Callable[[np.ndarray], np.ndarray] = lambda w: w


# Keras keeps a depthwise kernel as [kh, kw, C, multiplier], XLA as [kh, kw, 1, C * multiplier].
_DEPTHWISE = Weight(
    "params",
    ("depthwise", "kernel"),
    to_flax=lambda w: w.reshape(*w.shape[:2], 1, -1),
    to_keras=lambda w: w.reshape(*w.shape[:2], w.shape[-1], 1),
)

# Kinds of layers by the number of their arrays, which is unambiguous in this network.
_KINDS: dict[int, tuple[Weight, ...]] = {
    1: (Weight("params", ("kernel",)),),
    4: (
        Weight("params", ("scale",)),
        Weight("params", ("bias",)),
        Weight("batch_stats", ("mean",)),
        Weight("batch_stats", ("var",)),
    ),
}
_SEPARABLE = (_DEPTHWISE, Weight("params", ("pointwise", "kernel")))
_DENSE = (Weight("params", ("kernel",)), Weight("params", ("bias",)))


def _weights_of(layer: str, count: int) -> tuple[Weight, ...]:
    weights = (_SEPARABLE if "sepconv" in layer else _DENSE) if count == 2 else _KINDS.get(count)
    if weights is None:
        raise ValueError(f"Keras layer {layer!r} has {count} arrays; no layer of Xception has so many.")
    return weights


def _our_names(keras_names: Sequence[str]) -> list[str]:
    convolutions, norms = iter(RESIDUAL_BLOCKS), iter(RESIDUAL_BLOCKS)
    names = []
    for name in keras_names:
        try:
            if _RESIDUAL_CONV.match(name):
                name = next(convolutions)
            elif _RESIDUAL_NORM.match(name):
                name = next(norms) + "_bn"
        except StopIteration:
            raise ValueError(f"Keras layer {name!r}: more than {len(RESIDUAL_BLOCKS)} residual layers.") from None
        names.append(name)
    return names


def from_keras(layers: Iterable[tuple[str, Sequence[np.ndarray]]], template: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Returns our variables with the weights of a Keras model.

    Args:
      layers: (name, arrays) of each layer in the model's order:
        `[(layer.name, layer.get_weights()) for layer in model.layers]`.
      template: variables of our model, or their shapes: what must be filled, each exactly once.

    Raises:
      ValueError: a layer, array or shape that does not match, or one of ours that stays without.
    """
    layers = [(name, arrays) for name, arrays in layers if len(arrays)]
    variables: dict[str, PyTree] = {}
    for ours, (theirs, arrays) in zip(_our_names([name for name, _ in layers]), layers, strict=True):
        for weight, array in zip(_weights_of(theirs, len(arrays)), arrays, strict=True):
            place = (weight.collection, ours, *weight.path)
            expected = _get(template, place)
            if expected is None:
                raise ValueError(f"Keras layer {theirs!r}: our network has no {'/'.join(place)}.")
            value = weight.to_flax(np.asarray(array))
            if value.shape != expected.shape:
                raise ValueError(
                    f"Keras layer {theirs!r}: {'/'.join(place)} must have shape {tuple(expected.shape)}, "
                    f"got {value.shape}."
                )
            _set(variables, place, value)
    if missing := set(_paths(template)) - set(_paths(variables)):
        raise ValueError(f"no Keras layer for {', '.join(sorted('/'.join(p) for p in missing)[:5])}.")
    return variables


def to_keras(variables: Mapping[str, PyTree], layers: Iterable[tuple[str, int]]) -> list[list[np.ndarray]]:
    """Returns the arrays for each Keras layer, in the order of `layer.set_weights()`; the inverse of `from_keras`.

    Args:
      variables: of our model.
      layers: (name, number of arrays) of each layer that has arrays, in the model's order.

    Raises:
      ValueError: a layer that our network does not have.
    """
    layers = list(layers)
    result = []
    for ours, (theirs, count) in zip(_our_names([name for name, _ in layers]), layers, strict=True):
        arrays = []
        for weight in _weights_of(theirs, count):
            value = _get(variables, (weight.collection, ours, *weight.path))
            if value is None:
                raise ValueError(f"Keras layer {theirs!r}: our network has no {ours!r}.")
            arrays.append(weight.to_keras(np.asarray(value)))
        result.append(arrays)
    return result


def _get(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        if not isinstance(tree, Mapping) or key not in tree:
            return None
        tree = tree[key]
    return tree


def _set(tree: dict[str, Any], path: tuple[str, ...], value: np.ndarray) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    if path[-1] in tree:
        raise ValueError(f"{'/'.join(path)} is filled twice.")
    tree[path[-1]] = value


def _paths(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(tree, Mapping):
        return [path]
    return [p for key, value in tree.items() for p in _paths(value, (*path, key))]
