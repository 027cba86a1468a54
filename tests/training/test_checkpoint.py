"""Checkpoints: everything comes back bit for bit, onto any mesh, and damage is detected."""

import contextlib
import errno
import json
import os
import re
import resource
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from shell import ROOT
from xception_flax.text.errors import UserError
from xception_flax.training import checkpoint, sharding
from xception_flax.training.metrics import NotFinite
from xception_flax.training.state import TrainState

ADVICE = "move this folder away to go on from step 1, or train with --config.checkpoint.on_damaged=older."
READERS_ADVICE = "take another, such as --checkpoint 1."
META = {"class_names": ["a", "b"]}


def exactly(reason: str, advice: str) -> str:
    """Returns a pattern for the whole of a message."""
    return f"^{re.escape(f'{reason}; {advice}')}$"


def make_state(mesh, step: int, *, ema: bool = True) -> TrainState:
    rng = np.random.default_rng(step)
    params = {
        "conv": {"kernel": rng.normal(size=(512, 256)).astype(np.float32)},
        "bias": np.float32(rng.normal(size=3)),
    }
    stats = {"mean": rng.normal(size=3).astype(np.float32)}
    state = TrainState(
        step=np.int32(step),
        params=params,
        batch_stats=stats,
        opt_state=({"trace": jnp.asarray(rng.normal(size=(512, 256)), jnp.bfloat16)}, np.int32(step)),
        ema_params=params if ema else None,
        ema_batch_stats=stats if ema else None,
    )
    return jax.tree.map(jax.device_put, state, sharding.state_shardings(mesh, state))


def abstract(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_equal(a: TrainState, b: TrainState) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


def open_manager(path, **options):
    return checkpoint.open_manager(path / "checkpoints", best_metric="top1", **options)


@pytest.mark.parametrize("ema", [True, False])
def test_round_trip_onto_another_mesh(tmp_path, one_device, ema):
    """Saved in shares by 8 devices, restored onto 1 device and onto 2 x 4, bit for bit."""
    saved = make_state(sharding.create_mesh(data=1, fsdp=8), 7, ema=ema)
    assert saved.params["conv"]["kernel"].addressable_shards[0].data.shape == (64, 256)
    with open_manager(tmp_path) as manager:
        checkpoint.save(manager, saved, META, {"top1": 0.5})
    for mesh in (one_device, sharding.create_mesh(data=2, fsdp=4)):
        expected = make_state(mesh, 7, ema=ema)
        with open_manager(tmp_path) as manager:
            restored = checkpoint.restore_state(manager, abstract(expected), 7)
            assert checkpoint.read_meta(manager, 7)["class_names"] == ["a", "b"]
        assert_equal(restored, saved)
        for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
            assert x.sharding == y.sharding


def test_variables_alone(tmp_path, one_device):
    state = make_state(one_device, 3, ema=False)
    with open_manager(tmp_path) as manager:
        checkpoint.save(manager, state, META, None)
    template = abstract(state).variables("raw")
    with open_manager(tmp_path, read_only=True) as manager:
        variables = checkpoint.restore_variables(manager, template, "raw", 3)
        np.testing.assert_array_equal(variables["params"]["conv"]["kernel"], state.params["conv"]["kernel"])
        with pytest.raises(UserError, match="checkpoints/3 cannot be used"):
            checkpoint.restore_variables(manager, template, "ema", 3)


def test_latest_and_best_are_kept(tmp_path, one_device):
    """With scores .1 .9 .3 .2 NaN, the two newest steps stay, and step 2, which is the best."""
    with open_manager(tmp_path, keep_latest=2, keep_best=1) as manager:
        for step, score in enumerate((0.1, 0.9, 0.3, 0.2, float("nan")), start=1):
            checkpoint.save(manager, make_state(one_device, step), META, {"top1": score})
    with open_manager(tmp_path) as manager:
        assert sorted(manager.all_steps()) == [2, 4, 5]
        assert checkpoint.find_step(manager, "best") == 2
        assert checkpoint.find_step(manager, "latest") == 5
        assert checkpoint.find_step(manager, "4") == 4
        for which in ("3", "newest", "-1"):
            with pytest.raises(UserError, match=rf"no checkpoint '{which}' .*a step of: 2, 4, 5"):
                checkpoint.find_step(manager, which)


@pytest.mark.parametrize(
    ("scores", "kept", "best"),
    [
        ((0.5, 0.9, 0.9, 0.3, 0.3), [2, 5], 2),
        ((0.9, 0.9, 0.9, 0.9), [1, 4], 1),
        ((float("nan"), float("nan"), 0.1), [3], 3),
        ((float("nan"), float("nan")), [1, 2], 1),
    ],
)
@pytest.mark.parametrize("loss", [{}, {"loss": 0.1}, {"loss": float("nan")}])
def test_of_equal_scores_the_earlier_is_best(tmp_path, one_device, scores, kept, best, loss):
    with open_manager(tmp_path, keep_latest=1, keep_best=1) as manager:
        for step, score in enumerate(scores, start=1):
            checkpoint.save(manager, make_state(one_device, step), META, {"top1": score} | loss)
            checkpoint.check_saves(manager, wait=True)
    with open_manager(tmp_path, keep_latest=1, keep_best=1) as manager:
        assert sorted(manager.all_steps()) == kept
        assert checkpoint.find_step(manager, "best") == best


@pytest.mark.parametrize(
    ("losses", "kept", "best"),
    [
        ((0.3, 0.2, 0.4), [2, 3], 2),
        ((0.3, 0.2, 0.2), [2, 3], 2),
        ((0.3, float("nan"), 0.4), [1, 3], 1),
    ],
)
def test_of_equal_accuracies_that_with_the_lower_loss_is_best(tmp_path, one_device, losses, kept, best):
    with open_manager(tmp_path, keep_latest=1, keep_best=1) as manager:
        for step, loss in enumerate(losses, start=1):
            checkpoint.save(manager, make_state(one_device, step), META, {"top1": 0.9, "loss": loss})
            checkpoint.check_saves(manager, wait=True)
    with open_manager(tmp_path, keep_latest=1, keep_best=1) as manager:
        assert sorted(manager.all_steps()) == kept
        assert checkpoint.find_step(manager, "best") == best


def test_no_checkpoint_and_no_evaluation(tmp_path, one_device):
    with open_manager(tmp_path) as manager:
        with pytest.raises(UserError, match="has no checkpoint yet"):
            checkpoint.find_step(manager, "latest")
        checkpoint.save(manager, make_state(one_device, 1), META, None)
    with open_manager(tmp_path) as manager, pytest.raises(UserError, match=r"no checkpoint .* has an evaluation"):
        checkpoint.find_step(manager, "best")


def test_saving_a_step_again_changes_nothing(tmp_path, one_device):
    with open_manager(tmp_path) as manager:
        checkpoint.save(manager, make_state(one_device, 5), META, None)
        checkpoint.check_saves(manager, wait=True)
        checkpoint.save(manager, make_state(one_device, 5), {"class_names": []}, None)
        checkpoint.check_saves(manager, wait=True)
        assert checkpoint.read_meta(manager, 5)["class_names"] == ["a", "b"]


def test_a_step_gets_the_metrics_that_it_lacks(tmp_path, one_device, monkeypatch):
    """Saved before its evaluation, it is not best; afterwards it is, here and for others, and counts for what is kept.

    A run that is killed while it writes them leaves nothing.
    """

    class Killed(BaseException):
        pass

    def kill(source: object, target: object) -> None:
        raise Killed

    with open_manager(tmp_path, keep_latest=1) as manager:
        checkpoint.save(manager, make_state(one_device, 1), META, {"top1": 0.5})
        checkpoint.save(manager, make_state(one_device, 2), META, None)
        checkpoint.check_saves(manager, wait=True)
        assert checkpoint.find_step(manager, "best") == 1
        with monkeypatch.context() as patched:
            patched.setattr(os, "rename", kill)
            with pytest.raises(Killed):
                checkpoint.save(manager, make_state(one_device, 2), META, {"top1": 0.75})
    with open_manager(tmp_path, keep_latest=1) as manager:
        assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]
        assert not (tmp_path / "checkpoints" / "2" / "metrics").exists()
        for score in (0.75, 0.25):  # the first is kept, as of every step
            checkpoint.save(manager, make_state(one_device, 2), META, {"top1": score})
        assert checkpoint.find_step(manager, "best") == 2
        with open_manager(tmp_path, read_only=True) as reader:
            assert (checkpoint.find_step(reader, "best"), reader.metrics(2)) == (2, {"top1": 0.75})
        checkpoint.save(manager, make_state(one_device, 3), META, {"top1": 0.0})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
    with open_manager(tmp_path) as manager:
        assert_equal(
            checkpoint.restore_state(manager, abstract(make_state(one_device, 2)), 2), make_state(one_device, 2)
        )


def test_a_flipped_bit_is_seen(tmp_path, one_device):
    """Orbax itself would restore it without a word."""
    state = make_state(one_device, 1)
    with open_manager(tmp_path) as manager:
        checkpoint.save(manager, state, META, None)
        checkpoint.save(manager, make_state(one_device, 2), META, None)
    files = [p for p in (tmp_path / "checkpoints" / "1" / "raw").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with open_manager(tmp_path) as manager:
        with pytest.raises(
            UserError, match=r"checkpoints/1 cannot be used: .*; move this folder away to go on from step 2"
        ):
            checkpoint.restore_state(manager, abstract(state), 1)
        assert_equal(checkpoint.restore_state(manager, abstract(state), 2), make_state(one_device, 2))


def test_values_that_decode_and_are_wrong_are_seen(tmp_path, one_device):
    """The files are complete and can be decoded. Only the checksum shows that they are wrong."""
    state = make_state(one_device, 1)
    with open_manager(tmp_path) as manager:
        checkpoint.save(manager, state, META, None)
    meta = tmp_path / "checkpoints" / "1" / "meta" / "metadata"
    content = json.loads(meta.read_text())
    content["checksums"]["raw"]["['params']['bias']"] ^= 1
    meta.write_text(json.dumps(content))
    with (
        open_manager(tmp_path) as manager,
        pytest.raises(UserError, match=r"the values of raw\['params'\]\['bias'\] have changed on disk"),
    ):
        checkpoint.restore_state(manager, abstract(state), 1)


def test_truncated_and_missing_files_are_seen(tmp_path, one_device):
    state = make_state(one_device, 1)
    with open_manager(tmp_path) as manager:
        checkpoint.save(manager, state, META, None)
    for path in (tmp_path / "checkpoints" / "1" / "optimizer").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with open_manager(tmp_path) as manager, pytest.raises(UserError, match=r"cannot be used: .*; there is no other"):
        checkpoint.restore_state(manager, abstract(state), 1)
    (tmp_path / "checkpoints" / "1" / "meta" / "metadata").unlink()
    with open_manager(tmp_path) as manager, pytest.raises(UserError, match="cannot be used"):
        checkpoint.read_meta(manager, 1)


def test_another_network_is_refused(tmp_path, one_device):
    state = make_state(one_device, 1)
    with open_manager(tmp_path) as manager:
        checkpoint.save(manager, state, META, None)
    other = abstract(state)
    kernel = jax.ShapeDtypeStruct((512, 255), jnp.float32, sharding=other.step.sharding)
    with open_manager(tmp_path) as manager, pytest.raises(UserError, match="cannot be used"):
        checkpoint.restore_state(manager, other.replace(params=other.params | {"conv": {"kernel": kernel}}), 1)


@pytest.mark.parametrize(
    ("fields", "value"),
    [(("params",), np.nan), (("batch_stats", "ema_params"), np.inf), (("ema_batch_stats",), -np.inf)],
)
def test_weights_that_are_not_finite_are_neither_saved_nor_read(tmp_path, one_device, monkeypatch, fields, value):
    """Parameters and statistics, raw and averaged. An older version may have written such a checkpoint."""
    state = make_state(one_device, 1)
    bad = state
    for field in fields:
        leaves, treedef = jax.tree.flatten(getattr(state, field))
        leaves[0] = leaves[0].at[-1].set(value)
        bad = bad.replace(**{field: jax.tree.unflatten(treedef, leaves)})
    item, collection = ("ema" if "ema" in fields[0] else "raw"), fields[0].removeprefix("ema_")
    array = {"params": "bias", "batch_stats": "mean"}[collection]
    what = rf"values of {item}\['{collection}'\]\['{array}'\] are not finite"
    with open_manager(tmp_path) as manager:
        checkpoint.save(manager, state, META, None)
        with pytest.raises(NotFinite, match=rf"^{what} after step 2$"):
            checkpoint.save(manager, bad.replace(step=jnp.int32(2)), META, None)
        assert manager.all_steps() == [1]
        monkeypatch.setattr(checkpoint, "_refused", lambda *_: [])
        checkpoint.save(manager, bad.replace(step=jnp.int32(2)), META, None)
    monkeypatch.undo()
    with open_manager(tmp_path) as manager:
        refused = rf"/checkpoints/2 cannot be used: {what}; {re.escape(ADVICE)}$"
        with pytest.raises(UserError, match=refused):
            checkpoint.restore_state(manager, abstract(state), 2)
        variables = abstract(state).variables(item)
        with pytest.raises(UserError, match=refused):
            checkpoint.restore_variables(manager, variables, item, 2)
        assert_equal(checkpoint.restore_state(manager, abstract(state), 1), state)


def test_optimizers_may_begin_at_infinity(tmp_path, one_device):
    """As optax's reduce_on_plateau does, for the best value so far."""
    state = make_state(one_device, 1)
    state = state.replace(opt_state=(state.opt_state[0], jnp.float32(np.inf)))
    with open_manager(tmp_path) as manager:
        checkpoint.save(manager, state, META, None)
    with open_manager(tmp_path) as manager:
        assert_equal(checkpoint.restore_state(manager, abstract(state), 1), state)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_moments_that_are_not_finite_are_neither_saved_nor_read(tmp_path, one_device, monkeypatch, value):
    """A weight whose second moment is infinite would stand still for ever, and every loss would be finite."""
    state = make_state(one_device, 2)
    trace = state.opt_state[0]["trace"].at[3, 4].set(value)
    bad = state.replace(opt_state=({"trace": trace}, state.opt_state[1]))
    what = r"optimizer\['opt_state'\]\[0\]\['trace'\]"
    assert [re.fullmatch(what, found) is not None for found in checkpoint.not_finite(bad)] == [True]
    assert checkpoint.not_finite(state) == []
    with open_manager(tmp_path) as manager:
        checkpoint.save(manager, make_state(one_device, 1), META, None)
        with pytest.raises(NotFinite, match=rf"^values of {what} are not finite after step 2$"):
            checkpoint.save(manager, bad, META, None)
        assert manager.all_steps() == [1]
        monkeypatch.setattr(checkpoint, "_refused", lambda *_: [])  # as an older version did
        checkpoint.save(manager, bad, META, None)
    monkeypatch.undo()
    with open_manager(tmp_path) as manager:
        with pytest.raises(UserError, match=rf"/checkpoints/2 cannot be used: values of {what} are not finite; "):
            checkpoint.restore_state(manager, abstract(state), 2)
        checkpoint.restore_variables(manager, abstract(state).variables("raw"), "raw", 2)  # the network is whole


def test_what_fails_at_the_end_hides_no_reason(tmp_path, monkeypatch):
    """A failed save raises on closing, unless another exception is being handled."""

    def fail(manager):
        raise ValueError("RESOURCE_EXHAUSTED: no room\nand a stack")

    def close(other_error=None):
        with open_manager(tmp_path):
            monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "wait_until_finished", fail)
            if other_error:
                raise other_error

    failed = rf"^a checkpoint could not be written to {tmp_path}/checkpoints: RESOURCE_EXHAUSTED: no room; "
    with pytest.raises(UserError, match=failed):
        close()
    monkeypatch.undo()
    with pytest.raises(KeyError, match="another"):
        close(KeyError("another"))


def test_bad_options_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"checkpoint\.keep_latest must be at least 1, got 0"):
        open_manager(tmp_path, keep_latest=0)


# Any disk and any names ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["lr=[0.1]", "a*b", "a?b", "back\\slash", "gs:", "~", "a #%$ b", "line\nbreak", "cafe\u0301", "caf\udce9"],
    ids=ascii,
)
def test_a_folder_of_any_name_keeps_its_checkpoints(tmp_path, one_device, name):
    """Orbax merges its files by a glob on the whole path. With a bracket in the path, it lost them silently."""
    for other in ("axb", "lr=0"):  # the patterns match these names too
        (tmp_path / other / "checkpoints").mkdir(parents=True)
    workdir = tmp_path / name
    with open_manager(workdir, keep_latest=1) as manager:
        for step in (1, 2):
            checkpoint.save(manager, make_state(one_device, step), META, {"top1": 0.5 / step})
    assert sorted(os.listdir(workdir / "checkpoints")) == ["1", "2"]
    with open_manager(workdir, read_only=True) as manager:
        state = make_state(one_device, 2)
        assert checkpoint.find_step(manager, "best") == 1
        assert_equal(checkpoint.restore_state(manager, abstract(state), 2), state)
        (workdir / "checkpoints" / "2" / "meta" / "metadata").unlink()
        with pytest.raises(UserError, match=rf"; {READERS_ADVICE}$") as error:
            checkpoint.read_meta(manager, 2)
    assert str(error.value).startswith(f"checkpoint {workdir}/checkpoints/2 cannot be used: ")
    assert "/proc/" not in str(error.value)


def test_a_step_that_may_not_be_read_is_named(tmp_path, one_device, monkeypatch):
    """As by its permissions, which do not hold for root."""
    with open_manager(tmp_path) as manager:
        checkpoint.save(manager, make_state(one_device, 1), META, {"top1": 0.5})
    is_dir = Path.is_dir

    def refuse(path: Path) -> bool:
        if path.name == "metrics":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(UserError, match=r"checkpoints/1 cannot be used: it cannot be read: Permission denied;"):
        open_manager(tmp_path)


def test_a_bucket_is_no_local_folder():
    """etils takes /gs/ and /s3/ for buckets, even if they are folders. A long path leaves no room for Orbax's names."""
    plain = ["/runs/1", "/data/lr=0.1,b=2/x_y-z", "/gsx/a", "/home/a b/caf\u00e9"]
    assert [bool(checkpoint.PLAIN_PATH.fullmatch(path)) for path in plain] == [True] * 4
    others = ["/gs/runs", "/s3/runs", "/a/gs:/b", "/a[1]", "/a\\b", "/a*", "/a?", "/caf\udce9", "/" + "x/" * 600]
    assert [bool(checkpoint.PLAIN_PATH.fullmatch(path)) for path in others] == [False] * 9


def test_a_step_gets_its_name_when_the_disk_has_all_of_it(tmp_path, one_device, monkeypatch):
    """Each file and folder of a step is synced after its last change and before the step is renamed.

    Then the parent folder is synced, then the older step is moved away, and then it is deleted.
    """
    events = []
    sync, rename, replace, remove = os.fsync, os.rename, os.replace, shutil.rmtree

    def fsync(descriptor):
        sync(descriptor)
        events.append(("sync", os.fstat(descriptor).st_ino, os.fstat(descriptor).st_ctime_ns))

    def renamed(source, target, **options):
        step = Path(target).name.isdecimal() and Path(target).parent.name == "checkpoints"
        if step:
            events.append(("content", *((p.stat().st_ino, p.stat().st_ctime_ns) for p in Path(source).rglob("*"))))
        rename(source, target, **options)
        if step:
            events.append(("rename", Path(target).name))

    def moved(source, target, **options):
        replace(source, target, **options)
        events.append(("move", Path(source).name))

    def removed(path, *args, **options):
        events.append(("remove", Path(path).name))
        remove(path, *args, **options)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", renamed)
    monkeypatch.setattr(os, "replace", moved)
    monkeypatch.setattr(shutil, "rmtree", removed)
    with open_manager(tmp_path, keep_latest=1, keep_best=0) as manager:
        for step in (1, 2):
            checkpoint.save(manager, make_state(one_device, step), META, {"top1": 0.5})
            checkpoint.check_saves(manager, wait=True)
    folder = (tmp_path / "checkpoints").stat().st_ino
    for step in ("1", "2"):
        at = events.index(("rename", step))
        _, *content = events[at - 1]
        synced = {event[1:] for event in events[:at] if event[0] == "sync"}
        assert len(content) > 20
        assert set(content) <= synced
        assert events[at + 1][:2] == ("sync", folder)
    assert at + 1 < events.index(("move", "1")) < events.index(("remove", checkpoint.REMOVED), at)
    assert not (tmp_path / "checkpoints" / checkpoint.REMOVED).exists()


def test_a_run_that_is_killed_while_it_deletes_an_old_step(tmp_path, one_device, monkeypatch):
    """From 4 CPUs on Orbax deletes in parallel, and first all files: a step without files would look damaged."""
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    state, folder = make_state(one_device, 1), tmp_path / "checkpoints"
    with monkeypatch.context() as patch, open_manager(tmp_path, keep_latest=1, keep_best=0) as manager:
        patch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)  # as if it were killed there, each time
        for step in (1, 2, 3):
            checkpoint.save(manager, make_state(one_device, step), META, {"top1": 0.5})
            checkpoint.check_saves(manager, wait=True)
            assert sorted(path.name for path in folder.iterdir() if path.name != checkpoint.REMOVED) == [str(step)]
    assert sorted(path.name for path in (folder / checkpoint.REMOVED).iterdir()) == ["1", "2"]
    with open_manager(tmp_path, keep_latest=1, keep_best=0) as manager:
        assert [path.name for path in folder.iterdir()] == ["3"]
        assert_equal(checkpoint.restore_state(manager, abstract(state), 3), make_state(one_device, 3))
        checkpoint.save(manager, make_state(one_device, 4), META, {"top1": 0.5})
        checkpoint.check_saves(manager, wait=True)
        assert [path.name for path in folder.iterdir()] == ["4"]


def files_of(folder, *items):
    return [path for item in items for path in sorted((folder / item).rglob("*")) if path.is_file()]


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("how", ["lost", "emptied", "other values"])
def test_a_step_that_is_not_kept_is_no_checkpoint(tmp_path, one_device, monkeypatch, how, step):
    """The first step is read back completely, later ones only in the files that describe them. Older steps stay."""
    sync_tree = checkpoint.files.sync_tree

    def break_it(folder):
        sync_tree(folder)
        if not folder.name.startswith(str(step)):
            return
        if how == "lost":
            shutil.rmtree(folder / "raw" / "d")
        elif how == "emptied":
            (folder / "optimizer" / "manifest.ocdbt").write_bytes(b"")
        else:
            meta = json.loads((folder / "meta" / "metadata").read_text())
            meta["checksums"]["ema"]["['params']['bias']"] ^= 1
            (folder / "meta" / "metadata").write_text(json.dumps(meta))

    monkeypatch.setattr(checkpoint.files, "sync_tree", break_it)
    kept = "checkpoints kept: 1" if step == 2 else "there is no earlier one"
    reasons = {
        "lost": "raw was written and cannot be read: ",
        "emptied": rf"it was written, but optimizer/manifest\.ocdbt is empty; {kept}\.$",
        "other values": rf"ema was written, but other values are read back; {kept}\.$",
    }
    with open_manager(tmp_path, keep_latest=1) as manager:
        for now in range(1, step):
            checkpoint.save(manager, make_state(one_device, now), META, {"top1": 0.5})
        checkpoint.save(manager, make_state(one_device, step), META, {"top1": 0.6})
        if how == "other values" and step == 2:  # only reading all values would show it
            checkpoint.check_saves(manager, wait=True)
            return
        with pytest.raises(UserError, match=rf"a checkpoint could not be written to .*checkpoints: {reasons[how]}"):
            checkpoint.check_saves(manager, wait=True)
    with open_manager(tmp_path, read_only=True) as manager:
        assert sorted(manager.all_steps()) == list(range(1, step))


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory, one_device):
    """A workdir with the evaluated steps 1, the best, and 2."""
    workdir = tmp_path_factory.mktemp("run")
    with open_manager(workdir) as manager:
        for step in (1, 2):
            checkpoint.save(manager, make_state(one_device, step), META, {"top1": 0.5 / step})
    return workdir


def read(workdir, which, state):
    return checkpoint.read_variables(
        workdir / "checkpoints", which, "raw", abstract(state).variables("raw"), best_metric="top1"
    )


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("meta/metadata", b"", "meta/metadata is empty"),
        ("meta/metadata", b'{"class_names"', "meta/metadata is no JSON object"),
        ("meta/metadata", b"[3]", "meta/metadata is no JSON object"),
        ("meta/metadata", b"{}", "meta/metadata is not of this program"),
        ("meta/metadata", None, "File {step}/meta/metadata not found"),
        ("metrics/metrics", b"", "metrics/metrics is empty"),
        ("metrics/metrics", b"null", "metrics/metrics is no JSON object"),
        ("metrics/metrics", b'{"loss": 1.0}', "metrics/metrics has no top1"),
        ("raw/_METADATA", b"", "raw/_METADATA is empty"),
        ("raw/array_metadatas/process_0", b"", "raw/array_metadatas/process_0 is empty"),
        ("raw/manifest.ocdbt", b"", "raw/manifest.ocdbt is empty"),
        ("raw", None, "it has no folder 'raw'"),
    ],
)
def test_what_is_damaged_is_named(tmp_path, two_steps, one_device, monkeypatch, file, content, reason):
    """To a run that goes on and to readers, for each file that is empty, cut off or wrong."""
    monkeypatch.setattr(checkpoint, "READ_AGAIN_SECONDS", 0)
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    step = tmp_path / "checkpoints" / "2"
    if content is not None:
        (step / file).write_bytes(content)
    elif (step / file).is_dir():
        shutil.rmtree(step / file)
    else:
        (step / file).unlink()
    line = f"checkpoint {step} cannot be used: {reason.format(step=step)}"
    state = make_state(one_device, 2)
    with pytest.raises(UserError, match=exactly(line, ADVICE)), open_manager(tmp_path) as manager:
        checkpoint.restore_state(manager, abstract(state), manager.latest_step())
    with pytest.raises(UserError, match=exactly(line, READERS_ADVICE)):
        read(tmp_path, "latest", state)
    shutil.rmtree(step)
    assert read(tmp_path, "latest", state)[0] == 1


def flip(file: Path) -> None:
    """Flips a bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize(
    ("hurt", "reason"),
    [
        (
            lambda step: flip(largest(step / "raw")),
            "the values of raw['params']['conv']['kernel'] have changed on disk",
        ),
        (
            lambda step: flip(largest(step / "optimizer")),
            "the values of optimizer['opt_state'][0]['trace'] have changed on disk",
        ),
        (lambda step: shutil.rmtree(step / "ema"), "it has no folder 'ema'"),
        (lambda step: (step / "metrics" / "metrics").write_text('{"loss": 1}'), "metrics/metrics has no top1"),
        (lambda step: (step / "meta" / "metadata").unlink(), "meta/metadata cannot be read: No such file"),
        (lambda step: (step / "meta" / "metadata").write_bytes(b""), "meta/metadata is empty"),
    ],
)
@pytest.mark.parametrize("name", ["run", "a [b]*"])
def test_a_run_goes_on_from_an_older_checkpoint_on_request(tmp_path, two_steps, one_device, name, hurt, reason):
    """The damaged one is kept, in another folder; a second one of its number is no obstacle."""
    workdir = shutil.copytree(two_steps, tmp_path / name)
    (workdir / "damaged" / "2").mkdir(parents=True)
    step, aside = workdir / "checkpoints" / "2", workdir / "damaged" / "2-2"
    hurt(step)
    content = {path.relative_to(step): path.read_bytes() for path in step.rglob("*") if path.is_file()}
    state = make_state(one_device, 1)
    older = {"on_damaged": "older", "abstract_state": abstract(state)}
    with open_manager(workdir, **older) as manager:
        (warning,) = manager.warnings
        assert manager.latest_step() == 1
        assert_equal(checkpoint.restore_state(manager, abstract(state), 1), state)
    assert warning.startswith(f"WARNING: checkpoint {step} is damaged: {reason}")
    assert warning.endswith(f" It was moved to {aside}; the newest whole one is of step 1.")
    assert content == {path.relative_to(aside): path.read_bytes() for path in aside.rglob("*") if path.is_file()}
    with open_manager(workdir, **older) as manager:
        assert (manager.warnings, manager.latest_step()) == ([], 1)


def test_the_best_checkpoint_may_be_the_damaged_one(tmp_path, two_steps, one_device):
    """Its files that describe it are read too, since without them the others cannot be compared."""
    workdir = shutil.copytree(two_steps, tmp_path / "run")
    (workdir / "checkpoints" / "1" / "metrics" / "metrics").write_bytes(b"null")
    state = make_state(one_device, 2)
    with open_manager(workdir, on_damaged="older", abstract_state=abstract(state)) as manager:
        assert len(manager.warnings) == 1
        assert manager.all_steps() == [2]


def test_checkpoints_on_another_disk_are_moved_within_it(tmp_path, two_steps, one_device):
    """`checkpoints` may be a link: a folder cannot be moved from one file system to another in one piece."""
    with contextlib.ExitStack() as stack:
        folders = (stack.enter_context(tempfile.TemporaryDirectory(dir=place)) for place in ("/dev/shm", ROOT))
        other = next(Path(each) for each in folders if os.stat(each).st_dev != tmp_path.stat().st_dev)
        shutil.copytree(two_steps / "checkpoints", other / "them")
        (tmp_path / "checkpoints").symlink_to(other / "them")
        flip(largest(other / "them" / "2" / "raw"))
        state = make_state(one_device, 1)
        with open_manager(tmp_path, on_damaged="older", abstract_state=abstract(state)) as manager:
            (warning,) = manager.warnings
            assert f"It was moved to {tmp_path}/checkpoints/damaged/2; the newest whole one is of step 1." in warning
        assert sorted(path.name for path in (other / "them").iterdir()) == ["1", "damaged"]
        with open_manager(tmp_path, on_damaged="older", abstract_state=abstract(state)) as manager:
            assert (manager.warnings, manager.all_steps()) == ([], [1])


def test_a_folder_that_cannot_be_read_is_no_damage(tmp_path, two_steps, one_device, monkeypatch):
    """As for a user without the right to it; for root there is none such."""
    workdir = shutil.copytree(two_steps, tmp_path / "run")
    closed, scandir = workdir / "checkpoints" / "2" / "raw", os.scandir

    def refuse(path: str) -> Any:
        if Path(path).name == "raw" and Path(path).parent.name == "2":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    state = abstract(make_state(one_device, 2))
    with pytest.raises(UserError, match=rf"^{closed} cannot be read: Permission denied\.$"):
        open_manager(workdir, on_damaged="older", abstract_state=state)
    monkeypatch.undo()
    assert sorted(path.name for path in workdir.iterdir()) == ["checkpoints"]


def test_where_no_checkpoint_is_whole_nothing_is_moved(tmp_path, two_steps, one_device):
    workdir = shutil.copytree(two_steps, tmp_path / "run")
    for step in ("1", "2"):
        flip(largest(workdir / "checkpoints" / step / "raw"))
    state = abstract(make_state(one_device, 2))
    expected = (
        r"^no checkpoint in .*/checkpoints can be used; the newest, 2: the values of raw.*\. Nothing was changed; "
        r"take a new workdir\.$"
    )
    with pytest.raises(UserError, match=expected):
        open_manager(workdir, on_damaged="older", abstract_state=state)
    assert sorted(path.name for path in workdir.iterdir()) == ["checkpoints"]
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["1", "2"]


def test_a_renamed_step_is_not_believed(tmp_path, two_steps, one_device):
    """Nor is an older checkpoint, whose meta has no step: the optimizer's step shows it."""
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    renamed = tmp_path / "checkpoints" / "300"
    (tmp_path / "checkpoints" / "2").rename(renamed)
    state = make_state(one_device, 2)
    line = f"checkpoint {renamed} cannot be used: it is of step 2: the folder was renamed; give it its name again"
    with pytest.raises(UserError, match=exactly(line, READERS_ADVICE)):
        read(tmp_path, "300", state)
    with open_manager(tmp_path) as manager:
        with pytest.raises(UserError, match=exactly(line, ADVICE)):
            checkpoint.read_meta(manager, manager.latest_step())
        meta = json.loads((renamed / "meta" / "metadata").read_text())
        assert meta.pop("step") == 2
        (renamed / "meta" / "metadata").write_text(json.dumps(meta))
        with pytest.raises(UserError, match=exactly(line, ADVICE)):
            checkpoint.restore_state(manager, abstract(state), 300)


def test_a_checkpoint_without_its_step_in_meta_is_read(tmp_path, two_steps, one_device):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoints" / "2" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    del meta["step"]
    path.write_text(json.dumps(meta))
    state = make_state(one_device, 2)
    assert read(tmp_path, "latest", state)[0] == 2
    with open_manager(tmp_path) as manager:
        assert_equal(checkpoint.restore_state(manager, abstract(state), 2), state)


def test_a_reader_is_not_warned_that_it_reads(two_steps, caplog):
    """From Python nobody has set the verbosity of absl, as the commands do."""
    with caplog.at_level("WARNING", "absl"), open_manager(two_steps, read_only=True) as manager:
        assert manager.all_steps()
    assert caplog.messages == []


def test_a_reader_looks_again_where_its_step_is_removed(tmp_path, two_steps, one_device, monkeypatch):
    """Between a reader's choice and its reading, the run saves step 3 and removes step 2, partly or completely."""
    monkeypatch.setattr(checkpoint, "READ_AGAIN_SECONDS", 0)
    state = make_state(one_device, 3)
    find_step = checkpoint.find_step
    for gone in ("2/meta", "2"):
        workdir = tmp_path / gone.replace("/", "_")
        shutil.copytree(two_steps, workdir)
        chosen = []

        def find_and_lose(manager, which, workdir=workdir, chosen=chosen, gone=gone):
            chosen.append(find_step(manager, which))
            if len(chosen) == 1:
                with open_manager(workdir) as run:
                    checkpoint.save(run, state, META, None)
                shutil.rmtree(workdir / "checkpoints" / gone)
            return chosen[-1]

        monkeypatch.setattr(checkpoint, "find_step", find_and_lose)
        step, _, variables = read(workdir, "latest", state)
        assert (step, chosen) == (3, [2, 3])
        np.testing.assert_array_equal(variables["params"]["bias"], state.params["bias"])
        with pytest.raises(UserError, match=r"no checkpoint '5' .*; take latest, best or a step of: "):
            read(workdir, "5", state)


def test_a_defect_in_reading_is_not_tried_again(two_steps, one_device, monkeypatch):
    tried = []
    monkeypatch.setattr(checkpoint, "find_step", lambda manager, which: int(tried.append(which) or "x"))
    with pytest.raises(ValueError, match="invalid literal for int"):
        read(two_steps, "latest", make_state(one_device, 2))
    assert tried == ["latest"]


def test_a_failed_save_leaves_no_thread(tmp_path, one_device, monkeypatch):
    """By default Orbax creates folders in the background. When one failed, six threads waited 300 s for it."""
    with open_manager(tmp_path) as manager:
        checkpoint.save(manager, make_state(one_device, 1), META, None)
        checkpoint.check_saves(manager, wait=True)
        before = set(threading.enumerate())
        mkdir = os.mkdir

        def refuse(path, *args, **options):
            if ocp.path.atomicity.TMP_DIR_SUFFIX in str(path):
                raise PermissionError(13, "Permission denied", str(path))
            mkdir(path, *args, **options)

        monkeypatch.setattr(os, "mkdir", refuse)
        with pytest.raises(UserError, match=r"could not be written to .*Permission denied.*; checkpoints kept: 1\.$"):
            checkpoint.save(manager, make_state(one_device, 2), META, None)
        for thread in set(threading.enumerate()) - before:
            thread.join(timeout=60)
        assert {t for t in threading.enumerate() if not t.daemon} <= before


def test_a_save_that_fails_in_the_background_is_found_without_waiting_for_it(tmp_path, one_device):
    """A limit on the size of files stands for a full disk. Orbax's own look for errors never finds it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def look() -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            checkpoint.check_saves(manager)
            time.sleep(0.05)

    with open_manager(tmp_path) as manager:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
            checkpoint.save(manager, make_state(one_device, 1), META, None)
            with pytest.raises(
                UserError, match=r"could not be written to .*: File too large; there is no earlier one\.$"
            ):
                look()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_system_that_fails_for_a_moment_costs_no_checkpoint(tmp_path, two_steps, one_device, monkeypatch):
    """What cannot be read is not damaged, and what can be read the second time is whole."""
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    older = {"on_damaged": "older", "abstract_state": abstract(make_state(one_device, 2))}
    open_file, failures = Path.open, [1]

    def fail(path: Path, *arguments: object, **options: object) -> object:
        if path.name == "_METADATA" and failures and failures.pop(0):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return open_file(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", fail)
    with open_manager(tmp_path, **older) as manager:
        assert (manager.latest_step(), manager.warnings, failures) == (2, [], [])
    failures += [1] * 9
    with pytest.raises(
        UserError, match=rf"^{tmp_path}/checkpoints/2/\w+/_METADATA cannot be read: Stale file handle\.$"
    ):
        open_manager(tmp_path, **older)
    assert not (tmp_path / "damaged").exists()


def test_a_folder_that_cannot_be_read_or_made_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    for attempt in (lambda folder: checkpoint.open_manager(folder, best_metric="top1"), checkpoint.has_steps):
        with pytest.raises(
            UserError, match=rf"the checkpoints in {tmp_path}/checkpoints cannot be read: Not a directory"
        ):
            attempt(tmp_path / "checkpoints")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (  # seen at two processes of which the second had not written its part
            "DEADLINE_EXCEEDED: Barrier timed out. Id: ThreadSaveMultiHostValueHolder:set_value_start::3. This usually",
            "a host has not written its part within 600 s; its file system may stand still; ",
        ),
        (
            "RESOURCE_EXHAUSTED: writing:\n[OS error 28: ENOSPC No space left on device]",
            "the disk is full; make room, and ",
        ),
        ("OUT_OF_RANGE: Failed writing: Failed to write 9 bytes: [os_error_code='27']", "File too large; there is"),
        ("INTERNAL: a\nb", "INTERNAL: a; there is no earlier one\\.$"),
    ],
)
def test_why_a_save_failed_is_found_in_what_libraries_say(tmp_path, error, reason):
    with open_manager(tmp_path) as manager:
        said = str(checkpoint._failed_save(manager, ValueError(error)))
        assert re.search(f"/checkpoints: {reason}", said), said
        (tmp_path / "checkpoints").rename(tmp_path / "moved")
        said = str(checkpoint._failed_save(manager, ValueError(error)))
        assert "the folder was removed or renamed meanwhile; there is no earlier one" in said
        (tmp_path / "moved").rename(tmp_path / "checkpoints")
