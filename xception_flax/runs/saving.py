"""Checks that the data of a run fits its checkpoint, and says when to save: by the clock, on request, without data."""

import contextlib
import itertools
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
from jax.experimental import multihost_utils

from xception_flax import data
from xception_flax.data.sources.tfds import REENCODED
from xception_flax.host import signals
from xception_flax.text.errors import UserError
from xception_flax.text.ranges import LARGEST
from xception_flax.training import checkpoint
from xception_flax.training.metrics import NotFinite
from xception_flax.training.state import TrainState

# Of a checkpoint whose evaluation was broken off: a run that goes on from there begins with it.
EVALUATION_DUE = "evaluation_due"

SKIPPED = "skipped_in_a_row"  # of a checkpoint: how many steps up to it were skipped one after the other


SAMPLES = "samples"  # of a checkpoint, by split: how many images, and digests of some of them
MAX_CHANGED = 0.25  # share of the samples that may have changed: a person may have repaired an image


def training_data(split: data.Split) -> dict[str, Any]:
    """Returns what a checkpoint keeps of its training data, as JSON values: classes, number of images, their size."""
    reencoding = data.reencoding_of(split.source)
    return {
        "class_names": list(split.class_names),
        "num_images": split.num_images,
        REENCODED: None if reencoding is None else reencoding._asdict(),
    }


def samples(train_data: data.Split, eval_data: data.Split) -> dict[str, Any]:
    """Returns what a checkpoint keeps of the images of both splits, as JSON values.

    Raises:
      data.InputError: one of the samples cannot be read.
    """
    splits = {"training": train_data, "evaluation": eval_data}
    return {SAMPLES: {name: {"images": len(each.source), "digests": each.samples()} for name, each in splits.items()}}


def check_same_data(
    saved: Mapping[str, Any], split: data.Split, workdir: Path, now: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Raises UserError if the checkpoint was trained on other classes, another number of images, other images or sizes.

    Args:
      saved: from `checkpoint.read_meta`.
      split: the training data of this run.
      workdir: of the run, for the message.
      now: from `samples`, to compare these too. Older checkpoints have none.
    """
    changed = [
        f"{key} was {str(saved.get(key))[:200]}, now it is {str(here)[:200]}"
        for key, here in training_data(split).items()
        if saved.get(key) != here
    ]
    for name, here in now.get(SAMPLES, {}).items():
        before = saved.get(SAMPLES, {}).get(name, here)
        if before["images"] != here["images"]:
            changed.append(f"the number of {name} images was {before['images']:,}, now it is {here['images']:,}")
        others = sum(old != new for old, new in zip(before["digests"], here["digests"], strict=True))
        if others > MAX_CHANGED * (looked_at := len(here["digests"])):
            changed.append(f"of {looked_at} {name} images that were looked at {others} are others")
    if changed:
        raise UserError(
            f"the data has changed since {workdir} was begun: {changed[0]}. Give the same data, or take a new workdir."
        )


class SaveClock:
    """Says when a checkpoint is due because so many minutes have passed since the last one, or since the start."""

    def __init__(self, minutes: float) -> None:
        self._minutes, self._last = minutes, time.monotonic()

    def saved(self) -> None:
        """Starts to count anew."""
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """Whether a checkpoint is due: by the clock of the first process. Every process must call it."""
        if self._minutes >= LARGEST:
            return False
        due = time.monotonic() - self._last >= 60 * self._minutes
        return bool(multihost_utils.broadcast_one_to_all(due)) if jax.process_count() > 1 else due


class StopTogether:
    """Says when a run is to stop on request: all its processes at the same call.

    Every process must call it equally often. With several, JAX lets them agree on the number of a call that none has
    made yet. The first call is number 1, so a request from before it counts too. Once a call has said so, all do.
    """

    def __init__(self, stop: signals.StopRequest) -> None:
        self._asked = False
        self._stop, self._calls = stop, itertools.count(1)

    def __call__(self) -> bool:
        self._asked = self._asked or self._is_asked()
        return self._asked

    def _is_asked(self) -> bool:
        if jax.process_count() == 1:
            return self._stop.signal is not None
        try:
            return multihost_utils.reached_preemption_sync_point(next(self._calls))
        except RuntimeError:  # the user has turned JAX's service off (`jax_enable_preemption_service`)
            return False


@contextlib.contextmanager
def advice_where_not_finite(manager: checkpoint.Checkpoints, workdir: Path) -> Iterator[None]:
    """A block of a run; where numbers in it are not finite, the error says what is saved and what to do.

    Args:
      manager: of the run's checkpoints.
      workdir: of the run.

    Raises:
      UserError: for NotFinite.
    """
    try:
        yield
    except NotFinite as error:
        with contextlib.suppress(UserError):  # of a save that is under way: the numbers are the reason
            checkpoint.check_saves(manager, wait=True)
        kept, good = _what_is_kept(manager)
        where = shlex.quote(str(workdir))  # to be pasted
        begin = f" from the start or, if it evaluates well, from there (--config.init.weights={where})" if good else ""
        found = "the first such step, " if error.first_step is None else ""
        at = "" if error.first_step is None else f" --step {error.first_step}"
        raise UserError(
            f"{error}; {kept}. Lower optimizer.learning_rate or clip gradients (optimizer.clip_norm), in a new "
            f"workdir{begin}; `xception-flax replay {where}{at}` names {found}the layer and the images."
        ) from error


def _what_is_kept(manager: checkpoint.Checkpoints) -> tuple[str, bool]:
    """Returns what the newest checkpoint is, and whether a run can begin from it."""
    step = checkpoint.newest_step(manager.folder)
    if not step:
        return "no checkpoint was written yet", False
    with contextlib.suppress(UserError):  # it is damaged
        if EVALUATION_DUE in checkpoint.read_meta(manager, step) and manager.metrics(step) is None:
            return f"the checkpoint of step {step:,}, which was not evaluated, has these weights", False
    return f"the checkpoint of step {step:,} is kept", True


@contextlib.contextmanager
def save_where_input_ends(
    manager: checkpoint.Checkpoints,
    state: Callable[[], TrainState],
    settle: Callable[[int], None],
    meta: Callable[[], dict[str, Any]],
) -> Iterator[None]:
    """Saves the state if the input ends in this block by a bad image, a file or a worker process, or stands still.

    With several processes one cannot save alone, so only the last checkpoint is left.

    Args:
      manager: of the run's checkpoints.
      state: returns the newest state.
      settle: is called before its step is saved; checks and records what is not recorded yet.
      meta: returns what `checkpoint.save` takes.

    Raises:
      data.InputError: the input has ended. The message says what is saved.
      signals.Stopped: it stood still when a signal came; so does its `left`.
      UserError: the reasons of `settle` and `checkpoint.save`.
    """
    try:
        yield
    except (data.InputError, signals.Stopped) as error:
        step = int(state().step)
        if jax.process_count() == 1 and step > (manager.latest_step() or 0):
            settle(step)
            checkpoint.save(manager, state(), meta(), None)
        checkpoint.check_saves(manager, wait=jax.process_count() == 1)
        last = manager.latest_step()
        left = (
            f"the checkpoint of step {last} is written; the same command goes on from there"
            if last
            else "no step was done"
        )
        if isinstance(error, signals.Stopped):
            error.left = f"stopped after step {step}, while it waited for images; {left}"
            raise
        raise type(error)(f"{error}\nStopped after step {step}; {left}.") from error
