"""Checksums of arrays, and which arrays are finite, in one pass over the data.

Orbax stores no checksum of the data, so it would miss a flipped bit. Paths are those of `jax.tree_util.keystr`.
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils

PyTree = Any


def inspect(tree: PyTree) -> tuple[dict[str, int], list[str]]:
    """Returns a uint32 for each leaf, by path, and the paths of the leaves with values that are not finite."""
    with_paths = jax.tree_util.tree_leaves_with_path(tree)
    paths, leaves = [jax.tree_util.keystr(path) for path, _ in with_paths], [leaf for _, leaf in with_paths]
    if all(map(_is_in_host_memory, leaves)):  # a program for hundreds of shapes would compile for ten seconds
        arrays = [np.asarray(_numbers(leaf)) for leaf in leaves]
        sums, finite = map(_checksum_on_host, arrays), map(_is_finite_on_host, arrays)
    else:
        sums, finite = jax.device_get(_inspect_all(leaves))
    not_finite = [path for path, is_finite in zip(paths, finite, strict=True) if not is_finite]
    return dict(zip(paths, map(int, sums), strict=True)), not_finite


def not_finite(tree: PyTree) -> list[str]:
    """Returns the paths of the leaves with values that are not finite."""
    return inspect(tree)[1]


def of_host_arrays(tree: PyTree) -> dict[str, int]:
    """Returns the checksums of arrays in host memory. It uses no device, so any thread may call it."""
    return {
        jax.tree_util.keystr(path): _checksum_on_host(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def sha256(tree: PyTree) -> str:
    """Returns the SHA-256 of all arrays: of path, type, shape and bytes of each, in the order of the paths.

    It names the values themselves, however they are stored or sharded. Each process must call it.
    """
    leaves = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    digest = hashlib.sha256()
    for path, leaf in sorted(leaves, key=lambda item: item[0]):
        whole = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated
        value = np.ascontiguousarray(leaf if whole else multihost_utils.process_allgather(leaf, tiled=True))
        digest.update(f"{path} {value.dtype} {np.shape(leaf)}\n".encode() + value.tobytes())
    return digest.hexdigest()


def _is_in_host_memory(x: Any) -> bool:
    """Whether this process has all of it without a copy from a device."""
    if not isinstance(x, jax.Array):
        return True
    return x.is_fully_addressable and all(device.platform == "cpu" for device in x.devices())


def _numbers(x: Any) -> Any:
    """Returns the integers of a random key; other arrays as they are."""
    return jax.random.key_data(x) if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


@jax.jit
def _inspect_all(leaves: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
    return [_checksum(leaf) for leaf in leaves], [_is_finite(leaf) for leaf in leaves]


def _is_finite(x: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(x)) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.bool_(True)


def _checksum(x: jax.Array) -> jax.Array:
    """Returns the sum of (bits x odd weight of the position) modulo 2^32. A change of one element always changes it.

    A sum of integers does not depend on their order, so the checksum does not depend on the sharding.
    """
    x = _numbers(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    if x.dtype.itemsize == 8:
        x = lax.bitcast_convert_type(x, jnp.uint32)  # two words an element
    bits = lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        position = position * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits * (2 * position * jnp.uint32(2654435761) + 1), dtype=jnp.uint32)


def _checksum_on_host(x: np.ndarray) -> int:
    """Returns the same checksum by NumPy."""
    x = np.ascontiguousarray(x).reshape(-1)
    if x.dtype == np.bool_:
        x = x.view(np.uint8)
    bits = x.view(f"uint{8 * min(x.dtype.itemsize, 4)}").astype(np.uint32)
    position = np.arange(bits.size, dtype=np.uint32)
    return int(np.sum(bits * (2 * position * np.uint32(2654435761) + np.uint32(1)), dtype=np.uint32))


def _is_finite_on_host(x: np.ndarray) -> bool:
    return not jnp.issubdtype(x.dtype, jnp.inexact) or bool(np.all(np.isfinite(x)))
