"""The folder of a run: what lies in it, whose it is, and the recipe that it keeps."""

import contextlib
import fcntl
import functools
import os
import shlex
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from xception_flax.host.files import check_kind, file_errors, read_config, write_whole
from xception_flax.recipes.checking import resolve
from xception_flax.recipes.groups import OPERATIONAL, OPERATIONAL_GROUPS, PER_HOST
from xception_flax.text import naming
from xception_flax.text.errors import UserError
from xception_flax.training import checkpoint

# What a run writes there: this file, `history`, `curves`, `profiling` and `training.checkpoint`.
FILES = (".lock", "config.json", "metrics.jsonl", "curves.png")


FOLDERS = ("checkpoints", "tensorboard", "profile")


REPLACED = ("config.json", "metrics.jsonl")  # by new files at each start, whoever the old ones belong to


def recipe_to_json(config: ConfigDict) -> str:
    """The recipe as JSON text, keys sorted."""
    return naming.to_json(config.to_dict(), indent=2, sort_keys=True) + "\n"


def read_recipe(workdir: Path) -> ConfigDict:
    """Returns the recipe that `workdir` was trained with.

    Raises:
      ValueError: there is none, or it is not one of this version.
    """
    path = workdir / "config.json"
    with file_errors(path, "read"):
        if not path.is_file():
            raise UserError(f"{workdir} is no workdir of a run: it has no config.json{checkpoint.run_around(workdir)}.")
    recipe = read_config(path)
    try:
        return resolve(recipe)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Lines 'key: old -> new' for every key that differs and changes the result."""
    flat_old, flat_new = (_flatten(naming.from_json(recipe_to_json(config))) for config in (old, new))
    return [
        f"{key}: {flat_old.get(key, '(none)')!r} -> {flat_new.get(key, '(none)')!r}"
        for key in sorted(flat_old | flat_new)
        if flat_old.get(key) != flat_new.get(key)
        and key not in OPERATIONAL
        and key.partition(".")[0] not in OPERATIONAL_GROUPS
    ]


def alike(config: ConfigDict) -> dict[str, Any]:
    """The keys of a resolved recipe that all hosts of a run must have alike, by the name that a message gives them."""
    flat = _flatten(naming.from_json(recipe_to_json(config)))
    return {f"recipe key {key}": value for key, value in flat.items() if key not in PER_HOST}


def _flatten(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in recipe.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def check_workdir(workdir: Path, config: ConfigDict) -> None:
    """Raises ValueError where `workdir` cannot be written, or holds a run of another recipe or foreign files.

    Writes nothing.
    """
    _check_place(workdir, config)
    try:
        existing = next(path for path in (workdir, *workdir.parents) if path.exists())
        if not existing.is_dir():
            wrong = "is a file" if existing == workdir else f"lies in {existing}, which is a file"
            raise UserError(f"workdir {workdir} {wrong}; expected a folder, or a name that is free.")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise _not_writable(workdir, error) from None
    for name in FILES + FOLDERS:
        access = os.R_OK if name in REPLACED else os.R_OK | os.W_OK
        check_kind(workdir / name, folder=name in FOLDERS, access=access)
    if not (workdir / "config.json").is_file():
        foreign = [name for name in ("checkpoints", "metrics.jsonl", "curves.png") if (workdir / name).exists()]
        if foreign:
            raise UserError(
                f"workdir {workdir} has {', '.join(foreign)} and no config.json: not a run of this program, or a "
                "damaged one. Nothing was changed; take another workdir."
            )
    if (workdir / "config.json").is_file() and (changed := differences(read_recipe(workdir), config)):
        raise UserError(
            f"{workdir} holds a run of another recipe; nothing was changed. Take a new workdir, or the old values:\n  "
            + "\n  ".join(changed)
            + (f"\n{how_to_train_on(workdir)}" if _could_train_on(workdir, changed) else "")
        )


def _check_place(workdir: Path, config: ConfigDict) -> None:
    """Raises ValueError for a folder that an unset variable in a script, or a slip, names; a run in it goes on."""
    if (workdir / "config.json").is_file():
        return
    here, program = os.path.realpath(workdir), Path(__file__).parents[2]
    if config.data.source == "folder":
        images = os.path.realpath(os.path.expanduser(config.data.data_dir))
        if Path(images) in (
            Path(here),
            *Path(here).parents,
        ):  # where it would be taken for a class
            raise UserError(f"workdir {workdir} lies in the folder of the images, {images}; take one outside of it.")
    for place, what in (
        ("/", "the root of all folders"),
        ("~", "your home folder"),
        (program, "this program's folder"),
    ):
        if here == os.path.realpath(os.path.expanduser(place)):
            raise UserError(f"workdir {str(workdir)!r} is {what}; take a folder that is for this run alone.")


def how_to_train_on(workdir: Path) -> str:
    """A sentence for whoever wants more epochs of a run: its recipe stays as it is, and its weights begin another."""
    return (
        "To train its weights for more epochs, take a new workdir and "
        f"--config.init.weights={shlex.quote(str(workdir))}: that run begins with them (the averaged ones, where there "
        "are), its optimizer, schedule and steps anew."
    )


def _could_train_on(workdir: Path, changed: Sequence[str]) -> bool:
    """Whether what another recipe changes leaves the weights of the run in `workdir` as good."""
    groups = {line.partition(":")[0].partition(".")[0] for line in changed}
    return checkpoint.has_steps(workdir) and not groups & {"model", "normalize"}


@contextlib.contextmanager
def claim(workdir: Path, config: ConfigDict) -> Iterator[None]:
    """Makes `workdir`, with its `config.json`, and keeps every other run out of it meanwhile.

    The lock is the kernel's, on `workdir/.lock`: it goes with the process, however that ends. On a
    file system without locks there is none.

    Raises:
      ValueError: another process holds it, or the reasons of `check_workdir`.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / ".lock").open("a+")
    except OSError as error:
        raise _not_writable(workdir, error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            raise UserError(
                f"workdir {workdir} is in use by {holder} (it holds {file.name}); wait for its end, or take another."
            ) from None
        except OSError:  # no such locks here: as many shared file systems do without, so do we
            pass
        with file_errors(workdir / ".lock", "written"):
            file.truncate(0)
            file.write(_holder())
            file.flush()
        check_workdir(workdir, config)  # once more: another run may have begun here and ended since
        if not (workdir / "config.json").exists():
            remember(workdir, config)
        yield


CLAIM_AGAIN_SECONDS = 5.0


def check_claim(workdir: Path) -> None:
    """Raises ValueError where `workdir` is no longer what this process claimed: removed, renamed, or another run's.

    To be asked before something is written there: Orbax makes the folder again where it is gone.
    """
    lock = workdir / ".lock"
    try:
        try:
            holder = lock.read_text(errors="replace")
        except FileNotFoundError:
            raise
        except OSError:  # a network file system has such moments; a run of days must not end by one
            time.sleep(CLAIM_AGAIN_SECONDS)
            holder = lock.read_text(errors="replace")
    except OSError as error:
        raise UserError(
            f"workdir {workdir} was removed, renamed or closed to this run while it was going on "
            f"(.lock: {error.strerror}). Put it back, and the same command goes on from its newest checkpoint."
        ) from None
    if holder != _holder():
        raise UserError(f"workdir {workdir} now belongs to {holder or 'another run'}, by its .lock; this run ends.")


@functools.cache  # the name of a host may change, and its claims stay
def _holder() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _not_writable(workdir: Path, error: OSError) -> UserError:
    return UserError(f"workdir {workdir} cannot be written: {error.strerror}.")


def remember(workdir: Path, config: ConfigDict) -> None:
    """Writes `config.json`, whole or not at all, and a power cut does not undo it."""
    write_whole(workdir / "config.json", [recipe_to_json(config).encode()])
