"""Opens weights wherever they are: a run, a file or a folder of any library, or the name of published ones."""

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from xception_flax.runs.restore import Run, restore
from xception_flax.runs.workdir import CONFIG, has_checkpoints, run_around
from xception_flax.text import naming
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import suggest, written
from xception_flax.weights import deeplab, description, fetching, keras_models, reading, torch_models
from xception_flax.weights.description import DESCRIPTION
from xception_flax.weights.pretrained import Pretrained
from xception_flax.weights.reader.room import MAX_CONFIG, parsed

# What the files that Keras Applications publishes take: [-1, 1]. No file says it.
PUBLISHED_NORMALIZE = {"mean": (127.5,), "std": (127.5,)}

KERAS_FORMS = ("hdf5", "keras")  # of `reading.recognize`; in all others each name has one array

SUFFIXES = (".h5", ".hdf5", ".keras", ".safetensors", ".npz", ".pth", ".pt", ".bin")  # of files of weights

# Of a checkpoint of TensorFlow: the files of its numbers, and the file that says which one of a folder is the newest.
_DATA = re.compile(r"(.+)\.data-\d{5}-of-\d{5}", re.DOTALL)
NEWEST = "checkpoint"
_NEWEST_PATH = re.compile(r'^model_checkpoint_path: "(.+)"$', re.MULTILINE)

MAX_BYTES = 2**31  # of all arrays of a file: the largest network in float64, with a training's averages beside


def open_source(source: str, mesh: Mesh, checkpoint: str = "best", weights: str | None = None) -> Pretrained | Run:
    """Returns the network that `source` is.

    Args:
      source: the workdir of a run; a file of Keras, torch or this project; a folder as the Hugging Face hub has it;
        a checkpoint of DeepLab: what its files' names begin with, one of them, or its folder; 'keras:NETWORK',
        'timm:NAME' or 'hf:OWNER/NAME', which `fetching` gets.
      mesh: where the variables of a run go; those of all else stay in NumPy arrays.
      checkpoint: of a run: 'latest', 'best' or the number of a step.
      weights: of a run: 'raw', 'ema', or None for 'ema' where it keeps them.

    Raises:
      UserError: there is no such source, or it is damaged or of another network; the message says what to do.
    """
    path = _located(source)
    if path.is_dir():
        if (hub := _hub_folder(path)) is not None:
            return read_file(hub.weights, hub.config)
        if (path / CONFIG).is_file():
            return restore(path, mesh, checkpoint, weights)
        if (index := _newest_index(path)) is not None:
            return read_file(index)
        found = run_around(path) or _other_library(path)
        raise UserError(f"{path} is no workdir of a run: it has no {CONFIG}{found}.")
    return read_file(path)


def is_workdir(source: str) -> bool:
    """Whether a source is the workdir of a run. It fetches nothing.

    Raises:
      UserError: it is a folder in which this user may not look.
    """
    try:
        path = Path(source).expanduser()
        is_open = not path.is_dir() or os.access(path, os.R_OK | os.X_OK)
        there = is_open and ((path / CONFIG).is_file() or has_checkpoints(path))  # a run may have lost its recipe
        is_one = there and _hub_folder(path) is None
    except (OSError, ValueError, RuntimeError):  # of names that are none; `open_source` says so
        return False
    if not is_open:
        raise UserError(f"{path} cannot be read: {os.strerror(errno.EACCES)}.")
    return is_one


def check_there(source: str) -> None:
    """Raises UserError if a source is a path where there is nothing. It fetches nothing."""
    if not fetching.is_remote(source):
        _located(source)


def _located(source: str) -> Path:
    """Returns the file or folder that a source stands for, fetched where it is elsewhere."""
    if fetching.is_remote(source):
        return fetching.fetch(source)
    try:
        path = Path(source).expanduser()
        if path.exists():
            part = _DATA.fullmatch(path.name)
            return index if part and (index := path.with_name(f"{part[1]}.index")).is_file() else path
        if Path(f"{path}.index").is_file():
            return Path(f"{path}.index")  # TensorFlow calls a checkpoint by what its files' names begin with
    except ValueError as error:
        raise UserError(f"{written(source)}: {error}.") from None
    except (OSError, RuntimeError) as error:  # the latter: ~ of nobody
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{written(source)} cannot be opened: {reason}.") from None
    raise UserError(
        f"{path} is neither a file nor a folder; expected a file of weights, the workdir of a run, or "
        f"{', '.join(fetching.FORMS)}; {suggest(source, fetching.NAMES)}"
    )


class HubFolder(NamedTuple):
    """The files of a folder as the Hugging Face hub has it."""

    weights: Path
    config: dict[str, Any]


def _hub_folder(path: Path) -> HubFolder | None:
    """Returns the files of a folder as the hub has it; None for other folders, such as the workdir of a run."""
    weights = next((path / name for name in fetching.HUB_WEIGHTS if (path / name).is_file()), None)
    if weights is None or not (path / CONFIG).is_file():
        return None
    try:
        return HubFolder(weights, parsed("it", _beginning(path / CONFIG)))
    except (OSError, ValueError) as error:
        raise UserError(f"{path / CONFIG} cannot be read: {error}.") from None


def _beginning(path: Path) -> bytes:
    """Returns the content of a small file; of a larger one just enough to tell, since anybody may have written it."""
    with path.open("rb") as file:
        return file.read(MAX_CONFIG + 1)


def _newest_index(folder: Path) -> Path | None:
    """Returns the index of a folder's newest checkpoint of TensorFlow, or of its only one; None where none is."""
    try:
        indices = sorted(folder.glob("*.index"))
        text = _beginning(folder / NEWEST).decode() if (folder / NEWEST).is_file() else ""
        if len(text) > MAX_CONFIG:
            return None
    except (OSError, ValueError):  # nobody may look, or it is no text
        return None
    if named := _NEWEST_PATH.search(text):
        # Of the path, which is of the machine that wrote it, the name alone counts.
        newest = folder / f"{named[1].rpartition('/')[2]}.index"
        if newest in indices:
            return newest
        if indices:
            raise UserError(
                f"{folder / NEWEST} says that the newest checkpoint is {naming.shown(newest.stem)}, which is not "
                f"there; give one that is, such as {indices[0]}."
            )
    return indices[0] if len(indices) == 1 else None


def read_file(path: Path, config: Mapping[str, Any] = MappingProxyType({})) -> Pretrained:
    """Returns the network in a file of weights; see `reading.recognize` for the formats.

    Args:
      path: of the file.
      config: what stands beside the file about it: `config.json` of a folder as the hub has it.

    Raises:
      UserError: the file is damaged, or no network here has its arrays.
    """
    try:
        form = reading.recognize(path)
        contents = reading.read(path, form, MAX_BYTES)
        origin = {"file": str(path.absolute()), "sha256": _digest(path, "sha256")}
        is_published = form in KERAS_FORMS and fetching.is_published(_digest(path, "md5"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    arrays = {name: arrays[0] for name, arrays in contents.entries} if form not in KERAS_FORMS else {}
    if form == "tensorflow":
        pretrained = deeplab.recognize(arrays, path)
    elif form in KERAS_FORMS and DESCRIPTION in contents.config:  # `writing` put it there
        channels, said = description.checked(contents.config[DESCRIPTION], path)
        variables = keras_models.variables_of(contents, said["model"], channels, path)
        pretrained = Pretrained(variables=variables, channels=channels, **said)
    elif form in KERAS_FORMS:
        pretrained = keras_models.recognize(contents, path)
        if is_published:
            pretrained = pretrained._replace(normalize=PUBLISHED_NORMALIZE)
    else:
        config = contents.config | dict(config)
        if DESCRIPTION in config:
            pretrained = description.read(_parsed(config[DESCRIPTION], path), arrays, path)
        else:
            pretrained = torch_models.recognize(arrays, config, path)
    return pretrained._replace(origin=dict(pretrained.origin) | origin)


def _parsed(text: Any, path: Path) -> Any:
    """The description of a network, which is JSON in the metadata of a file."""
    try:
        return json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its description ({DESCRIPTION}) is no JSON: {error}.") from None


def from_run(run: Run) -> Pretrained:
    """Returns a run as any other network with weights, its variables in NumPy arrays."""
    return Pretrained(
        framework="xception_flax",
        model=run.recipe.model.to_dict(),
        variables=jax.tree.map(np.asarray, run.variables),
        channels=run.recipe.data.channels,
        class_names=run.class_names,
        image_size=run.recipe.data.image_size,
        transforms=run.recipe.data.eval_transforms,
        normalize={name: tuple(run.recipe.normalize[name]) for name in ("mean", "std")},
        activation=run.activation,
        origin={"step": run.step, "weights": run.weights},
        measured=run.measured(),
        min_decoded_side=run.recipe.data.min_decoded_side,
        max_value=run.recipe.data.max_value,
        orientation=run.recipe.data.orientation,
    )


def _digest(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _other_library(folder: Path) -> str:
    """What a folder of another library is, and what to do, for an error; '' for other folders."""
    names = set()
    with contextlib.suppress(OSError):  # it is not there, or nobody may look
        names = set(os.listdir(folder))
    if files := sorted(name for name in names if Path(name).suffix in SUFFIXES):
        return f"; it has a file of weights: give {folder / files[0]}"
    if "saved_model.pb" in names:
        return f"; this is a SavedModel of TensorFlow: {reading.REWRITE_KERAS}"
    if indices := sorted(name for name in names if name.endswith(".index")):
        return f"; it has {len(indices)} checkpoints of TensorFlow: give one, such as {folder / indices[0]}"
    if names & {"_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt"}:
        return "; this is a checkpoint of Orbax, and not of such a run"
    return ""
