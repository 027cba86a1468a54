"""Checkpoints by Orbax: a folder for each step, verified when it is written and when it is read.

A folder `STEP/` has the items `raw` (parameters and batch statistics), `ema` (their averages, if the recipe keeps
them), `optimizer` and `meta` (JSON: class names, number of images, initial weights, step, date and version, a checksum
of each array). Evaluation reads only `raw` or `ema`. The step is also the position in the data. Older checkpoints have
the recipe in `meta` too, which is not read: the workdir has it.
"""

import asyncio
import contextlib
import datetime
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from xception_flax import __version__
from xception_flax.host import files, processes
from xception_flax.text import naming
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import suggest, written
from xception_flax.text.ranges import check_range
from xception_flax.training import checksums, damage
from xception_flax.training.metrics import NotFinite
from xception_flax.training.state import TrainState

PyTree = Any

# The items of which everything must be finite, since every output depends on all weights. Of the optimizer all arrays
# must be: an infinite second moment would stop its weight for ever. Its single numbers may begin at infinity, as the
# best value so far of optax's reduce_on_plateau does.
WEIGHTS = ("raw", "ema")

# A host that has not written its part of a checkpoint so long after another has failed: its disk may stand still.
# One that gets an error (a full disk) tells the others at once; see `_Handler`.
HOSTS_DIFFER_SECONDS = 600

# A path that all libraries below read literally. Orbax takes `[`, `*` and a backslash for patterns; etils takes /gs/
# and /s3/ for buckets; TensorStore takes `gs:` for a bucket, and accepts only UTF-8.
PLAIN_PATH = re.compile(r"(?!/\w\w/)[\w/.,=+@ -]{1,1000}")

ON_DAMAGED = ("stop", "older")

METRICS = "metrics"  # Orbax's name for the item of an evaluation, a folder, and for the file in it

REMOVED = "removed"  # the folder to which a step is moved in one piece before its files are deleted; a run empties it

# A step may look damaged because the run is just removing it. A reader then tries again, up to so many times.
READ_TIMES, READ_AGAIN_SECONDS = 20, 0.5


Score = Callable[[dict[str, float]], tuple[float, float]]  # of the metrics of an evaluation; higher is better


class _Best(policies.PreservationPolicy):
    """Keeps the best evaluated steps: of equal scores the earlier. Orbax' own `BestN` keeps the later."""

    def __init__(self, score: Score, number: int) -> None:
        self._score, self._number = score, number

    def should_preserve(
        self, checkpoints: Sequence[policies.PolicyCheckpointInfo], *, context: policies.PreservationContext
    ) -> Sequence[bool]:
        evaluated = {each.step: self._score(each.metrics) for each in checkpoints if each.metrics is not None}
        best = _ranked(evaluated)[: self._number]
        return [each.step in best for each in checkpoints]


def _ranked(scores: Mapping[int, tuple[float, float]]) -> list[int]:
    """Returns the steps from the best to the worst: of equal scores the earlier is better."""
    return sorted(sorted(scores), key=scores.__getitem__, reverse=True)


@contextlib.contextmanager
def _not_told_that_it_only_reads() -> Iterator[None]:
    """Drops Orbax's warning that a folder is read only, which it was told itself. A user of `load` would see it."""

    def is_other(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("Given directory is read only")

    logger = logging.getLogger("absl")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


class Checkpoints(ocp.CheckpointManager):
    """Orbax's manager of a folder of checkpoints.

    Attributes:
      folder: the path that the user gave; `directory` is a plain path to the same folder.
      reading: whether nothing is saved or removed.
      verified: whether one saved step has been read back from the disk completely.
      warnings: about damaged steps that were moved away before it was opened.
    """

    def __init__(
        self,
        folder: Path,
        score: Score,
        preserved: policies.PreservationPolicy,
        read_only: bool,
    ) -> None:
        self.folder = folder
        self._score = score
        self.reading = read_only
        self.verified = False
        self.warnings: list[str] = []
        self._saving: dict[str, PyTree] = {}
        self._opened = contextlib.ExitStack()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preserved,
            best_fn=lambda metrics: score(metrics)[0],
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            save_interval_steps=0 if read_only else 1,  # with the next: what Orbax takes, and else warns that it does
            create=not read_only,
            # Orbax deletes a step file by file: killed meanwhile, it would leave a step that looks damaged.
            todelete_subdir=None if read_only else REMOVED,
            # If it fails in the background, threads remain that wait five minutes for it.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False, timeout_secs=HOSTS_DIFFER_SECONDS),
            temporary_path_class=_make_step_folder(self._check),
        )
        registry, handler = ocp.handlers.DefaultCheckpointHandlerRegistry(), _Handler(self._part_failed)
        for args in (ocp.args.StandardSave, ocp.args.StandardRestore):
            registry.add(None, args, handler)
        if not read_only or folder.is_dir():
            folder = self._opened.enter_context(_plain(folder))
        self._removed = None if read_only or jax.process_index() else folder / REMOVED
        if self._removed is not None:  # by a run that was killed meanwhile
            shutil.rmtree(self._removed, ignore_errors=True)
        try:
            with _not_told_that_it_only_reads():
                super().__init__(folder, options=options, handler_registry=registry)
        except BaseException:
            self._opened.close()
            raise

    def close(self) -> None:
        """Waits for a save that is under way, and closes the manager.

        Raises:
          UserError: the save has failed, and no other exception is being handled.
        """
        under_way = sys.exception()
        try:
            super().close()
        except Exception as error:
            if under_way is None:  # otherwise that exception is the reason, and this one most likely follows from it
                raise _failed_save(self, error) from error
        finally:
            self.delete_removed()
            self._opened.close()

    def delete_removed(self) -> None:
        """Deletes the steps that are no longer kept, unless a save is under way: it may be moving one there."""
        if self._removed is not None and self._removed.exists() and not self.is_saving_in_progress():
            shutil.rmtree(self._removed, ignore_errors=True)

    def best_step(self) -> int | None:
        """Returns the step with the best evaluation, see `open_manager`; None if none is evaluated."""
        evaluated = {step: metrics for step in self.all_steps() if (metrics := self.metrics(step)) is not None}
        return next(iter(_ranked({step: self._score(metrics) for step, metrics in evaluated.items()})), None)

    def reached_preemption(self, step: int) -> bool:
        """Returns False: Orbax would ask JAX with its own numbers, and the run asks with others (`StopTogether`)."""
        return False

    def add_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Gives a saved step the item `METRICS`, in one piece. No save may be under way.

        Raises:
          UserError: it cannot be written.
        """
        # What a kill leaves half done is removed from there when the run goes on.
        item, scratch = self.directory / str(step) / METRICS, self.directory / REMOVED / METRICS
        with files.file_errors(self.folder / str(step) / METRICS, "written"):
            scratch.mkdir(parents=True)
            (scratch / METRICS).write_text(json.dumps(metrics))
            files.sync_tree(Path(scratch))
            os.rename(scratch, item)
            files.sync(Path(item.parent))

    def message(self, error: Exception) -> str:
        """Returns the first line of an error, with `folder` in place of the plain path."""
        lines = str(error).replace(str(self.directory), str(self.folder)).strip().splitlines()
        return lines[0][:300].rstrip(".") if lines else type(error).__name__

    def expect(self, items: dict[str, PyTree]) -> None:
        """Sets the arrays that the steps saved from now on must have."""
        self._saving = _templates(items)

    def _part_failed(self, error: Exception) -> None:
        """Ends all processes of the run. One process alone goes on to where it looks for errors."""
        processes.end(2, f"error: {_failed_save(self, error)}")

    def _check(self, folder: Path) -> None:
        """Raises UserError if the step in `folder` is not what was saved.

        The first step is read completely and compared. Of later steps only the files that describe them are read. This
        runs in a thread of the first process alone, so it must not wait for other processes or use a device.
        """
        if wrong := damage.of_files(folder):
            raise UserError(f"it was written, but {wrong}")
        handler = ocp.StandardCheckpointHandler()
        if not self.verified:
            files.forget(folder)
        expected = json.loads((folder / "meta" / "metadata").read_bytes())["checksums"]
        for name, template in self._saving.items():
            path = self.directory / folder.name / name
            try:
                if self.verified:
                    handler.metadata(path)
                    continue
                read = handler.restore(path, args=ocp.args.StandardRestore(template))
            except Exception as error:
                raise UserError(f"{name} was written and cannot be read: {self.message(error)}") from error
            if checksums.of_host_arrays(read) != expected[name]:
                raise UserError(f"{name} was written, but other values are read back")
        self.verified = True


class _Handler(ocp.StandardCheckpointHandler):
    """Orbax's handler of arrays, which says at once that this process could not write its part.

    Orbax itself keeps such an error until all processes have waited for each other in vain, `HOSTS_DIFFER_SECONDS`.
    """

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        super().__init__()
        self._failed = failed

    async def async_save(self, *args: Any, **options: Any) -> list["_Part"]:  # pyrefly: ignore[bad-override]
        return [_Part(each, self._failed) for each in await super().async_save(*args, **options) or []]


class _Part:
    """A future of Orbax's: arrays that are being written."""

    def __init__(self, future: Any, failed: Callable[[Exception], None]) -> None:
        self._future, self._failed = future, failed

    def result(self, timeout: float | None = None) -> Any:
        try:
            return self._future.result(timeout)
        except Exception as error:
            self._failed(error)
            raise


@contextlib.contextmanager
def _plain(folder: Path) -> Iterator[Path]:
    """Yields a path to `folder` that is a `PLAIN_PATH`: itself, or that of an open file descriptor of this process."""
    if PLAIN_PATH.fullmatch(str(folder)):
        yield folder
        return
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        plain = Path(f"/proc/self/fd/{descriptor}")
        if not plain.is_dir():  # not Linux
            raise UserError(
                "its path is too long or has special characters; take one of letters, digits and . , = + @ _ -"
            )
        yield plain
    finally:
        os.close(descriptor)


def _templates(items: dict[str, PyTree]) -> dict[str, PyTree]:
    """Returns arrays of NumPy of the same shapes and types, which take no memory."""
    return jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), items)


def _make_step_folder(check: Callable[[Path], None]) -> type[ocp.path.atomicity.AtomicRenameTemporaryPath]:
    """Returns the type of folder that Orbax writes a step into.

    The folder gets the number of the step only when all its content is on the disk and has passed `check`. Only then
    does Orbax remove older steps. Orbax itself writes a last file while it renames the folder, so its rename goes to a
    second temporary name. After that nothing more is written.
    """
    suffix = ocp.path.atomicity.TMP_DIR_SUFFIX

    class StepFolder(ocp.path.atomicity.AtomicRenameTemporaryPath):
        @classmethod
        def from_final(cls, final_path: Any, **options: Any) -> Any:
            if final_path.name.isdecimal():  # otherwise it is an item in a step
                final_path = final_path.parent / (final_path.name + suffix)
            return super().from_final(final_path, **options)

        def get_final(self):
            written = super().get_final()
            return written.parent / written.name.removesuffix(suffix)

        async def finalize(self):
            await super().finalize()
            written, final = Path(super().get_final()), Path(self.get_final())
            if written != final:
                await asyncio.to_thread(commit, written, final)

    def commit(written: Path, final: Path) -> None:
        files.sync_tree(written)
        check(written)
        os.rename(written, final)
        files.sync(final.parent)

    return StepFolder


def open_manager(
    folder: Path,
    /,
    keep_latest: int = 2,
    keep_best: int = 1,
    on_damaged: str = "stop",
    *,
    best_metric: str,
    read_only: bool = False,
    abstract_state: TrainState | None = None,
) -> Checkpoints:
    """Returns the manager of a run's checkpoints: a context manager that waits for saves at its end.

    Args:
      folder: of the checkpoints; created if it does not exist.
      keep_latest: how many of the newest checkpoints to keep.
      keep_best: how many of the checkpoints with the best evaluation to keep beside them.
      on_damaged: what to do where a run resumes and its newest checkpoint is damaged: 'stop' names it and stops;
        'older' moves it to the folder `damaged` of the workdir, and the run goes on from the newest that is whole. All
        of it is read to find out.
      best_metric: the metric of an evaluation whose highest value is 'best'; of equal ones that with the lower loss,
        since few images make many equal, and then the earlier.
      read_only: save and remove nothing, since the run may still be going on.
      abstract_state: of the run that resumes; without it no checkpoint is moved. With it every process must call this.

    Raises:
      UserError: the folder cannot be read or created, a checkpoint's metrics are damaged, or no checkpoint is whole.
    """
    check_options(keep_latest, keep_best, on_damaged)

    def score(metrics: dict[str, float]) -> tuple[float, float]:
        value, loss = metrics[best_metric], metrics.get("loss", math.inf)
        return value if math.isfinite(value) else -math.inf, -loss if math.isfinite(loss) else -math.inf

    kept = [policies.LatestN(keep_latest)]
    if keep_best:  # both rules at once: `max_to_keep` with `best_fn` would delete the newest
        kept.append(_Best(score, keep_best))
    folder = folder.absolute()
    warnings = []
    if on_damaged == "older" and abstract_state is not None:
        if jax.process_index() == 0 and has_steps(folder):
            with _plain(folder) as plain:
                warnings = damage.set_aside(folder, plain, _templates(_items(abstract_state)), best_metric)
        multihost_utils.sync_global_devices("damaged checkpoints are moved")
    steps = _steps(folder)
    try:
        if folder.is_dir() and not read_only:  # to fail now, not at the first save
            with tempfile.TemporaryFile(dir=folder):
                pass
        manager = Checkpoints(folder, score, policies.AnyPreservationPolicy(kept), read_only)
        manager.warnings = warnings
    except Exception as error:  # Orbax also reads the metrics of all steps, which may be damaged
        for step in steps:
            if wrong := damage.of_files(folder / str(step)):
                raise _unusable(folder, step, wrong, read_only) from error
        raise UserError(f"the checkpoints in {folder} cannot be opened: {error}.") from error
    for step in manager.all_steps():
        try:
            evaluated = (folder / str(step) / METRICS).is_dir()
            wrong = damage.of_metrics(manager.metrics(step), best_metric) if evaluated else None
        except OSError as error:
            wrong = f"it cannot be read: {error.strerror}"
        if wrong:
            manager.close()
            raise _damaged(manager, step, UserError(wrong))
    return manager


def check_options(keep_latest: int, keep_best: int, on_damaged: str) -> None:
    """Raises UserError if a value for `open_manager` is out of its range. It opens nothing."""
    check_range("checkpoint.keep_latest", keep_latest, 1)
    check_range("checkpoint.keep_best", keep_best, 0)
    if on_damaged not in ON_DAMAGED:
        raise UserError(f"unknown checkpoint.on_damaged {written(on_damaged)}; {suggest(on_damaged, ON_DAMAGED)}")


def has_steps(folder: Path) -> bool:
    """Whether there is any checkpoint in `folder`, of a step after 0. It opens and creates nothing.

    Raises:
      UserError: the folder cannot be read.
    """
    return newest_step(folder) > 0


def newest_step(folder: Path) -> int:
    """Returns the step of the newest checkpoint in `folder`, 0 if there is none. It opens and creates nothing.

    Raises:
      UserError: the folder cannot be read.
    """
    return max(_steps(folder), default=0)


def _steps(folder: Path) -> list[int]:
    try:
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"the checkpoints in {folder} cannot be read: {error.strerror}.") from None


def save(
    manager: Checkpoints,
    state: TrainState,
    meta: dict[str, Any],
    metrics: dict[str, float] | None,
) -> None:
    """Saves `state` under its step, in the background.

    A step that is saved already is not saved again, but gets the metrics that it lacks.

    Args:
      manager: of the run's checkpoints.
      state: the training state.
      meta: JSON values for readers.
      metrics: of an evaluation of this state; None if there was none.

    Raises:
      NotFinite: `not_finite` finds something; nothing is saved.
      UserError: this save or the one before it failed (a full disk, say).
    """
    step = int(state.step)
    if step in manager.all_steps():
        if metrics is not None:
            _add_metrics(manager, step, metrics)
        return
    items, sums = _items(state), {}
    for name, item in items.items():
        sums[name], wrong = checksums.inspect(item)
        if wrong := _refused(name, item, wrong):
            raise NotFinite(f"{_places(name, wrong)} after step {step}")
    args = {name: ocp.args.StandardSave(item) for name, item in items.items()}
    saved = {"date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}", "version": __version__}
    args["meta"] = ocp.args.JsonSave(naming.stored(meta | {"step": step, "checksums": sums, "saved": saved}))
    manager.expect(items)
    try:
        manager.save(step, args=ocp.args.Composite(**args), metrics=metrics)
    except Exception as error:  # Orbax and TensorStore raise anything from KeyError to bare Exception
        raise _failed_save(manager, error) from error


def _add_metrics(manager: Checkpoints, step: int, metrics: dict[str, float]) -> None:
    """Adds the metrics to a saved step if it has none; every process must call it."""
    check_saves(manager, wait=True)
    if lacks_metrics(manager, step):
        if jax.process_index() == 0:
            manager.add_metrics(step, metrics)
        multihost_utils.sync_global_devices(f"metrics of step {step}")
        manager.reload()


def lacks_metrics(manager: Checkpoints, step: int) -> bool:
    """Whether a saved step was not evaluated, as the first process sees it; every process must call it.

    Others may see an older state of a network file system.
    """
    lacks = jax.process_index() == 0 and manager.metrics(step) is None
    return bool(multihost_utils.broadcast_one_to_all(lacks)) if jax.process_count() > 1 else lacks


def check_saves(manager: Checkpoints, *, wait: bool = False) -> None:
    """Raises UserError if a save in the background has failed (a full disk, say).

    Args:
      manager: of the run's checkpoints.
      wait: whether to wait for saves that are under way.
    """
    try:
        # An error of the background is raised by waiting alone (`check_for_errors` of Orbax has lost it by then), which
        # takes no time where nothing is under way.
        if wait or not manager.is_saving_in_progress():
            manager.wait_until_finished()
    except Exception as error:
        raise _failed_save(manager, error) from error
    manager.delete_removed()


def _failed_save(manager: Checkpoints, error: Exception) -> UserError:
    if not manager.folder.is_dir():
        reason = "the folder was removed or renamed meanwhile"
    elif re.search(r"no space left|ENOSPC|quota exceeded", str(error), re.IGNORECASE):
        reason = "the disk is full; make room, and the same command goes on"
    elif "barrier timed out" in str(error).lower():
        reason = f"a host has not written its part within {HOSTS_DIFFER_SECONDS} s; its file system may stand still"
    elif found := re.search(r"(?:os_error_code='|OS error )(\d+)", str(error)):  # TensorStore's, behind long paths
        reason = os.strerror(int(found[1]))
    else:
        reason = manager.message(error)
    kept = ", ".join(map(str, _steps(manager.folder)))
    kept = f"checkpoints kept: {kept}" if kept else "there is no earlier one"
    return UserError(f"a checkpoint could not be written to {manager.folder}: {reason}; {kept}.")


def find_step(manager: Checkpoints, which: str) -> int:
    """Returns the step that 'latest', 'best' or a number stands for.

    Raises:
      UserError: there is no such checkpoint.
    """
    steps = sorted(manager.all_steps())
    if not steps:
        raise UserError(f"{manager.folder} has no checkpoint yet.")
    if which == "latest":
        return steps[-1]
    if which == "best":
        best = manager.best_step()
        if best is None:
            raise UserError(f"no checkpoint in {manager.folder} has an evaluation; take --checkpoint latest or a step.")
        return best
    if which not in map(str, steps):  # compared as text, since int() refuses more than 4,300 digits
        raise UserError(
            f"no checkpoint {written(which)} in {manager.folder}; take latest, best or a step of: "
            f"{', '.join(map(str, steps))}."
        )
    return int(which)


def mesh_shape(manager: Checkpoints, step: int) -> tuple[int, ...] | None:
    """Returns the shape of the mesh that computed the checkpoint of `step`; None if its files do not say it."""
    try:
        found = ocp.StandardCheckpointHandler().metadata(manager.directory / str(step) / "raw")
    except Exception as error:  # Orbax and TensorStore raise anything from KeyError to bare Exception
        raise _damaged(manager, step, error) from None
    arrays = jax.tree.leaves(found.tree, is_leaf=lambda x: hasattr(x, "sharding"))
    shape = getattr(arrays[0].sharding, "shape", None)
    return None if shape is None else tuple(map(int, shape))


def differs(manager: Checkpoints, state: TrainState) -> list[str]:
    """Returns the arrays of `state` whose bits differ from the checkpoint of its step, such as raw['params']['x'].

    Raises:
      UserError: the checkpoint is damaged.
    """
    expected, different = read_meta(manager, int(state.step))["checksums"], []
    for name, item in _items(state).items():
        sums, _ = checksums.inspect(item)
        different += [f"{name}{path}" for path, found in sums.items() if found != expected.get(name, {}).get(path)]
    return different


def steps_in(manager: Checkpoints) -> list[int]:
    """Returns the steps that have a checkpoint, in order."""
    return sorted(manager.all_steps())


def restore_state(manager: Checkpoints, abstract_state: TrainState, step: int) -> TrainState:
    """Reads the whole state of `step`; each array gets the sharding of its leaf in `abstract_state`.

    Raises:
      UserError: the checkpoint is damaged, incomplete, of another network or of another step, or its weights are not
        finite.
    """
    items = _restore(manager, _items(abstract_state), step)
    if wrong := damage.of_name(int(items["optimizer"]["step"]), step):
        raise _unreadable(manager, step, wrong)
    return TrainState(
        step=items["optimizer"]["step"],
        opt_state=items["optimizer"]["opt_state"],
        params=items["raw"]["params"],
        batch_stats=items["raw"]["batch_stats"],
        ema_params=items["ema"]["params"] if "ema" in items else None,
        ema_batch_stats=items["ema"]["batch_stats"] if "ema" in items else None,
    )


def restore_variables(manager: Checkpoints, abstract_variables: PyTree, weights: str, step: int) -> PyTree:
    """Reads only the variables of `step`: the `weights` 'raw' or 'ema'.

    Raises:
      UserError: the checkpoint is damaged, has no such weights, is of another network or of another step, or the
        weights are not finite.
    """
    return _restore(manager, {weights: abstract_variables}, step)[weights]


def read_variables(
    folder: Path, which: str, weights: str, abstract_variables: PyTree, *, best_metric: str
) -> tuple[int, dict[str, Any], PyTree]:
    """Reads (step, meta, variables) of a run, which may be going on and removing older checkpoints meanwhile.

    Args:
      folder: of the run's checkpoints.
      which: 'latest', 'best' or the number of a step.
      weights: 'raw' or 'ema'.
      abstract_variables: as for `restore_variables`.
      best_metric: as for `open_manager`.

    Raises:
      UserError: there is no such checkpoint, or the reasons of `restore_variables`.
    """
    said = set()
    while True:
        try:
            with open_manager(folder, best_metric=best_metric, read_only=True) as manager:
                step = find_step(manager, which)
                return step, read_meta(manager, step), restore_variables(manager, abstract_variables, weights, step)
        except UserError as error:
            # The same error twice is not a removal in progress. With several processes, one cannot retry alone.
            if str(error) in said or len(said) == READ_TIMES or jax.process_count() > 1:
                raise
            said.add(str(error))
        time.sleep(READ_AGAIN_SECONDS)


def read_meta(manager: Checkpoints, step: int) -> dict[str, Any]:
    """Reads the JSON values of `step`.

    Raises:
      UserError: they are damaged, or of another step.
    """
    try:
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    except Exception as error:
        if missing := damage.of_items(manager.folder / str(step), ["meta"]):
            raise _unreadable(manager, step, missing) from None
        raise _damaged(manager, step, error) from None
    if wrong := damage.of_meta(meta):
        raise _damaged(manager, step, UserError(wrong))
    if "step" in meta:  # older checkpoints lack it, and their strings are not encoded by `naming.stored`
        meta = naming.restored(meta)
        if wrong := damage.of_name(meta["step"], step):
            raise _unreadable(manager, step, wrong)
    # Older checkpoints have the names of classes as on the disk, in composed or decomposed Unicode.
    return meta | {"class_names": list(map(naming.composed, meta["class_names"]))}


def not_finite(state: TrainState) -> list[str]:
    """Returns the arrays that keep a state from being saved, since they are not finite: raw['params'][...]."""
    return [
        f"{name}{path}"
        for name, item in _items(state).items()
        for path in _refused(name, item, checksums.not_finite(item))
    ]


def _refused(name: str, item: PyTree, paths: list[str]) -> list[str]:
    """Returns those of an item's `paths`, which are not finite, that must be; see `WEIGHTS`."""
    if name in WEIGHTS or not paths:
        return paths
    single = {jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(item) if not leaf.ndim}
    return [path for path in paths if path not in single]


def _items(state: TrainState) -> dict[str, PyTree]:
    items = {
        "raw": {"params": state.params, "batch_stats": state.batch_stats},
        "optimizer": {"step": state.step, "opt_state": state.opt_state},
    }
    if state.ema_params is not None:
        items["ema"] = {"params": state.ema_params, "batch_stats": state.ema_batch_stats}
    return items


def _restore(manager: Checkpoints, abstract_items: dict[str, PyTree], step: int) -> dict[str, PyTree]:
    expected = read_meta(manager, step)["checksums"]
    args = {name: ocp.args.StandardRestore(item) for name, item in abstract_items.items()}
    try:
        items = manager.restore(step, args=ocp.args.Composite(**args))
    except Exception as error:  # Orbax and TensorStore raise anything from KeyError to bare Exception
        if missing := damage.of_items(manager.folder / str(step), abstract_items):
            raise _unreadable(manager, step, missing) from None
        raise _damaged(manager, step, error) from None
    for name in abstract_items:
        sums, wrong = checksums.inspect(items[name])
        for path, checksum in sums.items():
            if checksum != expected.get(name, {}).get(path):
                raise _unreadable(manager, step, f"the values of {name}{path} have changed on disk")
        if wrong := _refused(name, items[name], wrong):
            raise _unreadable(manager, step, _places(name, wrong))
    return {name: items[name] for name in abstract_items}


# Damage --------------------------------------------------------------------------------------------


def _damaged(manager: Checkpoints, step: int, error: Exception) -> UserError:
    return _unreadable(manager, step, damage.of_files(manager.folder / str(step)) or manager.message(error))


def _unreadable(manager: Checkpoints, step: int, reason: str) -> UserError:
    return _unusable(manager.folder, step, reason, manager.reading)


def _places(name: str, paths: list[str]) -> str:
    others = f" and {len(paths) - 1} other arrays" if len(paths) > 1 else ""
    return f"values of {name}{paths[0]}{others} are not finite"


def _unusable(folder: Path, step: int, reason: str, reading: bool) -> UserError:
    other = max((other for other in _steps(folder) if other != step), default=0)
    if not other:
        advice = "there is no other"
    elif reading:
        advice = f"take another, such as --checkpoint {other}"
    else:
        aside = f"move this folder away to go on from step {other}"
        advice = f"{aside}, or train with --config.checkpoint.on_damaged=older"
    return UserError(f"checkpoint {folder / str(step)} cannot be used: {reason}", advice=advice)
