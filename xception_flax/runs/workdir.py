"""The folder of a run: the names of its files, the process that holds it, and its recipe."""

import contextlib
import datetime
import functools
import json
import os
import re
import shlex
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from xception_flax.host.files import check_kind, file_errors, write_whole
from xception_flax.host.locks import try_lock
from xception_flax.recipes.checking import resolve
from xception_flax.recipes.comparing import differences, recipe_json
from xception_flax.text import naming
from xception_flax.text.errors import UserError
from xception_flax.training import checkpoint

LOCK = ".lock"  # locked by the process that trains; its content names that process
CONFIG = "config.json"  # the recipe, with all defaults filled in
HISTORY = "metrics.jsonl"  # see `history`
CURVES = "curves.png"
CHECKPOINTS = "checkpoints"  # see `training.checkpoint`
TENSORBOARD = "tensorboard"  # the history again, as events
PROFILE = "profile"  # see `profiling`

FILES = (LOCK, CONFIG, HISTORY, CURVES)
FOLDERS = (CHECKPOINTS, TENSORBOARD, PROFILE)
REPLACED = (CONFIG, HISTORY)  # new files take their place at each start, whoever owns the old ones

WRITE_ANEW = f" The command that began the run writes {CONFIG} anew in another workdir; copy it from there."

CLAIM_AGAIN_SECONDS = 5.0  # before a second try to read the lock


def stacks(workdir: Path) -> Path:
    """Returns where this process writes what its threads do if the run stands still; see `host.watchdog`."""
    return workdir / (f"stacks-{jax.process_index()}.txt" if jax.process_count() > 1 else "stacks.txt")


def mistakes_picture(split: str) -> str:
    """Returns the name of the picture of wrong predictions on a split of the data."""
    return f"mistakes_{_in_a_name(split)}.png"


def evaluation_record(split: str) -> str:
    """Returns the name of the record of an evaluation on a split of the data."""
    return f"evaluation_{_in_a_name(split)}.json"


def evaluation_predictions(split: str) -> str:
    """Returns the name of the file with what a network said of each image of a split."""
    return f"predictions_{_in_a_name(split)}.parquet"


def evaluation_page(split: str) -> str:
    """Returns the name of the page about an evaluation on a split of the data."""
    return f"report_{_in_a_name(split)}.html"


def _in_a_name(split: str) -> str:
    return re.sub(r"[^\w.+-]", "_", split)


def has_checkpoints(workdir: Path) -> bool:
    """Whether a run has saved a checkpoint. It opens and creates nothing.

    Raises:
      UserError: the folder cannot be read.
    """
    return checkpoint.has_steps(workdir / CHECKPOINTS)


def read_recipe(workdir: Path) -> ConfigDict:
    """Returns the recipe that `workdir` was trained with, resolved.

    Raises:
      UserError: there is none, it is damaged, or it is not one of this version.
    """
    path = workdir / CONFIG
    with file_errors(path, "read"):
        if not path.is_file():
            if not workdir.exists() and not run_around(workdir):
                raise UserError(f"there is no {workdir}; expected the workdir of a run.")
            advice = WRITE_ANEW if has_checkpoints(workdir) else ""
            raise UserError(f"{workdir} is no workdir of a run: it has no {CONFIG}{run_around(workdir)}.{advice}")
        content = path.read_bytes()
    try:
        values = naming.restored(json.loads(content))
        if not isinstance(values, dict):
            raise UserError(f"expected keys and values in braces, got {content[:40]!r}")
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise UserError(f"{path} is damaged: {reason}.{WRITE_ANEW}") from None
    try:
        return resolve(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def run_around(folder: Path) -> str:
    """Returns the end of an error message for a folder inside a workdir: what to give instead; '' for other folders."""
    folder = folder.absolute()
    for parent in folder.parents:
        if (parent / CONFIG).is_file() and has_checkpoints(parent):
            step = next((part for part in folder.relative_to(parent).parts if part.isdecimal()), None)
            return f": this is within one; give {parent}" + (f" and {step} as its checkpoint" if step else "")
    return ""


def _owner(folder: Path) -> Path | None:
    """Returns the workdir whose run writes and removes files in `folder`; None if there is none."""
    for parent in folder.parents:
        is_one_of_ours = folder.relative_to(parent).parts[0] in FOLDERS and (parent / CONFIG).is_file()
        if is_one_of_ours and ((parent / LOCK).is_file() or has_checkpoints(parent)):  # others have a config.json too
            return parent
    return None


def check_workdir(workdir: Path, config: ConfigDict) -> None:
    """Raises UserError if `workdir` cannot be written, or has a run of another recipe or foreign files.

    It writes nothing.
    """
    try:
        _check_place(workdir, config)
        existing = next(path for path in (workdir, *workdir.parents) if os.path.lexists(path))
        if not existing.is_dir():
            found = "a file" if existing.exists() else "a link to nothing"
            wrong = f"is {found}" if existing == workdir else f"lies in {existing}, which is {found}"
            raise UserError(f"workdir {workdir} {wrong}; expected a folder, or a name that is free.")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise _not_writable(workdir, error) from None
    for name in FILES + FOLDERS:
        access = os.R_OK if name in REPLACED else os.R_OK | os.W_OK
        check_kind(workdir / name, folder=name in FOLDERS, access=access)
    if not (workdir / CONFIG).is_file() and (foreign := _foreign(workdir)):
        more = f" and {len(foreign) - 3:,} more" if len(foreign) > 3 else ""
        advice = f" If it is one:{WRITE_ANEW.lower()}" if has_checkpoints(workdir) else ""
        raise UserError(
            f"workdir {workdir} has {', '.join(foreign[:3])}{more} and no {CONFIG}: not a run of this program, or a "
            f"damaged one. Nothing was changed; take another workdir.{advice}"
        )
    if (workdir / CONFIG).is_file() and (changed := differences(read_recipe(workdir), config)):
        raise UserError(
            f"{workdir} holds a run of another recipe; nothing was changed. Take a new workdir, or the old values:\n  "
            + "\n  ".join(changed)
            + (f"\n{how_to_train_on(workdir)}" if _could_train_on(workdir, changed) else "")
        )


def _foreign(workdir: Path) -> list[str]:
    """Returns the names in a folder that has no `CONFIG`, but for logs and what we, disks or file managers put."""
    # Ends such as nohup's and Slurm's, of this very run; `stacks` if it stood still before it began.
    ours = re.compile(rf"(\.|{re.escape(CONFIG)}|lost\+found).*|.*\.(log|out|err)|stacks(-\d+)?\.txt", re.DOTALL)
    try:
        return sorted(name for name in os.listdir(workdir) if not ours.fullmatch(name))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _not_writable(workdir, error) from None


def _check_place(workdir: Path, config: ConfigDict) -> None:
    """Raises UserError for a folder that only an unset variable in a script, or a slip, would name."""
    if (workdir / CONFIG).is_file():  # a run that was begun there goes on
        return
    here, program = os.path.realpath(workdir), Path(__file__).parents[2]
    if config.data.source == "folder":
        images = os.path.realpath(os.path.expanduser(config.data.data_dir))
        if Path(here).is_relative_to(images):  # where it would be taken for a class
            raise UserError(f"workdir {workdir} lies in the folder of the images, {images}; take one outside of it.")
    if run := _owner(Path(here)):  # it would remove this folder with its old checkpoints
        raise UserError(f"workdir {workdir} is within the files of another run, {run}; take one outside of it.")
    places = {"/": "the root of all folders", "~": "your home folder", program: "this program's folder"}
    for place, what in places.items():
        if here == os.path.realpath(os.path.expanduser(place)):
            raise UserError(f"workdir {str(workdir)!r} is {what}; take a folder that is for this run alone.")


def how_to_train_on(workdir: Path) -> str:
    """Returns a sentence on how to train a run's weights for more epochs, since its own recipe cannot change."""
    return (
        "To train its weights for more epochs, take a new workdir and "
        f"--config.init.weights={shlex.quote(str(workdir))}: that run begins with them (the averaged ones, where there "
        "are), its optimizer, schedule and steps anew."
    )


def _could_train_on(workdir: Path, changed: Sequence[str]) -> bool:
    """Whether the run in `workdir` has weights, and these changes of its recipe leave them as good."""
    groups = {line.partition(":")[0].partition(".")[0] for line in changed}
    return has_checkpoints(workdir) and not groups & {"model", "normalize"}


@contextlib.contextmanager
def claim(workdir: Path, config: ConfigDict) -> Iterator[None]:
    """Creates `workdir` with its `config.json`, and keeps every other run out of it during the block.

    The lock is that of `host.locks`, on the file `LOCK`.

    Raises:
      UserError: another process holds the lock, or the reasons of `check_workdir`.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / LOCK).open("a+")
    except OSError as error:
        raise _not_writable(workdir, error) from None
    with file:
        if not try_lock(file):
            file.seek(0)
            holder = file.read() or "another process"
            raise UserError(
                f"workdir {workdir} is in use by {holder} (it holds {file.name}); wait for its end, or take another."
            )
        with file_errors(workdir / LOCK, "written"):
            file.truncate(0)
            file.write(_holder())
            file.flush()
        check_workdir(workdir, config)  # once more: another run may have begun here and ended since
        if not (workdir / CONFIG).exists():
            remember(workdir, config)
        yield


def check_claim(workdir: Path) -> None:
    """Raises UserError if this process no longer has `workdir`: it was removed or renamed, or is another run's.

    Call it before writing there: Orbax would create a removed folder again.
    """
    lock = workdir / LOCK
    try:
        try:
            holder = lock.read_text(errors="replace")
        except FileNotFoundError:
            raise
        except OSError:  # a network file system may fail for a moment, which must not end a run of days
            time.sleep(CLAIM_AGAIN_SECONDS)
            holder = lock.read_text(errors="replace")
    except OSError as error:
        raise UserError(
            f"workdir {workdir} was removed, renamed or closed to this run while it was going on "
            f"({LOCK}: {error.strerror}). Put it back, or give its new name as --workdir: the same command goes on "
            "from its newest checkpoint."
        ) from None
    if holder != _holder():
        raise UserError(f"workdir {workdir} now belongs to {holder or 'another run'}, by its {LOCK}; this run ends.")


@functools.cache  # the name of the host may change during a run
def _holder() -> str:
    # Two containers may both be process 1 on a host of one name: the moment tells them apart.
    now = datetime.datetime.now(datetime.UTC)
    return f"process {os.getpid()} on {socket.gethostname()} since {now:%Y-%m-%d %H:%M:%S.%f} UTC"


def _not_writable(workdir: Path, error: OSError) -> UserError:
    return UserError(f"workdir {workdir} cannot be written: {error.strerror}.")


def remember(workdir: Path, config: ConfigDict) -> None:
    """Writes `config.json`, whole or not at all, even in a power cut."""
    write_whole(workdir / CONFIG, [recipe_json(config).encode()])
