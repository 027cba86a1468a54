"""What is wrong with a checkpoint on the disk, and how a run goes on from an older one."""

import itertools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from xception_flax.host import files
from xception_flax.text.errors import UserError
from xception_flax.training import checksums

PyTree = Any

ASIDE = "damaged"  # the folder beside the checkpoints that damaged ones are moved to

JSON_FILES = ("_CHECKPOINT_METADATA", "_METADATA", "_sharding", "metadata", "metrics")


def of_files(folder: Path) -> str | None:
    """Returns which file of a step is empty or not valid JSON; None if no damage is found."""
    try:
        for path in _files(folder):
            name = path.relative_to(folder)
            if not path.stat().st_size:
                return f"{name} is empty"
            if path.name in JSON_FILES or path.parent.name == "array_metadatas":
                try:
                    described = isinstance(json.loads(path.read_bytes()), dict)
                except ValueError:
                    described = False
                if not described:
                    return f"{name} is no JSON object"
    except OSError as error:  # the run may also be removing the step
        return f"{error.filename} cannot be read: {error.strerror}"
    return None


def of_items(folder: Path, names: Iterable[str]) -> str | None:
    """Returns which item a step lacks. Orbax's own words for it are of its API."""
    missing = [name for name in names if not os.path.isdir(folder / name)]
    return f"it has no folder {missing[0]!r}" if missing else None


def of_meta(meta: Any) -> str | None:
    """Returns what is wrong with the JSON values of a step, as they are read."""
    names, sums = (meta.get("class_names"), meta.get("checksums")) if isinstance(meta, dict) else (None, None)
    named = isinstance(names, list) and all(isinstance(name, str) for name in names)
    summed = isinstance(sums, dict) and all(isinstance(of_item, dict) for of_item in sums.values())
    return None if named and summed else "meta/metadata is not of this program"


def of_metrics(metrics: Any, best_metric: str) -> str | None:
    """Returns what is wrong with the metrics of a step that was evaluated, as they are read."""
    fits = isinstance(metrics, dict) and isinstance(metrics.get(best_metric), int | float)
    return None if fits else f"metrics/metrics has no {best_metric}"


def of_name(saved: int, step: int) -> str | None:
    """Returns what is wrong if a step was saved under another number."""
    return None if saved == step else f"it is of step {saved}: the folder was renamed; give it its name again"


def of_values(folder: Path, templates: Mapping[str, PyTree]) -> str | None:
    """Returns which item of a step cannot be read, or has other values than were saved. All of it is read.

    It uses no device and waits for no process, so any thread may call it.

    Args:
      folder: of the step.
      templates: arrays of NumPy of the right shapes and types, by item.
    """
    if missing := of_items(folder, templates):
        return missing
    expected = json.loads((folder / "meta" / "metadata").read_bytes())["checksums"]
    for name, template in templates.items():
        try:
            read = ocp.StandardCheckpointHandler().restore(folder / name, args=ocp.args.StandardRestore(template))
        except Exception as error:  # Orbax and TensorStore raise anything from KeyError to bare Exception
            said = (str(error).replace(str(folder), folder.name).strip().splitlines() or [type(error).__name__])[0]
            return f"{name} cannot be read: {said[:300]}"
        sums = checksums.of_host_arrays(read)
        if changed := [path for path in sums if sums[path] != expected.get(name, {}).get(path)]:
            return f"the values of {name}{changed[0]} have changed on disk"
    return None


def set_aside(folder: Path, plain: Path, templates: Mapping[str, PyTree], best_metric: str) -> list[str]:
    """Moves damaged steps out of a folder of checkpoints, so that the newest one left is whole.

    The steps are read from the newest on until one is whole; of the others only the files that describe them are read.

    Args:
      folder: of the checkpoints. The steps go to the folder `ASIDE` beside it; to one in it if it is a link to, or the
        root of, another file system.
      plain: a path to the same folder that Orbax reads literally.
      templates: as for `of_values`.
      best_metric: the metric that every evaluated step must have.

    Returns:
      A warning for each step that was moved.

    Raises:
      UserError: none is whole, or a file of one cannot be read, whatever is in it. Nothing was moved.
    """
    damaged: dict[int, str] = {}
    whole = None
    steps = sorted((int(path.name) for path in folder.glob("*") if path.name.isdecimal()), reverse=True)
    for step in steps:
        if reason := _of_step(plain / str(step), templates if whole is None else {}, best_metric):
            # A file system that fails for a moment must not cost a checkpoint: it is looked at twice.
            _check_readable(plain / str(step), folder / str(step))
            reason = _of_step(plain / str(step), templates if whole is None else {}, best_metric)
        if reason:
            damaged[step] = reason
        elif whole is None:
            whole = step
    if damaged and whole is None:
        raise UserError(
            f"no checkpoint in {folder} can be used; the newest, {steps[0]}: {damaged[steps[0]]}. Nothing was changed; "
            "take a new workdir."
        )
    warnings = []
    same_disk = not damaged or folder.stat().st_dev == folder.parent.stat().st_dev  # it may be a link
    aside = (folder.parent if same_disk else folder) / ASIDE
    for step, reason in damaged.items():
        with files.file_errors(aside, "written"):
            place = _free(aside, str(step))
        with files.file_errors(folder / str(step), f"moved to {place}"):
            (folder / str(step)).rename(place)
        warnings.append(
            f"WARNING: checkpoint {folder / str(step)} is damaged: {reason}. It was moved to {place}; the newest whole "
            f"one is of step {whole}."
        )
    if damaged:
        files.sync(folder)
    return warnings


def _check_readable(folder: Path, shown: Path) -> None:
    """Raises UserError if a file of a step cannot be read; one that is not there has nothing to read."""
    try:
        for path in _files(folder):
            with path.open("rb") as file:
                while file.read(2**24):
                    pass
    except OSError as error:
        with files.file_errors(shown / Path(error.filename or folder).relative_to(folder), "read"):
            raise


def _files(folder: Path) -> list[Path]:
    """Returns all files in a folder. Raises OSError where one in it cannot be read, which `rglob` would pass over."""

    def failed(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # the run may be removing it
            raise error

    found = (Path(where) / name for where, _, names in os.walk(folder, onerror=failed) for name in names)
    return sorted(path for path in found if path.is_file())


def _free(folder: Path, name: str) -> Path:
    """Returns a path in `folder`, which is created, that is not taken: NAME, NAME-2, ..."""
    folder.mkdir(exist_ok=True)
    taken = {path.name for path in folder.iterdir()}
    names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
    return folder / next(each for each in names if each not in taken)


def _of_step(folder: Path, templates: Mapping[str, PyTree], best_metric: str) -> str | None:
    if found := of_files(folder):
        return found
    try:
        meta = json.loads((folder / "meta" / "metadata").read_bytes())
        evaluated = (folder / "metrics").is_dir()
        measured = json.loads((folder / "metrics" / "metrics").read_bytes()) if evaluated else None
    except OSError as error:
        return f"{Path(error.filename).relative_to(folder)} cannot be read: {error.strerror}"
    found = of_meta(meta) or (of_metrics(measured, best_metric) if evaluated else None)
    return found or of_name(meta.get("step", int(folder.name)), int(folder.name)) or of_values(folder, templates)
