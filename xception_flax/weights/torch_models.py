"""Finds Xception or Inception V3 among the arrays of a torch file: timm's, torchvision's, Cadene's, FaceForensics++'.

Such a file has arrays by name, and nothing of what is computed with them. So the network is found by its names, behind
whatever prefixes there are, and its size by its shapes. timm's names stand for timm's network. torchvision's Inception
V3 has the same names, and Cadene's Xception, which FaceForensics++ took, too, but for the classifier's.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from xception_flax.text.errors import UserError
from xception_flax.text.naming import shown
from xception_flax.weights import timm, timm_config
from xception_flax.weights.left_out import listed, modules
from xception_flax.weights.pretrained import Pretrained
from xception_flax.weights.shapes import shapes_of, width_fields
from xception_flax.weights.timm_config import Use

Arrays = Mapping[str, np.ndarray]

# An array by whose name a network is known: its first convolution, or the first of which no other has the name.
_LEGACY, _ALIGNED, _INCEPTION_V3 = "block1.rep.0.conv1.weight", "stem.0.conv.weight", "Conv2d_1a_3x3.conv.weight"
_MARK = re.compile(rf"(?P<prefix>|.*\.)(?P<mark>{'|'.join(map(re.escape, (_LEGACY, _ALIGNED, _INCEPTION_V3)))})")

# timm's Aligned Xceptions by the number of their blocks and whether these begin with a normalization.
_DEPTHS = {
    (13, False): "xception41",
    (21, False): "xception65",
    (23, False): "xception71",
    (13, True): "xception41p",
    (21, True): "xception65p",
}

# Classifiers by timm's name: Cadene's is last_linear.
_HEADS = {"fc": ("fc.", "last_linear."), "head.fc": ("head.fc.",)}

# In a prefix: moving averages of the weights, such as 'state_dict_ema.' and 'model_ema.module.'.
_AVERAGE = re.compile(r"(?:^|[._])ema(?:[._]|$)", re.IGNORECASE)

MAX_NETWORKS = 8  # in a file


def recognize(arrays: Arrays, config: Mapping[str, Any], path: Path) -> Pretrained:
    """Returns the network in a torch file, and all that is said of its use.

    Of moving averages and the weights that they are of, it is the averages. The classifier is there too where it is one
    dense layer on the mean of the features; a single logit is for 'sigmoid'. The auxiliary tower of Inception V3 is
    there where it has the classifier's classes.

    Args:
      arrays: by name, as in `state_dict()`, with any prefixes.
      config: what stands with them: timm's config.json (see `timm_config`), or anything else, which says nothing.
      path: of the file, for messages.

    Raises:
      UserError: there is no network that is known here, or more than one, or a part of one, or arrays of other shapes.
    """
    found = _below_prefixes(arrays)
    if not found:
        raise UserError(
            f"{path} has no network that is known here; expected the arrays of timm's {', '.join(timm.NETWORKS)} or of "
            f"torchvision's inception_v3, behind any prefix; it has {listed(arrays) or 'no arrays'}."
        )
    if len(found) > MAX_NETWORKS:
        raise UserError(f"{path} has {len(found)} networks, below {listed(found)}; expected one.")
    networks, errors = {}, {}
    for prefix, below in found.items():
        try:
            networks[prefix] = _network(below, config)
        except ValueError as error:
            errors[prefix] = error
    if not networks:
        prefix, error = next(iter(errors.items()))
        others = f"of {len(errors)} networks, the one below {shown(prefix)!r}: " if len(errors) > 1 else ""
        raise UserError(f"{path}: {others}{error}")
    chosen = [prefix for prefix in networks if _AVERAGE.search(prefix)] or list(networks)
    if len(chosen) > 1:
        raise UserError(
            f"{path} has {len(chosen)} whole networks, below {listed(chosen)}, and does not say which one counts; "
            "write a file with the arrays of one."
        )
    network = networks[chosen[0]]
    rather_than = [prefix for prefix in found if prefix != chosen[0]]
    outside = [name for name in arrays if not name.startswith(tuple(found)) and not _is_counter(name)]
    origin = dict(network.origin) | ({"prefix": chosen[0]} if chosen[0] else {})
    origin |= {"rather_than": rather_than} if rather_than else {}
    return network._replace(origin=origin, left_out=(*network.left_out, *modules(outside)))


def _below_prefixes(arrays: Arrays) -> dict[str, dict[str, np.ndarray]]:
    """Returns the arrays below each prefix of a network, by their names there."""
    matches = (_MARK.fullmatch(name) for name, array in arrays.items() if array.ndim == 4)
    found: dict[str, dict[str, np.ndarray]] = {match["prefix"]: {} for match in matches if match}
    if len(found) <= MAX_NETWORKS:
        prefixes = sorted(found, key=len, reverse=True)  # 'ema.' before '', below which all names are
        for name, array in arrays.items():
            prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
            if prefix is not None:
                found[prefix][name.removeprefix(prefix)] = array
    return found


# One network ---------------------------------------------------------------------------------------


def _network(arrays: Arrays, config: Mapping[str, Any]) -> Pretrained:
    """Returns the network whose arrays these are.

    Raises:
      UserError: what is missing, superfluous or of another shape.
    """
    state = {name: _unsqueezed(name, array) for name, array in arrays.items() if not _is_counter(name)}
    architecture, first, head = _architecture(state)
    theirs = {name: state.pop(name) for name in list(state) if name.startswith(_HEADS[head])}
    classifier, left_out = _classifier(theirs)
    channels = state[first].shape[1]
    use = timm_config.read(config, channels, len(classifier.get("bias", ())))
    if classifier and use.pooling != "avg":
        classifier, left_out = {}, [f"the classifier, of features pooled by {use.pooling!r} in place of their mean"]

    model = _fields(architecture, use, classifier, state)
    template = shapes_of(model, channels)
    width = width_fields(_widths(state, template), multiples=(8,) if architecture == "inception_v3" else (8, 1))
    if width:
        template = shapes_of(model := model | width, channels)
    if classifier:
        ours, theirs = template["params"]["predictions"]["kernel"].shape[0], classifier["weight"].shape[1]
        if ours != theirs:
            classifier, left_out = {}, [f"the classifier, of {theirs} features in place of their {ours} means"]
            template = shapes_of(model := _fields(architecture, use, classifier, state) | width, channels)
    state |= {f"{head}.{leaf}": array for leaf, array in classifier.items()}

    # A module of another name is beside the network, or the network is another one: who has the file knows.
    theirs = {name.partition(".")[0] for name in timm.timm_names(template).values()}
    beside = [name for name in state if name.partition(".")[0] not in theirs]
    for name in beside:
        del state[name]
    try:
        variables = timm.from_timm(state, template)
        _check_types(state)
    except ValueError as error:
        raise UserError(f"by its names it is {architecture} of timm; {error}") from None
    return Pretrained(
        "timm",
        model,
        variables,
        channels,
        class_names=use.class_names,
        class_descriptions=use.class_descriptions,
        image_size=use.image_size,
        transforms=use.transforms,
        normalize=use.normalize,
        activation="sigmoid" if model["num_classes"] == 1 else "softmax",
        left_out=(*left_out, *modules(beside), *use.left_out),
        origin={"architecture": architecture},
    )


def _fields(architecture: str, use: Use, classifier: Arrays, state: Arrays) -> dict[str, Any]:
    """Returns keywords of `models.create_model`, at width 1."""
    num_classes = len(classifier.get("bias", ()))
    model = timm.NETWORKS[architecture] | dict(use.fields) | {"num_classes": num_classes}
    if architecture == "inception_v3":
        auxiliary = state.get("AuxLogits.fc.weight")
        model["auxiliary"] = num_classes > 0 and auxiliary is not None and auxiliary.shape[:1] == (num_classes,)
    return model


def _architecture(state: Arrays) -> tuple[str, str, str]:
    """Returns timm's name of the network, and its names of the first kernel and of the classifier."""
    if _LEGACY in state:
        architecture, first, head = "legacy_xception", "conv1.weight", "fc"
    elif _INCEPTION_V3 in state:
        architecture, first, head = "inception_v3", _INCEPTION_V3, "fc"
    else:
        blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
        preactivation = any(name.startswith("blocks.0.norm.") for name in state)
        architecture, first, head = _DEPTHS.get((len(blocks), preactivation)), _ALIGNED, "head.fc"
        if architecture is None:
            known = ", ".join(f"{depth} in {name}" for (depth, _), name in _DEPTHS.items())
            raise UserError(f"it has {len(blocks)} blocks; there are {known}.")
    if np.ndim(state.get(first)) != 4 or not state[first].size:
        raise UserError(f"by its names it is {architecture} of timm; it has no {first!r} of four dimensions.")
    return architecture, first, head


def _classifier(theirs: Arrays) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns 'weight' and 'bias' of the classifier where it is one dense layer, or else what is left out.

    A dropout in front of it makes its name 'last_linear.1', and has no arrays. What stands between several layers has
    none either, so that nobody knows what they compute.
    """
    leaves = {name.rpartition(".")[2]: array for name, array in theirs.items()}
    layers = {name.rpartition(".")[0] for name in theirs}
    weight = leaves.get("weight", np.zeros(0))
    bias = leaves.get("bias", np.zeros(weight.shape[:1], weight.dtype))
    dense = (
        weight.ndim == 2 and weight.size > 0 and bias.shape == weight.shape[:1] and leaves.keys() <= {"weight", "bias"}
    )
    if dense and len(layers) == 1:
        return {"weight": weight, "bias": bias}, []
    return {}, [f"the classifier, which is not one dense layer: {listed(theirs)}"] if theirs else []


def _widths(state: Arrays, template: Mapping[str, Any]) -> Iterable[tuple[int, int]]:
    """Yields channels of each convolution at width 1, and those that it has."""
    shapes = flatten_dict(template)
    for path, name in timm.timm_names(template).items():
        if path[-1] == "kernel" and len(shapes[path].shape) == 4 and np.ndim(state.get(name)) == 4:
            yield shapes[path].shape[-1], state[name].shape[0]


def _check_types(state: Arrays) -> None:
    for name, array in state.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(f"{shown(name)} is of type {array.dtype}; expected floating-point numbers.")


def _is_counter(name: str) -> bool:
    """Whether it counts batches, which nothing needs."""
    return name.endswith("num_batches_tracked")


def _unsqueezed(name: str, array: np.ndarray) -> np.ndarray:
    """The oldest files have 1x1 kernels as `[features, C]`."""
    return array[:, :, None, None] if name.endswith("pointwise.weight") and array.ndim == 2 else array
