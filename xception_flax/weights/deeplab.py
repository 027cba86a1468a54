"""Finds DeepLab's Xception 41, 65 or 71 among the arrays of a checkpoint of TensorFlow, by one table of its names.

(tensorflow/models, `research/deeplab/core/xception.py`.) These are the networks that timm's of these names were
converted from. A checkpoint of classification has the scopes `xception_65/...` and `xception_65/logits`; one of
segmentation has the backbone in the same scope, and ASPP, decoder and logits beside it.

Its images are in [-1, 1]. ImageNet's classes are 1,001 there, with the background as class 0.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from xception_flax.text.errors import UserError
from xception_flax.text.lookup import cut
from xception_flax.text.naming import shown
from xception_flax.weights import reading
from xception_flax.weights.left_out import listed, modules
from xception_flax.weights.pretrained import Pretrained
from xception_flax.weights.reader.tensorflow import AVERAGE
from xception_flax.weights.shapes import shapes_of, width_fields

Arrays = Mapping[str, np.ndarray]

NORMALIZE = {"mean": (127.5,), "std": (127.5,)}  # [-1, 1]: DeepLab's `_preprocess_zero_mean_unit_range`
MAX_LINES = 10  # of a message about arrays that do not fit

_FIRST = "entry_flow/conv1_1/weights"
_STATISTICS = ("/moving_mean", "/moving_variance")
_MARK = re.compile(rf"(?P<scope>|.*/){_FIRST}")

# By the blocks of the entry flow and those of the middle flow.
_DEPTHS = {(3, 8): "xception41", (3, 16): "xception65", (5, 16): "xception71"}
_ENTRY_BLOCKS = {name: entry for (entry, _), name in _DEPTHS.items()}

_LEAVES = {
    "kernel": "weights",
    "bias": "biases",
    **{"scale": "BatchNorm/gamma", "mean": "BatchNorm/moving_mean", "var": "BatchNorm/moving_variance"},
}


def recognize(arrays: Arrays, path: Path) -> Pretrained:
    """Returns the network in a checkpoint, and what is known of its use.

    Of a weight that has an average the average is taken, as by TensorFlow's `variables_to_restore`; 'weights' of
    `origin` says of which. What optimizers keep of an array is behind its name, and is no weight.

    Args:
      arrays: by name, `'xception_65/entry_flow/conv1_1/weights'`.
      path: of the file, for messages.

    Raises:
      UserError: there is no network that is known here, or more than one, or a part of one, or arrays of other shapes.
    """
    scopes = [match["scope"] for name, array in arrays.items() if array.ndim == 4 and (match := _MARK.fullmatch(name))]
    if not scopes and any(name.endswith("/.ATTRIBUTES/VARIABLE_VALUE") for name in arrays):
        raise UserError(f"{path} is a checkpoint of Keras in TensorFlow's format; {reading.REWRITE_KERAS}.")
    if not scopes:
        raise UserError(
            f"{path} has no network that is known here; expected the arrays of DeepLab's xception_41, xception_65 or "
            f"xception_71, such as xception_65/{_FIRST}; it has {listed(arrays) or 'no arrays'}."
        )
    if len(scopes) > 1:
        raise UserError(f"{path} has {len(scopes)} networks, in the scopes {listed(scopes)}; expected one.")
    scope = scopes[0]
    weights = {name: array for name, array in arrays.items() if not _is_slot(name, arrays)}
    inside = {name.removeprefix(scope): array for name, array in weights.items() if name.startswith(scope)}
    averages = {name: array for name in inside if (array := arrays.get(f"{scope}{name}{AVERAGE}")) is not None}
    try:
        network = _network(inside | averages)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    outside = [name for name in weights if not name.startswith(scope)]
    origin = {"architecture": scope.rstrip("/").rpartition("/")[2] or network.model["name"], "scope": scope}
    if averages:
        # Moving statistics are averages themselves, and most trainings keep none of them.
        others = [name for name in inside.keys() - averages.keys() if not name.endswith(_STATISTICS)]
        part = f" of {len(averages)} of {len(inside)} arrays: {listed(averages)}" if others else ""
        origin["weights"] = AVERAGE.strip("/") + part
    return network._replace(origin=origin, left_out=tuple(modules(outside, "/")))


def _is_slot(name: str, arrays: Arrays) -> bool:
    """Whether it is kept for another array, as momentum or average, or for an optimizer as a whole."""
    return name.rpartition("/")[0] in arrays or (arrays[name].ndim == 0 and "/" not in name)


def _network(arrays: Arrays) -> Pretrained:
    """Returns the network whose arrays these are, by their names in its scope.

    Raises:
      UserError: what is missing, superfluous or of another shape.
    """
    name = _architecture(arrays)
    if not (kernel := arrays[_FIRST]).size:
        raise UserError(f"by its names it is {name} of DeepLab; {_FIRST} has the shape {kernel.shape}.")
    channels, num_classes = kernel.shape[2], len(arrays.get("logits/biases", np.zeros(0)).reshape(-1))
    model: dict[str, Any] = {"name": name, "num_classes": num_classes}
    template = shapes_of(model, channels)
    names = deeplab_names(template, name)
    widths = [
        (leaf.shape[-1], arrays[names[place]].shape[-1])
        for place, leaf in flatten_dict(template).items()
        if names[place].endswith("/weights") and place[1] != "predictions" and np.ndim(arrays.get(names[place])) == 4
    ]
    if width := width_fields(widths, multiples=(8, 1)):
        template = shapes_of(model := model | width, channels)
    return Pretrained(
        "deeplab",
        model,
        from_deeplab(arrays, template, name),
        channels,
        normalize=NORMALIZE,
        activation="sigmoid" if num_classes == 1 else "softmax",
    )


def _architecture(arrays: Arrays) -> str:
    """Returns our name of the network."""
    entry = {match[1] for name in arrays if (match := re.match(r"entry_flow/block(\d+)/", name))}
    middle = {match[1] for name in arrays if (match := re.match(r"middle_flow/block1/unit_(\d+)/", name))}
    if any(name.endswith("/pointwise_weights") for name in arrays):
        raise UserError(
            "it is Xception of DeepLab without normalization after depthwise convolutions (regularize_depthwise=True), "
            "which none here has."
        )
    try:
        return _DEPTHS[len(entry), len(middle)]
    except KeyError:
        known = ", ".join(f"{' and '.join(map(str, depths))} in {name}" for depths, name in _DEPTHS.items())
        raise UserError(
            f"it has {len(entry)} blocks in its entry flow and {len(middle)} in its middle flow; there are {known}."
        ) from None


def deeplab_names(template: Mapping[str, Any], name: str) -> dict[tuple[str, ...], str]:
    """Returns DeepLab's name of each of our arrays, in the scope of the network.

    'exit_flow/block2/unit_1/xception_module/separable_conv1_pointwise/weights' at
    `('params', 'block21_sepconv1_pointwise', 'kernel')`, in Xception 65.

    Args:
      template: variables of the network, or their shapes.
      name: of the network, such as 'xception65'.
    """
    flat, entry = flatten_dict(template), _ENTRY_BLOCKS[name]
    last = max(int(match[1]) for place in flat if (match := re.match(r"block(\d+)_", place[1])))

    def scope(layer: str) -> str:
        match = re.fullmatch(r"block(\d+)_(?:(conv|sepconv)(\d)(?:_(\w+))?|residual)", layer)
        if match is None:
            return "logits"  # the classifier
        block, kind, i, part = int(match[1]), match[2], match[3], match[4]
        if kind == "conv":
            return f"entry_flow/conv1_{i}"
        inner = f"separable_conv{i}_{part}" if kind else "shortcut"
        if block <= entry + 1:
            unit = f"entry_flow/block{block - 1}/unit_1"
        elif block < last - 1:
            unit = f"middle_flow/block1/unit_{block - entry - 1}"
        else:
            unit = f"exit_flow/block{block - last + 2}/unit_1"
        return f"{unit}/xception_module/{inner}"

    names = {}
    for place in flat:
        layer, leaf = place[1], place[-1]
        if layer.endswith("_bn"):
            names[place] = f"{scope(layer.removesuffix('_bn'))}/{'BatchNorm/beta' if leaf == 'bias' else _LEAVES[leaf]}"
        else:
            depthwise = "depthwise_" if layer.endswith("_depthwise") else ""
            names[place] = f"{scope(layer)}/{depthwise}{_LEAVES[leaf]}"
    return names


def from_deeplab(arrays: Arrays, template: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns our variables with the weights of a network of DeepLab.

    Args:
      arrays: by their names in the scope of the network.
      template: variables of our network, or their shapes.
      name: of the network, for messages.

    Raises:
      UserError: arrays are missing, are superfluous or have other shapes; the message lists up to `MAX_LINES`.
    """
    names, variables, wrong = deeplab_names(template, name), {}, []
    for place, leaf in flatten_dict(template).items():
        theirs = names[place]
        if theirs not in arrays:
            wrong.append(f"it has no {theirs!r}, {'/'.join(place)} here.")
            continue
        value = arrays[theirs]
        if theirs == "logits/weights" and value.ndim == 4 and value.shape[:2] == (1, 1):
            value = value[0, 0]
        elif theirs.endswith("/depthwise_weights") and value.ndim == 4:
            value = value.transpose(0, 1, 3, 2)  # [kh, kw, C, 1]
        variables[place] = value
        if value.shape != leaf.shape:
            wrong.append(f"{theirs!r}, {'/'.join(place)} here, must have shape {tuple(leaf.shape)}, got {value.shape}.")
    left_out = sorted(arrays.keys() - set(names.values()))
    wrong += [f"our network has no place for {cut(shown(left))}." for left in left_out]
    if len(wrong) > MAX_LINES:
        wrong[MAX_LINES - 1 :] = [f"There are {len(wrong) - MAX_LINES + 1} more such lines."]
    if wrong:
        raise UserError(f"by its names it is {name} of DeepLab; " + "\n".join(wrong))
    return unflatten_dict(variables)
