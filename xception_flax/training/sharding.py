"""The mesh of devices, and the sharding of batches and of the state on it.

The mesh has two axes. Both split the batch; 'fsdp' also splits the large arrays of the state (parameters, optimizer,
averages), so that each device holds a share of them. Models do not know of the mesh: under `jit` over global arrays the
compiler inserts the collectives, and batch normalization sees the global batch.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from xception_flax.data.batch import Batch, Shapes
from xception_flax.host import allocator
from xception_flax.text.counting import counted
from xception_flax.text.errors import UserError
from xception_flax.text.ranges import check_range

PyTree = Any

BATCH_AXES = ("data", "fsdp")

# Gathering a smaller array costs more than its memory is worth: 64 Ki elements are 256 KiB.
MIN_SHARDED_ELEMENTS = 2**16


def create_mesh(data: int = -1, fsdp: int = 1, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh over all devices of all hosts, with axes ('data', 'fsdp').

    Args:
      data: devices that only split the batch; -1 for all that `fsdp` leaves.
      fsdp: devices that also split the state; -1 for all that `data` leaves.
      devices: to use in place of all devices, such as those of a machine that is only described.

    Raises:
      UserError: `data * fsdp` is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    sizes = {"data": data, "fsdp": fsdp}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) == 1 and fixed > 0 and count % fixed == 0:
        sizes[free[0]] = count // fixed
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != count:
        if len(free) == 1:
            other = "fsdp" if free == ["data"] else "data"
            divisors = [str(d) for d in range(1, count + 1) if count % d == 0]
            advice = f"mesh.{other} must divide their number: take {' or '.join(divisors)}"
        else:
            advice = "set one of them, and only one, to -1: it takes the rest"
        raise UserError(f"mesh: data={data} x fsdp={fsdp} must cover the {counted(count, 'device')} exactly; {advice}.")
    return jax.make_mesh(tuple(sizes.values()), BATCH_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def check_batch_size(batch_size: int, mesh: Mesh, accumulation_steps: int = 1) -> None:
    """Raises UserError unless every device gets the same number of images in each part of a step."""
    check_range("step.accumulation_steps", accumulation_steps, 1)
    parts = mesh.size * accumulation_steps
    if batch_size < 1 or batch_size % parts:
        factors = counted(mesh.size, "device") + (
            f" x step.accumulation_steps={accumulation_steps}" if accumulation_steps > 1 else ""
        )
        lower = batch_size // parts * parts
        near = f"{lower} or {lower + parts}" if lower > 0 else str(parts)
        multiple = "a multiple" if batch_size > 0 else "a positive multiple"
        raise UserError(
            f"batch_size={batch_size} does not divide over {factors}; it must be {multiple} of {parts}: take {near}."
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds completely."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its first dimension over all devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def state_shardings(mesh: Mesh, abstract_state: PyTree) -> PyTree:
    """Returns the sharding of each array of a state, which follows from its shape.

    An array of at least `MIN_SHARDED_ELEMENTS` is split over 'fsdp' along its largest dimension that 'fsdp' divides,
    the last of equal ones. All other arrays are replicated.
    """
    fsdp = mesh.shape["fsdp"]

    def rule(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        if fsdp > 1 and math.prod(leaf.shape) >= MIN_SHARDED_ELEMENTS:
            dims = [d for d in range(len(leaf.shape)) if leaf.shape[d] % fsdp == 0]
            if dims:
                largest = max(dims, key=lambda d: (leaf.shape[d], d))
                spec = [None] * len(leaf.shape)
                spec[largest] = "fsdp"
                return NamedSharding(mesh, PartitionSpec(*spec))
        return replicated(mesh)

    return jax.tree.map(rule, abstract_state)


def check_state_fits(mesh: Mesh, abstract_state: PyTree) -> None:
    """Raises UserError if a device's share of the state alone exceeds its memory.

    For CPU devices this is their share of the host's free memory.

    Args:
      mesh: of devices of this machine.
      abstract_state: shape, type and sharding of each array.
    """
    leaves = jax.tree.leaves(abstract_state)
    share = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    devices = mesh.local_devices
    memory = (devices[0].memory_stats() or {}).get("bytes_limit") or allocator.free_memory_bytes() // len(devices)
    if share > memory:
        raise UserError(
            f"parameters, averages and optimizer take {share / 1e9:,.3g} GB on each device, which has "
            f"{memory / 1e9:,.3g} GB; take a smaller network (model.width), or split them by mesh.fsdp."
        )


def abstract_batch(mesh: Mesh, shapes: Shapes) -> Batch[jax.ShapeDtypeStruct]:
    """Returns shapes, types and shardings of what `global_batch` returns, from the shapes of the global batch."""
    sharding = batch_sharding(mesh)
    arrays = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, (shape, dtype) in shapes.items()}
    return cast("Batch[jax.ShapeDtypeStruct]", arrays)


def global_batch(mesh: Mesh, local_batch: Batch[np.ndarray]) -> Batch[jax.Array]:
    """Returns a batch of global arrays, made of each host's part; see `global_array`."""
    arrays = {name: global_array(mesh, np.asarray(values)) for name, values in local_batch.items()}
    return cast("Batch[jax.Array]", arrays)


def global_array(mesh: Mesh, local: np.ndarray) -> jax.Array:
    """Returns an array of a batch, made of each host's rows of it: `[N / hosts, ...]` -> `[N, ...]`."""
    return jax.make_array_from_process_local_data(batch_sharding(mesh), local)
