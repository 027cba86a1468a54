"""Writes a network with its weights as other libraries read it: Keras, timm, the Hugging Face hub, NumPy.

What is written is exact, or it is refused. What another library would compute otherwise, though every array fits, is
returned in words. Our own description goes with the arrays where the format has a place for it, so that reading such a
file gives the same network again.
"""

import json
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from xception_flax import models
from xception_flax.host.files import beside, check_new
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import suggest
from xception_flax.text.sizes import ImageSize, sides, spelled
from xception_flax.weights import cards, timm
from xception_flax.weights import keras as keras_names
from xception_flax.weights.description import DESCRIPTION, describe
from xception_flax.weights.pretrained import IMAGE_SIZE, Pretrained
from xception_flax.weights.shapes import shapes_of

# The networks that Keras has too, and the smallest side of an image for which it builds them.
KERAS_MIN_SIZE = {"xception": 71, "inception_v3": 75}


class Written(NamedTuple):
    """What was written.

    Attributes:
      path: the file or folder.
      notes: what the library that reads it does otherwise, and what it does not take, in words.
    """

    path: Path
    notes: tuple[str, ...]


def write(pretrained: Pretrained, output: Path) -> Written:
    """Writes a network for another library, whole or not at all.

    Args:
      pretrained: the network.
      output: a file, whose suffix says the format (`FORMATS`), or else a folder, in the layout of the Hugging Face hub.

    Raises:
      UserError: the format has no place for this network, or the output is there already or cannot be written.
    """
    check_output(output)
    function = _format(output).function
    with beside(output) as partial:
        notes = function(pretrained, partial)
    return Written(output, tuple(notes))


def check_output(output: Path) -> None:
    """Raises UserError where `output` is there already, has no known suffix, or lies in no folder."""
    _format(output)
    check_new(output)


# Formats -------------------------------------------------------------------------------------------


def _write_keras(pretrained: Pretrained, path: Path) -> list[str]:
    """Whole, as `.keras`, or the weights alone, as `.weights.h5`; with our description where Keras does not look."""
    model, ours = keras_model(pretrained), json.dumps(describe(pretrained))
    if path.name.endswith(".weights.h5"):
        import h5py

        model.save_weights(path)
        with h5py.File(path, "a") as file:
            file.attrs[DESCRIPTION] = ours
    else:
        model.save(path)
        _add_description(path, ours)
    notes = differences(pretrained, {"name": pretrained.model["name"]}, "Keras")
    if path.suffix == ".keras" and pretrained.model.get("num_classes"):  # also where the source's last layer was linear
        notes.append(f"the model ends in a {pretrained.activation}, so that it gives probabilities, not logits")
    return notes


def keras_model(pretrained: Pretrained) -> Any:
    """Keras Applications' network with these weights; a classifier with hidden layers is built behind it."""
    name, fields = pretrained.model["name"], models.create_model(**pretrained.model)
    size = pretrained.image_size or IMAGE_SIZE
    _check_keras_has(pretrained, size)  # before the import: Keras would be installed in vain
    os.environ.setdefault("KERAS_BACKEND", "jax")  # before its import; TensorFlow is not among our requirements
    try:
        import keras
    except ImportError as error:
        raise UserError(f"this needs Keras, which cannot be imported: {error}; pip install keras") from None
    constructor = {"xception": keras.applications.Xception, "inception_v3": keras.applications.InceptionV3}[name]
    hidden, classes = tuple(getattr(fields, "fc_layers", ())), fields.num_classes
    options = {
        "include_top": classes > 0 and not hidden,
        "weights": None,
        "input_shape": (*sides(size), pretrained.channels),
    }
    if options["include_top"]:
        options |= {"classes": classes, "classifier_activation": pretrained.activation}
    else:
        options["pooling"] = "avg"
    model = constructor(**options)
    if classes and hidden:
        x = model.output
        for i, features in enumerate(hidden, start=1):
            x = keras.layers.Dense(features, activation="relu", name=f"fc{i}")(x)
        x = keras.layers.Dropout(fields.dropout_rate)(x)
        x = keras.layers.Dense(classes, activation=pretrained.activation, name="predictions")(x)
        model = keras.Model(model.input, x, name=name)
    layers = [layer for layer in model.layers if layer.weights]
    arrays = keras_names.to_keras(pretrained.variables, [(layer.name, len(layer.weights)) for layer in layers])
    for layer, values in zip(layers, arrays, strict=True):
        layer.set_weights(values)
    taken = sum(value.size for values in arrays for value in values)
    if (left := sum(value.size for value in flatten_dict(pretrained.variables).values()) - taken) != 0:
        raise UserError(f"Keras' {name} has no place for {left:,} values of this network (model {pretrained.model}).")
    return model


def _check_keras_has(pretrained: Pretrained, size: ImageSize) -> None:
    """Raises UserError where Keras has no such network, by its name, its layers or the size of its images."""
    name = pretrained.model["name"]
    if name not in KERAS_MIN_SIZE:
        raise UserError(f"Keras has no {name}; write .safetensors or .npz.")
    theirs = flatten_dict(shapes_of({"name": name, "num_classes": 0}, pretrained.channels))
    ours = flatten_dict(pretrained.variables)
    if any(place not in ours or ours[place].shape != leaf.shape for place, leaf in theirs.items()):
        raise UserError(
            f"Keras has {name} in one size; this one has other widths or depths. Write .safetensors or .npz."
        )
    if min(sides(size)) < KERAS_MIN_SIZE[name]:
        raise UserError(
            f"Keras cannot build {name} for images of {spelled(size)} pixels, only from {KERAS_MIN_SIZE[name]} on; "
            "write .safetensors or .npz."
        )


def _write_safetensors(pretrained: Pretrained, path: Path) -> list[str]:
    import safetensors.numpy

    arrays, notes = _torch_arrays(pretrained)
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    metadata = {"format": "pt", DESCRIPTION: json.dumps(describe(pretrained))}
    path.write_bytes(safetensors.numpy.save(contiguous, metadata=metadata))  # its `save_file` lets nobody else read it
    return notes


def _torch_arrays(pretrained: Pretrained) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns arrays by timm's names where timm has the network, else by ours, and what timm does otherwise."""
    architecture = architecture_of(pretrained)
    if architecture is None:
        name = pretrained.model["name"]
        of_size = " of these widths and depths" if any(name == n["name"] for n in timm.NETWORKS.values()) else ""
        return _our_arrays(pretrained.variables), [f"timm has no {name}{of_size}; the names are ours"]
    flat = flatten_dict(pretrained.variables)
    hidden = bool(pretrained.model.get("fc_layers"))
    head = {place: value for place, value in flat.items() if hidden and _is_head(place)}
    backbone = unflatten_dict({place: value for place, value in flat.items() if place not in head})
    notes = differences(pretrained, timm.NETWORKS[architecture], "timm")
    if head:
        notes.append("timm has no hidden layers before a classifier; their arrays are there by our names")
    return timm.to_timm(backbone) | _our_arrays(unflatten_dict(head)), notes


def architecture_of(pretrained: Pretrained) -> str | None:
    """Returns timm's name of the network; None where timm has none with these layers."""
    ours = {place: value.shape for place, value in flatten_dict(pretrained.variables).items() if not _is_head(place)}
    auxiliary = {"auxiliary": True} if pretrained.model.get("auxiliary") else {}
    for architecture, fields in timm.NETWORKS.items():
        if fields["name"] == pretrained.model["name"]:
            model = {**fields, **auxiliary, "num_classes": pretrained.model["num_classes"]}
            theirs = flatten_dict(shapes_of(model, pretrained.channels))
            if {place: leaf.shape for place, leaf in theirs.items() if not _is_head(place)} == ours:
                return architecture
    return None


def _is_head(place: tuple[str, ...]) -> bool:
    return re.fullmatch("fc[0-9]+|predictions", place[1]) is not None


def _our_arrays(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {"/".join(place): np.asarray(value) for place, value in flatten_dict(variables).items()}


def _write_npz(pretrained: Pretrained, path: Path) -> list[str]:
    """By our names, and beside the arrays, in the archive, our description."""
    with path.open("wb") as file:
        np.savez(file, **_our_arrays(pretrained.variables))
    _add_description(path, json.dumps(describe(pretrained)))
    return []


def _add_description(path: Path, text: str) -> None:
    """Adds our description to an archive, as a member of its own."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{DESCRIPTION}.json", text)


def _write_hub(pretrained: Pretrained, folder: Path) -> list[str]:
    """A folder as the hub has it: config.json as timm's where timm has the network, the weights, and a model card."""
    folder.mkdir()
    notes = _write_safetensors(pretrained, folder / "model.safetensors")
    architecture = architecture_of(pretrained)
    config = json.dumps(cards.config(pretrained, architecture), indent=2)
    (folder / "config.json").write_text(config, encoding="utf-8")
    (folder / "README.md").write_text(cards.model_card(pretrained, architecture, notes), encoding="utf-8")
    return notes


class Format(NamedTuple):
    """What writes a format, and what it is."""

    function: Callable[[Pretrained, Path], list[str]]
    meaning: str


# By the end of the output's name; without any of these it is a folder.
FORMATS = {
    ".weights.h5": Format(_write_keras, "Keras' weights"),
    ".keras": Format(_write_keras, "a whole model of Keras"),
    ".safetensors": Format(_write_safetensors, "timm's weights"),
    ".npz": Format(_write_npz, "NumPy's arrays"),
    "": Format(_write_hub, "a folder as the Hugging Face hub has it"),
}


def _format(output: Path) -> Format:
    for suffix, found in FORMATS.items():
        if suffix and output.name.endswith(suffix):
            return found
    if output.suffix:
        written = [suffix for suffix in FORMATS if suffix]
        raise UserError(
            f"--output {output}: {output.suffix!r} is no format to write; {suggest(output.suffix, written)} "
            "A name without a suffix is a folder for the Hugging Face hub."
        )
    return FORMATS[""]


# What a library computes otherwise ------------------------------------------------------------------

# Fields that no array shows, and that another library's network has its own values of.
UNSEEN = ("padding", "bn_epsilon", "mid_activation", "residual", "count_include_pad")


def differences(pretrained: Pretrained, theirs: Mapping[str, Any], library: str) -> list[str]:
    """Says which fields the library's network, ours of the keywords `theirs`, has otherwise: its logits then differ."""
    ours, other = models.create_model(**pretrained.model), models.create_model(**theirs)
    values = ", ".join(
        f"{name} {getattr(other, name)} in place of {getattr(ours, name)}"
        for name in UNSEEN
        if getattr(ours, name, None) != getattr(other, name, None)
    )
    return [f"{library} computes this network with {values}: its logits differ from ours"] if values else []
