"""Checksums see every change of an array, and are the same on any devices and on the host."""

import jax
import jax.numpy as jnp
import numpy as np

from xception_flax.training import checksums, sharding


def checksum(x) -> int:
    sums, not_finite = checksums.inspect({"x": x})
    assert not_finite == []
    return sums["['x']"]


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
    sums = [checksum(v) for v in (x, x.copy(), sharded, changed, swapped)]
    assert sums[0] == sums[1] == sums[2]
    assert len(set(sums)) == 3


def test_sums_on_the_host_are_those_of_the_devices():
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float64, jnp.bfloat16, np.int32, np.uint8, np.bool_):
        for shape in ((), (3,), (4, 5, 6), (0, 3)):
            x = (50 * rng.normal(size=shape)).astype(dtype)
            with jax.enable_x64(True):
                assert checksums.of_host_arrays({"x": x}) == {"['x']": checksum(x)}


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
