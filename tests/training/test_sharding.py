"""Meshes, and the sharding of batches and of the state."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from xception_flax.text.errors import UserError
from xception_flax.training import sharding


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [({}, (8, 1)), ({"fsdp": 2}, (4, 2)), ({"data": 2, "fsdp": -1}, (2, 4)), ({"data": 1, "fsdp": 8}, (1, 8))],
)
def test_mesh_covers_all_devices(sizes, shape):
    mesh = sharding.create_mesh(**sizes)
    assert dict(mesh.shape) == {"data": shape[0], "fsdp": shape[1]}


@pytest.mark.parametrize(
    ("sizes", "advice"),
    [
        ({"data": 3}, "set one of them, and only one, to -1"),
        ({"fsdp": 3}, "mesh.fsdp must divide their number: take 1 or 2 or 4 or 8"),
        ({"data": 3, "fsdp": -1}, "mesh.data must divide their number: take 1 or 2 or 4 or 8"),
        ({"data": -1, "fsdp": -1}, "set one of them, and only one, to -1"),
        ({"data": 0}, "set one of them, and only one, to -1"),
        ({"data": -2}, "set one of them, and only one, to -1"),
    ],
)
def test_bad_meshes_are_refused(sizes, advice):
    with pytest.raises(UserError, match=f"must cover the 8 devices exactly; {advice}"):
        sharding.create_mesh(**sizes)


@pytest.mark.parametrize(
    ("batch_size", "accumulation_steps", "message"),
    [
        (20, 1, "batch_size=20 does not divide over 8 devices; it must be a multiple of 8: take 16 or 24"),
        (4, 1, "multiple of 8: take 8"),
        (0, 1, "a positive multiple of 8: take 8"),
        (24, 0, "step.accumulation_steps must be at least 1, got 0"),
        (24, 2, "over 8 devices x step.accumulation_steps=2; it must be a multiple of 16: take 16 or 32"),
    ],
)
def test_batch_that_does_not_divide_is_refused(batch_size, accumulation_steps, message):
    with pytest.raises(UserError, match=message):
        sharding.check_batch_size(batch_size, sharding.create_mesh(), accumulation_steps)


def test_batch_that_divides_is_taken():
    sharding.check_batch_size(48, sharding.create_mesh(), 3)


def test_a_state_that_fits_no_device_is_refused(monkeypatch):
    """Each of eight virtual CPUs has an eighth of the host's memory, here 1 MB. The whole state takes 1.05 MB."""
    monkeypatch.setattr(sharding.allocator, "free_memory_bytes", lambda: 8_000_000)

    def state(mesh):
        shapes = {"kernel": jax.ShapeDtypeStruct((512, 512), np.float32)}
        return jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            shapes,
            sharding.state_shardings(mesh, shapes),
        )

    split, whole = sharding.create_mesh(fsdp=2), sharding.create_mesh()
    sharding.check_state_fits(split, state(split))
    with pytest.raises(
        UserError, match=r"take 0\.00105 GB on each device, which has 0\.001 GB; .*model\.width.*mesh\.fsdp"
    ):
        sharding.check_state_fits(whole, state(whole))


def test_state_rule():
    mesh = sharding.create_mesh(data=2, fsdp=4)
    shapes = {
        "small": (128, 256),
        "pointwise": (1, 1, 728, 1024),
        "equal": (1, 1, 728, 728),
        "odd": (3, 3, 1, 16_387),
        "scalar": (),
    }
    specs = jax.tree.map(
        lambda s: s.spec,
        sharding.state_shardings(mesh, {k: jax.ShapeDtypeStruct(v, np.float32) for k, v in shapes.items()}),
    )
    assert specs == {
        "small": PartitionSpec(),  # below 2**16 elements
        "pointwise": PartitionSpec(None, None, None, "fsdp"),
        "equal": PartitionSpec(None, None, None, "fsdp"),
        "odd": PartitionSpec(),  # no dimension divides by 4
        "scalar": PartitionSpec(),
    }


def test_state_is_whole_everywhere_without_fsdp():
    mesh = sharding.create_mesh()
    big = jax.ShapeDtypeStruct((2048, 2048), np.float32)
    assert sharding.state_shardings(mesh, big).spec == PartitionSpec()


def test_global_batch_is_split_over_both_axes():
    mesh = sharding.create_mesh(data=4, fsdp=2)
    images = np.arange(16 * 3, dtype=np.uint8).reshape(16, 3)
    batch = sharding.global_batch(mesh, {"images": images})
    assert [s.data.shape for s in batch["images"].addressable_shards] == [(2, 3)] * 8
    np.testing.assert_array_equal(batch["images"], images)
