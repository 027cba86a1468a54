"""Converts the weights of timm's Xceptions and Inception V3, which is torchvision's, to ours and back, by one table."""

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
from xception_flax.weights.reading import MAX_BYTES

PyTree = Any

# timm's networks, as keywords of `models.create_model`.
NETWORKS: dict[str, dict[str, Any]] = {
    "legacy_xception": dict(name="xception", padding="SYMMETRIC", bn_epsilon=1e-5),
    "inception_v3": dict(name="inception_v3", bn_scale=True, count_include_pad=True),
    **{name: dict(name=name) for name in ("xception41", "xception65", "xception71", "xception41p", "xception65p")},
}

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
# torchvision's names, which timm has kept.
_STEM = ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")
_MIXED = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")
_INCEPTION_V3 = {
    **{rf"stem_conv{i}(_bn)?": f"Conv2d_{name}.{{kind}}" for i, name in enumerate(_STEM, start=1)},
    **{rf"mixed{i}_pool(_bn)?": f"Mixed_{name}.branch_pool.{{kind}}" for i, name in enumerate(_MIXED)},
    **{rf"mixed{i}_(?P<branch>\w+?)(_bn)?": f"Mixed_{name}.branch{{branch}}.{{kind}}" for i, name in enumerate(_MIXED)},
    r"auxiliary_conv1(_bn)?": "AuxLogits.conv0.{kind}",
    r"auxiliary_conv2(_bn)?": "AuxLogits.conv1.{kind}",
    r"auxiliary_predictions": "AuxLogits.fc",
    r"predictions": "fc",
}
MAX_LINES = 10  # of a message about arrays that do not fit

# The axes of torch's kernel in our order, by their number: [features, C, kh, kw] -> [kh, kw, C, features].
_AXES = {4: (2, 3, 1, 0), 2: (1, 0)}
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
      template: variables of our Aligned Xception, Xception or Inception V3, or their shapes.

    Raises:
      UserError: timm's networks do not have one of our layers.
    """
    table = _table(template["params"])
    return {path: f"{_timm_module(path, table)}.{_LEAVES[path[-1]]}" for path in flatten_dict(template)}


def _table(params: Mapping[str, PyTree]) -> dict[str, str]:
    if "stem_conv1" in params:
        return _INCEPTION_V3
    if "block2_sepconv1" in params:
        if "block14_sepconv1" not in params:
            raise UserError("timm's legacy_xception has 8 blocks in its middle flow (middle_repeats=8).")
        return _LEGACY
    return _ALIGNED if "block1_conv2_bn" in params else _PREACTIVATION


def _timm_module(path: tuple[str, ...], table: Mapping[str, str]) -> str:
    layer = "/".join(path[1:-1])
    for pattern, name in table.items():
        if match := re.fullmatch(pattern, layer):
            groups = match.groupdict()
            block, i = int(groups.get("block", 0)), int(groups.get("i", 0))
            entry = 3 * (i - 1) + (block > 2)  # all blocks but block 2 begin with a ReLU
            return name.format(
                kind="bn" if layer.endswith("_bn") else "conv",
                block=block - 1 if table is _LEGACY else block - 2,
                i=i,
                entry=entry,
                entry_bn=entry + 1,
                exit=i + 2,
                branch=groups.get("branch"),
            )
    raise UserError(f"timm's networks have no layer like {layer!r}.")


def from_timm(state: Mapping[str, np.ndarray], template: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Returns our variables with the weights of a timm model.

    Args:
      state: arrays by name: `{name: tensor.numpy() for name, tensor in model.state_dict().items()}`.
      template: variables of our model, or their shapes, to be filled.

    Raises:
      UserError: arrays are missing, are superfluous or have other shapes; the message lists up to `MAX_LINES`.
    """
    names, variables, wrong = timm_names(template), {}, []
    for path, expected in flatten_dict(template).items():
        name = names[path]
        if name not in state:
            wrong.append(f"the timm model has no {name!r} for {'/'.join(path)}.")
            continue
        value = np.asarray(state[name])
        transposes = path[-1] == "kernel" and value.ndim in _AXES
        variables[path] = value.transpose(_AXES[value.ndim]) if transposes else value
        if variables[path].shape != expected.shape:
            wrong.append(
                f"{name!r} of the timm model: {'/'.join(path)} must have shape {tuple(expected.shape)}, "
                f"got {variables[path].shape}."
            )
    # num_batches_tracked counts the batches behind the moving statistics; nothing here uses it.
    left = {name for name in state if not name.endswith("num_batches_tracked")} - set(names.values())
    wrong += [f"our network has no place for {cut(shown(name))} of the timm model." for name in sorted(left)]
    if len(wrong) > MAX_LINES:
        wrong[MAX_LINES - 1 :] = [f"There are {len(wrong) - MAX_LINES + 1} more such lines."]
    if wrong:
        raise UserError("\n".join(wrong))
    return unflatten_dict(variables)


def to_timm(variables: Mapping[str, PyTree]) -> dict[str, np.ndarray]:
    """Returns the arrays of timm's state_dict; the inverse of `from_timm`.

    In timm each normalization of Inception V3 has a scale. Without `bn_scale` there is none here: it is 1.

    Raises:
      UserError: timm's networks do not have one of our layers.
    """
    names = timm_names(variables)
    state = {}
    for path, value in flatten_dict(variables).items():
        value = np.asarray(value)
        state[names[path]] = value.transpose(np.argsort(_AXES[value.ndim])) if path[-1] == "kernel" else value
        if path[-1] == "mean":
            state.setdefault(names[path].replace("running_mean", "weight"), np.ones_like(value))
    return state
