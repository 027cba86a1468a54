"""Converts the weights of timm's Aligned Xceptions and `legacy_xception` to our variables and back, by one table."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from xception_flax.text.errors import UserError
from xception_flax.weights import reading
from xception_flax.weights.reading import MAX_BYTES

PyTree = Any

# Our layer -> timm's module, with the numbers of block and convolution to fill in. timm counts blocks from 0 after the
# stem, which is block 1 here.
_ALIGNED = {
    r"block1_conv1(_bn)?": "stem.0.{kind}",
    r"block1_conv2(_bn)?": "stem.1.{kind}",
    r"block(?P<block>\d+)_residual(_bn)?": "blocks.{block}.shortcut.{kind}",
    r"block(?P<block>\d+)_sepconv(?P<i>\d)_depthwise": "blocks.{block}.stack.conv{i}.conv_dw",
    r"block(?P<block>\d+)_sepconv(?P<i>\d)_depthwise_bn": "blocks.{block}.stack.conv{i}.bn_dw",
    r"block(?P<block>\d+)_sepconv(?P<i>\d)_pointwise": "blocks.{block}.stack.conv{i}.conv_pw",
    r"block(?P<block>\d+)_sepconv(?P<i>\d)_pointwise_bn": "blocks.{block}.stack.conv{i}.bn_pw",
    r"predictions": "head.fc",
}
_PREACTIVATION = _ALIGNED | {
    r"block1_conv2(_bn)?": "stem.1",
    r"block(?P<block>\d+)_residual(_bn)?": "blocks.{block}.shortcut",
    r"block(?P<block>\d+)_sepconv1_bn": "blocks.{block}.norm",
    r"block(?P<block>\d+)_sepconv(?P<i>[23])_bn": "blocks.{block}.stack.conv{i}.norm",
}
# legacy_xception has the layers of a block in a list with ReLUs and pooling, so its convolutions are 3 entries apart.
_LEGACY = {
    r"block1_conv(?P<i>\d)(_bn)?": "{kind}{i}",
    r"block(?P<block>\d+)_residual": "block{block}.skip",
    r"block(?P<block>\d+)_residual_bn": "block{block}.skipbn",
    r"block14_sepconv(?P<i>\d)/depthwise": "conv{exit}.conv1",
    r"block14_sepconv(?P<i>\d)/pointwise": "conv{exit}.pointwise",
    r"block14_sepconv(?P<i>\d)_bn": "bn{exit}",
    r"block(?P<block>\d+)_sepconv(?P<i>\d)/depthwise": "block{block}.rep.{entry}.conv1",
    r"block(?P<block>\d+)_sepconv(?P<i>\d)/pointwise": "block{block}.rep.{entry}.pointwise",
    r"block(?P<block>\d+)_sepconv(?P<i>\d)_bn": "block{block}.rep.{entry_bn}",
    r"predictions": "fc",
}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def read_state(path: Path, form: str, max_bytes: int = MAX_BYTES) -> dict[str, np.ndarray]:
    """Returns the arrays of a .safetensors, .npz or .pth file by name, for `from_timm`.

    Args:
      path: of the file.
      form: 'safetensors', 'npz' or 'torch'.
      max_bytes: limit of all arrays together.

    Raises:
      UserError: the file cannot be read.
    """
    return {name: array for name, (array,) in reading.read(path, form, max_bytes).entries}


def timm_names(template: Mapping[str, PyTree]) -> dict[tuple[str, ...], str]:
    """Returns timm's name of each of our arrays: 'head.fc.weight' at `('params', 'predictions', 'kernel')`.

    Args:
      template: variables of our Aligned Xception or Xception, or their shapes.

    Raises:
      UserError: timm's networks do not have one of our layers.
    """
    params = template["params"]
    legacy = "block2_sepconv1" in params
    if legacy and "block14_sepconv1" not in params:
        raise UserError("timm's legacy_xception has 8 blocks in its middle flow (middle_repeats=8).")
    table = _LEGACY if legacy else _ALIGNED if "block1_conv2_bn" in params else _PREACTIVATION
    return {path: f"{_timm_module(path, table, legacy)}.{_LEAVES[path[-1]]}" for path in flatten_dict(template)}


def _timm_module(path: tuple[str, ...], table: Mapping[str, str], legacy: bool) -> str:
    layer = "/".join(path[1:-1])
    for pattern, name in table.items():
        if match := re.fullmatch(pattern, layer):
            numbers = {key: int(value) for key, value in match.groupdict().items()}
            block, i = numbers.get("block", 0), numbers.get("i", 0)
            entry = 3 * (i - 1) + (block > 2)  # all blocks but block 2 begin with a ReLU
            return name.format(
                kind="bn" if layer.endswith("_bn") else "conv",
                block=block - 1 if legacy else block - 2,
                i=i,
                entry=entry,
                entry_bn=entry + 1,
                exit=i + 2,
            )
    raise UserError(f"timm's networks have no layer like {layer!r}.")


def from_timm(state: Mapping[str, np.ndarray], template: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Returns our variables with the weights of a timm model.

    Args:
      state: arrays by name: `{name: tensor.numpy() for name, tensor in model.state_dict().items()}`.
      template: variables of our model, or their shapes, to be filled.

    Raises:
      UserError: an array is missing, is superfluous or has another shape.
    """
    names, variables = timm_names(template), {}
    for path, expected in flatten_dict(template).items():
        if names[path] not in state:
            raise UserError(f"the timm model has no {names[path]!r} for {'/'.join(path)}.")
        value = np.asarray(state[names[path]])
        value = value.transpose(_axes(value.ndim)) if path[-1] == "kernel" else value
        if value.shape != expected.shape:
            raise UserError(
                f"{names[path]!r} of the timm model: {'/'.join(path)} must have shape {tuple(expected.shape)}, "
                f"got {value.shape}."
            )
        variables[path] = value
    # num_batches_tracked counts the batches behind the moving statistics; nothing here uses it.
    left = {name for name in state if not name.endswith("num_batches_tracked")} - set(names.values())
    if left:
        raise UserError(f"our network has no place for {', '.join(sorted(left)[:5])} of the timm model.")
    return unflatten_dict(variables)


def to_timm(variables: Mapping[str, PyTree]) -> dict[str, np.ndarray]:
    """Returns the arrays of timm's state_dict; the inverse of `from_timm`.

    Raises:
      UserError: timm's networks do not have one of our layers.
    """
    names = timm_names(variables)
    state = {}
    for path, value in flatten_dict(variables).items():
        value = np.asarray(value)
        state[names[path]] = value.transpose(np.argsort(_axes(value.ndim))) if path[-1] == "kernel" else value
    return state


def _axes(ndim: int) -> tuple[int, ...]:
    """Returns the axes of torch's kernel in our order: [features, C, kh, kw] -> [kh, kw, C, features]."""
    return (2, 3, 1, 0) if ndim == 4 else (1, 0)
