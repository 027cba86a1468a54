"""Checksums see every change of an array, and are the same on any devices and on the host."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xception_flax.training import checksums, sharding


def checksum(x) -> int:
    sums, not_finite = checksums.inspect({"x": x})
    assert not_finite == []
    return sums["['x']"]


def checksum_on_devices(x) -> int:
    """The same by the compiled program, as arrays that are not in the host's memory get it."""
    with mock.patch.object(checksums, "_is_in_host_memory", return_value=False):
        return checksum(x)


def test_checksums_see_a_change_and_a_swap_and_no_sharding():
    x = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    changed, swapped = x.copy(), x.copy()
    changed[5, 7] = np.nextafter(changed[5, 7], np.inf)
    swapped[[0, 1]] = swapped[[1, 0]]
    with jax.enable_x64(True):
        doubles = [checksum(jnp.float64(v)) for v in (1.0, 0.5)]
    assert doubles[0] != doubles[1]
    mesh = sharding.create_mesh()
    sharded = jax.device_put(x, sharding.batch_sharding(mesh))
    for check in (checksum, checksum_on_devices):
        sums = [check(v) for v in (x, x.copy(), sharded, changed, swapped)]
        assert sums[0] == sums[1] == sums[2]
        assert len(set(sums)) == 3


def test_sums_on_the_host_are_those_of_the_devices():
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float64, jnp.bfloat16, np.int32, np.uint8, np.bool_):
        for shape in ((), (3,), (4, 5, 6), (0, 3)):
            x = (50 * rng.normal(size=shape)).astype(dtype)
            with jax.enable_x64(True):
                assert checksums.of_host_arrays({"x": x})["['x']"] == checksum(jnp.asarray(x)) == checksum_on_devices(x)


@pytest.mark.parametrize("on_host", [True, False])
def test_what_is_not_finite_is_named(on_host):
    tree = {"a": jnp.ones(3), "b": jnp.ones((2, 2)).at[1, 1].set(jnp.nan), "c": jnp.int32(7), "d": jax.random.key(0)}
    tree["e"] = jnp.full(2, -jnp.inf, jnp.bfloat16)
    with mock.patch.object(checksums, "_is_in_host_memory", return_value=on_host):
        assert checksums.not_finite(tree) == ["['b']", "['e']"]


def test_the_sha256_names_the_values_and_not_their_place():
    """On one device or eight, as NumPy or JAX; another value, name, shape or type is another."""
    x = np.arange(64, dtype=np.float32).reshape(8, 8)
    sharded = jax.device_put(x, sharding.batch_sharding(sharding.create_mesh()))
    one = checksums.sha256({"a": x, "b": x[0]})
    assert one == checksums.sha256({"b": x[0], "a": sharded}) == checksums.sha256({"a": jnp.asarray(x), "b": x[0]})
    others = [
        {"a": x + 1, "b": x[0]},
        {"c": x, "b": x[0]},
        {"a": x.reshape(64), "b": x[0]},
        {"a": x.view(np.int32), "b": x[0]},
    ]
    assert len({one, *map(checksums.sha256, others)}) == 5
