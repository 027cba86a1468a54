"""Checkpoints: everything comes back bit for bit, onto any mesh, and damage is seen."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xception_flax import checkpoint, sharding
from xception_flax.state import TrainState

META = {"class_names": ["a", "b"]}


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
    return checkpoint.open_manager(path, best_metric="top1", **options)


@pytest.mark.parametrize("ema", [True, False])
def test_round_trip_onto_another_mesh(tmp_path, one_device, ema):
    """Saved from 8 devices in shares, read onto 1 and onto 2 x 4; bit for bit."""
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
        with pytest.raises(ValueError, match="checkpoints/3 cannot be used"):
            checkpoint.restore_variables(manager, template, "ema", 3)


def test_latest_and_best_are_kept(tmp_path, one_device):
    """Scores .1 .9 .3 .2 NaN: the two newest stay, and step 2, the best."""
    with open_manager(tmp_path, keep_latest=2, keep_best=1) as manager:
        for step, score in enumerate((0.1, 0.9, 0.3, 0.2, float("nan")), start=1):
            checkpoint.save(manager, make_state(one_device, step), META, {"top1": score})
    with open_manager(tmp_path) as manager:
        assert sorted(manager.all_steps()) == [2, 4, 5]
        assert checkpoint.find_step(manager, "best") == 2
        assert checkpoint.find_step(manager, "latest") == 5
        assert checkpoint.find_step(manager, "4") == 4
        for which in ("3", "newest", "-1"):
            with pytest.raises(ValueError, match=rf"no checkpoint '{which}' .*a step of: 2, 4, 5"):
                checkpoint.find_step(manager, which)


def test_no_checkpoint_and_no_evaluation(tmp_path, one_device):
    with open_manager(tmp_path) as manager:
        with pytest.raises(ValueError, match="has no checkpoint yet"):
            checkpoint.find_step(manager, "latest")
        checkpoint.save(manager, make_state(one_device, 1), META, None)
    with open_manager(tmp_path) as manager, pytest.raises(ValueError, match=r"no checkpoint .* has been evaluated"):
        checkpoint.find_step(manager, "best")


def test_saving_a_step_again_changes_nothing(tmp_path, one_device):
    with open_manager(tmp_path) as manager:
        checkpoint.save(manager, make_state(one_device, 5), META, None)
        checkpoint.check_saves(manager, wait=True)
        checkpoint.save(manager, make_state(one_device, 5), {"class_names": []}, None)
        checkpoint.check_saves(manager, wait=True)
        assert checkpoint.read_meta(manager, 5)["class_names"] == ["a", "b"]


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
            ValueError, match=r"checkpoints/1 cannot be used: .*; move this folder away to go on from step 2"
        ):
            checkpoint.restore_state(manager, abstract(state), 1)
        assert_equal(checkpoint.restore_state(manager, abstract(state), 2), make_state(one_device, 2))


def test_values_that_decode_and_are_wrong_are_seen(tmp_path, one_device):
    """The files are whole and decode; only the checksum tells."""
    state = make_state(one_device, 1)
    with open_manager(tmp_path) as manager:
        checkpoint.save(manager, state, META, None)
    meta = tmp_path / "checkpoints" / "1" / "meta" / "metadata"
    content = json.loads(meta.read_text())
    content["checksums"]["raw"]["['params']['bias']"] ^= 1
    meta.write_text(json.dumps(content))
    with (
        open_manager(tmp_path) as manager,
        pytest.raises(ValueError, match=r"the values of raw\['params'\]\['bias'\] have changed on disk"),
    ):
        checkpoint.restore_state(manager, abstract(state), 1)


def test_truncated_and_missing_files_are_seen(tmp_path, one_device):
    state = make_state(one_device, 1)
    with open_manager(tmp_path) as manager:
        checkpoint.save(manager, state, META, None)
    for path in (tmp_path / "checkpoints" / "1" / "optimizer").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with open_manager(tmp_path) as manager, pytest.raises(ValueError, match=r"cannot be used: .*; there is no other"):
        checkpoint.restore_state(manager, abstract(state), 1)
    (tmp_path / "checkpoints" / "1" / "meta" / "metadata").unlink()
    with open_manager(tmp_path) as manager, pytest.raises(ValueError, match="cannot be used"):
        checkpoint.read_meta(manager, 1)


def test_another_network_is_refused(tmp_path, one_device):
    state = make_state(one_device, 1)
    with open_manager(tmp_path) as manager:
        checkpoint.save(manager, state, META, None)
    other = abstract(state)
    kernel = jax.ShapeDtypeStruct((512, 255), jnp.float32, sharding=other.step.sharding)
    with open_manager(tmp_path) as manager, pytest.raises(ValueError, match="cannot be used"):
        checkpoint.restore_state(manager, other.replace(params=other.params | {"conv": {"kernel": kernel}}), 1)


@pytest.mark.parametrize(
    ("fields", "value"),
    [(("params",), np.nan), (("batch_stats", "ema_params"), np.inf), (("ema_batch_stats",), -np.inf)],
)
def test_weights_that_are_not_finite_are_neither_saved_nor_read(tmp_path, one_device, monkeypatch, fields, value):
    """Of both kinds, parameters and statistics; those of a checkpoint that an older version wrote are not used."""
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
        with pytest.raises(ValueError, match=rf"^{what} after step 2; checkpoints from before it are kept\. Lower"):
            checkpoint.save(manager, bad.replace(step=jnp.int32(2)), META, None)
        assert manager.all_steps() == [1]
        monkeypatch.setattr(checkpoint, "WEIGHTS", ())
        checkpoint.save(manager, bad.replace(step=jnp.int32(2)), META, None)
    monkeypatch.undo()
    with open_manager(tmp_path) as manager:
        refused = rf"/checkpoints/2 cannot be used: {what}; move this folder away to go on from step 1\.$"
        with pytest.raises(ValueError, match=refused):
            checkpoint.restore_state(manager, abstract(state), 2)
        variables = abstract(state).variables(item)
        with pytest.raises(ValueError, match=refused):
            checkpoint.restore_variables(manager, variables, item, 2)
        assert_equal(checkpoint.restore_state(manager, abstract(state), 1), state)


def test_optimizers_may_begin_at_infinity(tmp_path, one_device):
    """As optax' reduce_on_plateau does with the best value so far."""
    state = make_state(one_device, 1)
    state = state.replace(opt_state=(state.opt_state[0], jnp.float32(np.inf)))
    with open_manager(tmp_path) as manager:
        checkpoint.save(manager, state, META, None)
    with open_manager(tmp_path) as manager:
        assert_equal(checkpoint.restore_state(manager, abstract(state), 1), state)


def test_what_fails_at_the_end_hides_no_reason(tmp_path, monkeypatch):
    """A save that has failed meanwhile is said where nothing else is wrong."""

    def fail(manager):
        raise ValueError("RESOURCE_EXHAUSTED: no room\nand a stack")

    def close(other_error=None):
        with open_manager(tmp_path):
            monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "wait_until_finished", fail)
            if other_error:
                raise other_error

    failed = rf"^a checkpoint could not be written to {tmp_path}/checkpoints: RESOURCE_EXHAUSTED: no room; those before"
    with pytest.raises(ValueError, match=failed):
        close()
    monkeypatch.undo()
    with pytest.raises(KeyError, match="another"):
        close(KeyError("another"))


def test_checksums_see_a_change_and_a_swap_and_no_sharding():
    x = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    changed, swapped = x.copy(), x.copy()
    changed[5, 7] = np.nextafter(changed[5, 7], np.inf)
    swapped[[0, 1]] = swapped[[1, 0]]
    with jax.enable_x64(True):
        doubles = [int(checkpoint._checksums({"x": jnp.float64(v)})["['x']"]) for v in (1.0, 0.5)]
    assert doubles[0] != doubles[1]
    mesh = sharding.create_mesh()
    sharded = jax.device_put(x, sharding.batch_sharding(mesh))
    sums = [int(checkpoint._checksums({"x": v})["['x']"]) for v in (x, x.copy(), sharded, changed, swapped)]
    assert sums[0] == sums[1] == sums[2]
    assert len(set(sums)) == 3


def test_bad_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint\.keep_latest must be at least 1, got 0"):
        open_manager(tmp_path, keep_latest=0)
