"""Checkpoints by Orbax: one folder a step, with everything in it, verified when read.

`workdir/checkpoints/STEP/` has the items `raw` (parameters and batch statistics), `ema` (their
averages, where the recipe keeps them), `optimizer` and `meta` (JSON: the recipe, the class names,
a checksum of every array). What only evaluates reads one of the first two. The position in the
data is the step.
"""

import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax import lax
from orbax.checkpoint import checkpoint_managers as policies

from xception_flax import naming
from xception_flax.lookup import written
from xception_flax.ranges import check_range
from xception_flax.state import TrainState

PyTree = Any


class _Manager(ocp.CheckpointManager):
    """Orbax' own, but that what fails at its end is said as other failed saves are."""

    def close(self) -> None:
        under_way = sys.exception()
        try:
            super().close()
        except Exception as error:
            if under_way is None:  # which is the reason, and this mostly its consequence
                raise _failed_save(self, error) from error


def open_manager(
    workdir: Path, *, best_metric: str, keep_latest: int = 2, keep_best: int = 1, read_only: bool = False
) -> ocp.CheckpointManager:
    """Returns the manager of a workdir's checkpoints; a context manager, which waits for saves at its end.

    Args:
      workdir: of the run.
      best_metric: evaluation metric that 'best' means the highest of.
      keep_latest: checkpoints to keep, the newest.
      keep_best: checkpoints to keep beside them, those with the highest `best_metric`.
      read_only: save and remove nothing, for a look into a run that may still be going on.
    """
    check_range("checkpoint.keep_latest", keep_latest, 1)
    check_range("checkpoint.keep_best", keep_best, 0)

    def score(metrics: dict[str, float]) -> float:
        value = metrics[best_metric]
        return value if math.isfinite(value) else -math.inf

    kept = [policies.LatestN(keep_latest)]
    if keep_best:  # both rules at once: `max_to_keep` with `best_fn` would delete the newest
        kept.append(policies.BestN(get_metric_fn=score, n=keep_best, keep_checkpoints_without_metrics=False))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(kept),
        best_fn=score,
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
    )
    return _Manager((workdir / "checkpoints").absolute(), options=options)


def has_steps(workdir: Path) -> bool:
    """Whether there is any checkpoint in `workdir`, found without opening or making anything."""
    folder = workdir / "checkpoints"
    return folder.is_dir() and any(path.name.isdecimal() for path in folder.iterdir())


def save(
    manager: ocp.CheckpointManager,
    state: TrainState,
    meta: dict[str, Any],
    metrics: dict[str, float] | None,
) -> None:
    """Saves `state` under its step, in the background; a step that is there already stays as it is.

    Args:
      meta: JSON values that the next reader needs.
      metrics: of an evaluation of this state, if there was one.

    Raises:
      ValueError: this save or the one before it failed (a full disk, say), or the weights are not finite.
    """
    step = int(state.step)
    if step in manager.all_steps():
        return
    items, sums = _items(state), {}
    for name, item in items.items():
        sums[name], not_finite = _inspect(item)
        if name in WEIGHTS and not_finite:
            raise ValueError(
                f"{_places(name, not_finite)} after step {step}; checkpoints from before it are kept. Lower "
                "optimizer.learning_rate or clip gradients (optimizer.clip_norm), in a new workdir."
            )
    args = {name: ocp.args.StandardSave(item) for name, item in items.items()}
    args["meta"] = ocp.args.JsonSave(naming.stored(meta | {"checksums": sums}))
    try:
        manager.save(step, args=ocp.args.Composite(**args), metrics=metrics)
    except Exception as error:  # Orbax and TensorStore raise anything from KeyError to bare Exception
        raise _failed_save(manager, error) from error


def check_saves(manager: ocp.CheckpointManager, *, wait: bool = False) -> None:
    """Raises ValueError where a save in the background has failed (a full disk, say).

    Args:
      wait: for the saves that are under way.
    """
    try:
        manager.wait_until_finished() if wait else manager.check_for_errors()
    except Exception as error:
        raise _failed_save(manager, error) from error


def _failed_save(manager: ocp.CheckpointManager, error: Exception) -> ValueError:
    lines = str(error).strip().splitlines()
    return ValueError(
        f"a checkpoint could not be written to {manager.directory}: "
        f"{lines[0][:300] if lines else type(error).__name__}; those before it are kept."
    )


def find_step(manager: ocp.CheckpointManager, which: str) -> int:
    """Returns the step that 'latest', 'best' or a number means.

    Raises:
      ValueError: there is no such checkpoint.
    """
    steps = sorted(manager.all_steps())
    if not steps:
        raise ValueError(f"{manager.directory} has no checkpoint yet.")
    if which == "latest":
        return steps[-1]
    if which == "best":
        best = manager.best_step()
        if best is None or manager.metrics(best) is None:
            raise ValueError(f"no checkpoint in {manager.directory} has been evaluated; take latest or a step.")
        return best
    if which not in map(str, steps):  # as text: Python reads no number of more than 4,300 digits
        raise ValueError(
            f"no checkpoint {written(which)} in {manager.directory}; take latest, best or a step of: "
            f"{', '.join(map(str, steps))}."
        )
    return int(which)


def restore_state(manager: ocp.CheckpointManager, abstract_state: TrainState, step: int) -> TrainState:
    """Reads the whole state of `step`, each array onto the devices that `abstract_state` says.

    Raises:
      ValueError: the checkpoint is damaged, incomplete or of another network, or its weights are not finite.
    """
    items = _restore(manager, _items(abstract_state), step)
    return TrainState(
        step=items["optimizer"]["step"],
        opt_state=items["optimizer"]["opt_state"],
        params=items["raw"]["params"],
        batch_stats=items["raw"]["batch_stats"],
        ema_params=items["ema"]["params"] if "ema" in items else None,
        ema_batch_stats=items["ema"]["batch_stats"] if "ema" in items else None,
    )


def restore_variables(manager: ocp.CheckpointManager, abstract_variables: PyTree, weights: str, step: int) -> PyTree:
    """Reads only the variables of `step`: `weights` is 'raw' or 'ema'.

    Raises:
      ValueError: the checkpoint is damaged, has no such weights or is of another network, or they are not finite.
    """
    return _restore(manager, {weights: abstract_variables}, step)[weights]


def read_meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """Reads the JSON values of `step`."""
    try:
        meta = naming.restored(manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"])
        # Older runs have the names as they are on their disk.
        return meta | {"class_names": list(map(naming.composed, meta["class_names"]))}
    except Exception as error:
        raise _unreadable(manager, step, error) from None


def _items(state: TrainState) -> dict[str, PyTree]:
    items = {
        "raw": {"params": state.params, "batch_stats": state.batch_stats},
        "optimizer": {"step": state.step, "opt_state": state.opt_state},
    }
    if state.ema_params is not None:
        items["ema"] = {"params": state.ema_params, "batch_stats": state.ema_batch_stats}
    return items


def _restore(manager: ocp.CheckpointManager, abstract_items: dict[str, PyTree], step: int) -> dict[str, PyTree]:
    expected = read_meta(manager, step)["checksums"]
    args = {name: ocp.args.StandardRestore(item) for name, item in abstract_items.items()}
    try:
        items = manager.restore(step, args=ocp.args.Composite(**args))
    except Exception as error:  # Orbax and TensorStore raise anything from KeyError to bare Exception
        raise _unreadable(manager, step, error) from None
    for name in abstract_items:
        sums, not_finite = _inspect(items[name])
        for path, checksum in sums.items():
            if checksum != expected[name].get(path):
                raise _unreadable(manager, step, ValueError(f"the values of {name}{path} have changed on disk"))
        if name in WEIGHTS and not_finite:
            raise _unreadable(manager, step, ValueError(_places(name, not_finite)))
    return {name: items[name] for name in abstract_items}


def _unreadable(manager: ocp.CheckpointManager, step: int, error: Exception) -> ValueError:
    lines = str(error).strip().splitlines()
    others = [s for s in manager.all_steps() if s != step]
    advice = f"move this folder away to go on from step {max(others)}" if others else "there is no other"
    return ValueError(
        f"checkpoint {manager.directory / str(step)} cannot be used: "
        f"{lines[0][:300] if lines else type(error).__name__}; {advice}."
    )


# Checksums -----------------------------------------------------------------------------------------


# Items that are weights: what is not finite in them is in all that is computed with them.
WEIGHTS = ("raw", "ema")


def _checksums(tree: PyTree) -> dict[str, int]:
    """A uint32 a leaf, by its path. Orbax stores no checksum of data: a flipped bit would go unseen."""
    return _inspect(tree)[0]


def _inspect(tree: PyTree) -> tuple[dict[str, int], list[str]]:
    """The checksums, and the paths of the leaves with values that are not finite: one program, one pass."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    paths = [jax.tree_util.keystr(path) for path, _ in leaves]
    sums, finite = jax.device_get(_inspect_all([leaf for _, leaf in leaves]))
    not_finite = [path for path, is_finite in zip(paths, finite, strict=True) if not is_finite]
    return dict(zip(paths, map(int, sums), strict=True)), not_finite


def not_finite(tree: PyTree) -> list[str]:
    """Returns the paths of the leaves with values that are not finite."""
    return _inspect(tree)[1]


def _places(name: str, paths: list[str]) -> str:
    others = f" and {len(paths) - 1} other arrays" if len(paths) > 1 else ""
    return f"values of {name}{paths[0]}{others} are not finite"


@jax.jit
def _inspect_all(leaves: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
    return [_checksum(leaf) for leaf in leaves], [_is_finite(leaf) for leaf in leaves]


def _is_finite(x: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(x)) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.bool_(True)


def _checksum(x: jax.Array) -> jax.Array:
    """Sum of bits x odd weight of the position, modulo 2^32: any one changed element changes it.

    Integers add up the same in every order, so it does not depend on how the array is sharded.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    if x.dtype.itemsize == 8:
        x = lax.bitcast_convert_type(x, jnp.uint32)  # two words an element
    bits = lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        position = position * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits * (2 * position * jnp.uint32(2654435761) + 1), dtype=jnp.uint32)
