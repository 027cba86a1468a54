"""Weights to begin with: Keras' published ones, a file of Keras or timm, or a run of one's own.

Nothing is downloaded. Every array of the network must be there with its shape, and the recipe must
compute with it what it was trained for; the classifier alone may differ, and then stays random.
"""

import contextlib
import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from xception_flax import models
from xception_flax.runs.restore import Run, restore
from xception_flax.runs.workdir import CONFIG, run_around
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import suggest
from xception_flax.training import state
from xception_flax.weights import keras, reading, timm

Place = tuple[str, ...]  # of an array: ('params', 'predictions', 'kernel')
BIAS = ("params", "predictions", "bias")  # of the classifier: as long as there are classes

# As Keras Applications has them: below KERAS_URL and, once Keras has fetched them, in ~/.keras/models.
KERAS_URL = "https://storage.googleapis.com/tensorflow/keras-applications"
KERAS_FILES = {  # network: (name, MD5) with the classifier, then without
    "xception": (
        ("xception_weights_tf_dim_ordering_tf_kernels.h5", "0a58e3b7378bc2990ea3b43d5981f1f6"),
        ("xception_weights_tf_dim_ordering_tf_kernels_notop.h5", "b0042744bf5b25fce3cb969f33bebb97"),
    ),
    "inception_v3": (
        ("inception_v3_weights_tf_dim_ordering_tf_kernels.h5", "9a0d58056eeedaa3f26cb7ebd46da564"),
        ("inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5", "bcbd6486424b2319ff4ef7d526e38f63"),
    ),
}
FROM_SCRATCH = "to train from scratch set --config.init.weights=random"

# What the published files take, [-1, 1]. Of any other file only who trained it knows.
PUBLISHED_NORMALIZE = {"mean": (127.5,), "std": (127.5,)}
# What else of Xception is no array (see `models/xception.py`). A library's layers are the library's network.
XCEPTION_FIELDS = {
    "keras": {"padding": "SAME", "bn_epsilon": 1e-3},
    "timm": {"padding": "SYMMETRIC", "bn_epsilon": 1e-5},
}
# Fields of a network with which the same weights are as good.
FREE_FIELDS = {
    *("num_classes", "dropout_rate", "bn_decay", "bn_frozen", "output_stride", "auxiliary"),
    *("remat", "dtype", "param_dtype", "parent", "name"),
}


class Pretrained(NamedTuple):
    """Weights to begin with.

    Attributes:
      arrays: by place, each where it belongs on the devices; what `state.make_init`'s `init` takes.
      random: places in the network that the weights have no array for: the classifier's, or all.
      origin: what the weights are, as JSON.
      taken_for: what they are taken to expect, where nothing but the recipe says so.
    """

    arrays: dict[Place, jax.Array]
    random: tuple[Place, ...]
    origin: dict[str, Any]
    taken_for: str = ""

    def meta(self) -> dict[str, Any]:
        """What a checkpoint remembers of it."""
        return self.origin | {"arrays": len(self.arrays), "random": ["/".join(place) for place in self.random]}

    def __str__(self) -> str:
        origin = ", ".join(f"{key} {value}" for key, value in self.origin.items())
        random = ", ".join("/".join(place) for place in self.random) or "none"
        taken_for = f"; taken to be for {self.taken_for}" if self.taken_for else ""
        return f"initial weights: {len(self.arrays)} arrays of {origin}{taken_for}; left random: {random}"


def load(
    weights: str,
    checkpoint: str,
    *,
    model: nn.Module,
    image_shape: tuple[int, int, int],
    mesh: Mesh,
    class_names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
) -> Pretrained:
    """Returns the weights that a run begins with.

    Args:
      weights: as in `recipes.groups.Init`.
      checkpoint: the same.
      model: the network that takes them.
      image_shape: `(H, W, C)` of one image.
      mesh: where they go.
      class_names: what the logits are to stand for.
      mean: of the recipe's normalization, on the scale 0 to 255: compared where it is known what the weights
        expect, and else believed.
      std: the same.

    Raises:
      ValueError: there are none; an array has no place, another shape, values that are not finite or is
        missing, but for the classifier, where its classes are others (of a file they are known by their
        number); or the recipe has the network compute something else than the weights are for.
    """
    shapes = flatten_dict(state.abstract_variables(model, image_shape, mesh))
    if weights == "random":
        return Pretrained({}, tuple(shapes), {"weights": "random"})
    normalize, taken_for = {"mean": mean, "std": std}, ""
    try:
        path = _published(model) if weights == "keras" else Path(weights).expanduser()
        is_dir, is_run = path.is_dir(), (path / CONFIG).is_file()
        form = reading.recognize(path) if path.is_file() else None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"init.weights: {error}") from None
    except (OSError, RuntimeError) as error:  # the latter: ~ of nobody
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"init.weights: {weights[:200]!r} cannot be opened: {reason}.") from None
    if is_run:
        run = restore(path, mesh, checkpoint)
        origin = {"workdir": str(path.absolute()), "step": run.step, "weights": run.weights}
        _check_settings(path, model, _fields(run.model, model, path), normalize, run.recipe.normalize)
        values = _from_run(run, shapes, tuple(class_names), path)
    elif form:
        library, values = _from_file(path, form, shapes)
        origin = {"file": str(path.absolute()), "sha256": _digest(path, "sha256")}
        _check_finite(path, values, shapes)
        fields = XCEPTION_FIELDS[library] if type(model) is models.MODELS["xception"] else {}
        published = _digest(path, "md5") in {md5 for files in KERAS_FILES.values() for _, md5 in files}
        _check_settings(path, model, fields, normalize, PUBLISHED_NORMALIZE if published else {})
        taken_for = "" if published else f"images as (x - {_number(mean)}) / {_number(std)}"
    elif is_dir:
        found = run_around(path) or _other_library(path)
        raise UserError(f"init.weights: {path} is no workdir of a run: it has no {CONFIG}{found}.")
    elif Path(f"{path}.index").is_file():
        raise UserError(
            f"init.weights: {path} is a checkpoint of TensorFlow ({path.name}.index), and is not read; "
            f"{reading.REWRITE_KERAS}."
        )
    else:
        raise UserError(
            f"init.weights: {path} is neither a file nor a folder; expected a file of weights, the workdir of a run or "
            f"a word; {suggest(weights, ('keras', 'random'))}"
        )
    arrays = {place: _placed(value, shapes[place].sharding) for place, value in values.items()}
    return Pretrained(arrays, tuple(place for place in shapes if place not in arrays), origin, taken_for)


def _other_library(folder: Path) -> str:
    """What a folder of another library is, and what to do, for an error; '' for other folders."""
    names = set()
    with contextlib.suppress(OSError):  # it is not there, or nobody may look
        names = set(os.listdir(folder))
    if files := sorted(name for name in names if Path(name).suffix in (".h5", ".hdf5", ".safetensors", ".npz")):
        return f"; it has a file of weights: give {folder / files[0]}"
    if "saved_model.pb" in names:
        return f"; this is a SavedModel of TensorFlow: {reading.REWRITE_KERAS}"
    if any(name.endswith(".index") for name in names):
        return f"; this has a checkpoint of TensorFlow: {reading.REWRITE_KERAS}"
    if names & {"_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt"}:
        return "; this is a checkpoint of Orbax, and not of such a run"
    return ""


# Files ---------------------------------------------------------------------------------------------


def _published(model: nn.Module) -> Path:
    name = next((name for name in KERAS_FILES if type(model) is models.MODELS[name]), None)
    if name is None:
        raise UserError(
            f"init.weights='keras': Keras publishes no weights of {type(model).__name__}; take model.name="
            f"{' or '.join(KERAS_FILES)}, or a file; {FROM_SCRATCH}."
        )
    folder = Path(os.environ.get("KERAS_HOME", "~/.keras")).expanduser() / "models"
    for file, md5 in KERAS_FILES[name]:
        if (folder / file).is_file():
            if _digest(folder / file, "md5") != md5:
                raise UserError(
                    f"{folder / file} is not the published file (another MD5 than {md5}): a broken download? Remove it "
                    "and fetch it again; for a file of your own give its path as init.weights."
                )
            return folder / file
    file = KERAS_FILES[name][0][0]
    raise UserError(
        f"init.weights='keras': {folder / file} is not there, nor the one without classifier, ..._notop.h5. Get it:\n"
        f"  curl --create-dirs -o {folder / file} {KERAS_URL}/{name}/{file}\n"
        f"or give a file of weights or a workdir as init.weights; {FROM_SCRATCH}."
    )


def _digest(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _from_file(path: Path, form: str, shapes: Mapping[Place, Any]) -> tuple[str, dict[Place, np.ndarray]]:
    """Returns the library that wrote a file, and its arrays by place."""
    # Float64 of twice the network, and then a classifier of any number of classes.
    max_bytes = 16 * sum(math.prod(leaf.shape) for leaf in shapes.values()) + 2**29
    if form in ("hdf5", "keras"):
        layers = keras.read_layers(path, unflatten_dict(shapes), max_bytes, form)
        if not _fits(dict(layers).get("predictions", [None])[-1], shapes):
            layers, shapes = [(name, a) for name, a in layers if name != "predictions"], _backbone(shapes)
        return "keras", flatten_dict(_converted(keras.from_keras, layers, shapes, path))
    arrays, classifiers = timm.read_state(path, form, max_bytes), ("fc.", "head.fc.")
    if not _fits(next((arrays[f"{c}bias"] for c in classifiers if f"{c}bias" in arrays), None), shapes):
        arrays, shapes = {n: a for n, a in arrays.items() if not n.startswith(classifiers)}, _backbone(shapes)
    return "timm", flatten_dict(_converted(timm.from_timm, arrays, shapes, path))


def _number(values: Sequence[float]) -> str:
    """One value for all channels, or one for each: '127.5', '(0, 1, 2)'."""
    each = [f"{value:g}" for value in values]
    return each[0] if len(set(each)) == 1 else f"({', '.join(each)})"


def _converted(function: Callable[..., Any], theirs: Any, shapes: Mapping[Place, Any], path: Path) -> dict[str, Any]:
    try:
        return function(theirs, unflatten_dict(shapes))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _from_run(
    run: Run, shapes: Mapping[Place, Any], class_names: tuple[str, ...], path: Path
) -> dict[Place, jax.Array]:
    """Returns the arrays of a run by place."""
    values = flatten_dict(run.variables)
    if run.class_names != class_names:
        values, shapes = _backbone(values), _backbone(shapes)
    for place in sorted(values.keys() | shapes.keys()):
        theirs, ours = (tree[place].shape if place in tree else "no such array" for tree in (values, shapes))
        if theirs != ours:
            raise UserError(f"{path}: {'/'.join(place)} is {theirs} there, and {ours} in the network of this recipe.")
    return values


def _check_finite(path: Path, values: Mapping[Place, np.ndarray], shapes: Mapping[Place, Any]) -> None:
    """Raises ValueError where an array has a NaN or an infinity once it is of the network's type."""
    for place, value in values.items():
        dtype = shapes[place].dtype
        with np.errstate(over="ignore"):
            finite = np.isfinite(value.astype(dtype)).all()
        if not finite:
            raise UserError(
                f"{path}: values of {'/'.join(place)} are not finite (in {dtype}); take another file of weights."
            )


def _fits(bias: np.ndarray | jax.Array | None, shapes: Mapping[Place, Any]) -> bool:
    """Whether a classifier with that bias is for as many classes as ours."""
    return bias is not None and BIAS in shapes and bias.shape == shapes[BIAS].shape


def _backbone(values: Mapping[Place, Any]) -> dict[Place, Any]:
    return {place: value for place, value in values.items() if place[1] != "predictions"}


def _placed(value: np.ndarray | jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
    if isinstance(value, jax.Array):  # a checkpoint is read to where it belongs
        return value
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


# What is no array ----------------------------------------------------------------------------------


def _fields(theirs: nn.Module, ours: nn.Module, path: Path) -> dict[str, Any]:
    """The fields of a run's network that decide what its weights compute."""
    if type(theirs) is not type(ours):
        raise UserError(
            f"{path} is a run of {type(theirs).__name__}, and this recipe of {type(ours).__name__}; set model.name."
        )
    names = {field.name for field in dataclasses.fields(theirs)} - FREE_FIELDS
    return {name: getattr(theirs, name) for name in sorted(names)}


def _check_settings(
    path: Path,
    model: nn.Module,
    fields: Mapping[str, Any],
    normalize: Mapping[str, Sequence[float]],
    wanted: Mapping[str, Sequence[float]],
) -> None:
    """Raises ValueError where the recipe has other fields, or another normalization, than the weights are for."""

    def plain(value: Any) -> Any:
        return tuple(value) if isinstance(value, list | tuple) else value

    wrong = {f"model.{name}": value for name, value in fields.items() if plain(getattr(model, name)) != plain(value)}
    for name, values in wanted.items():
        if not np.all(np.equal(values, normalize[name])):  # a value a channel, or one for all
            wrong[f"normalize.{name}"] = tuple(values)
    if wrong:
        settings = " ".join(f"--config.{key}={value}" for key, value in wrong.items())
        raise UserError(f"the weights of {path} are for another setting of this recipe; set {settings}")
