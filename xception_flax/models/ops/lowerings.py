"""Which lowering of an operation a platform gets. Nothing outside of `ops` asks for one by a device's name."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.sharding import AbstractMesh, AxisType

from xception_flax.models.ops import tpu
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import suggest, written

LOWERINGS = ("platform", "stock", "fused")

_chosen: ContextVar[str] = ContextVar("lowering", default="platform")


@contextlib.contextmanager
def lowering(name: str) -> Iterator[None]:
    """Operations called within it are traced with this lowering.

    Args:
      name: 'platform', the default, is the best that was measured for each platform; 'stock' is XLA's own operation
        on all of them; 'fused' is 'platform', but with the kernels of `tpu` on TPUs where shapes allow: fewer bytes
        by the compiler's count, not yet timed on a TPU. A function under `jit` keeps the lowering that it was first
        traced with.

    Raises:
      ValueError: another name.
    """
    if name not in LOWERINGS:
        raise UserError(f"unknown lowering {name!r}; {suggest(name, LOWERINGS)}")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def check_lowering(name: str, device_kind: str) -> None:
    """Checks a recipe's `step.lowering` before anything is traced.

    Args:
      device_kind: what JAX calls the devices of the run.

    Raises:
      ValueError: another name than those of `LOWERINGS`, or one without kernels for these devices.
    """
    if name not in LOWERINGS:
        raise UserError(f"unknown step.lowering {written(name)}; {suggest(name, LOWERINGS)}")
    if name == "fused" and device_kind not in tpu.DEVICE_KINDS:
        raise UserError(
            f"step.lowering='fused' has kernels for {', '.join(tpu.DEVICE_KINDS)} only, and this is a {device_kind}; "
            "leave it out."
        )


def image_multiple(name: str) -> int:
    """Of how many images each device's share of a batch must be a multiple with this lowering."""
    return tpu.IMAGES if name == "fused" else 1


def fuses_chains() -> bool:
    """Whether a network in training leaves separable convolutions and their normalizations to one operation.

    That is `normalized_separable_convolution`. It computes the same everywhere; here it is also the faster one.
    """
    return chosen() == "fused" or (chosen() == "platform" and has_triton())


def chosen() -> str:
    """The lowering in context; within `shard_map` and over a mesh with Explicit axes it is always 'stock'.

    A type says there how an array is split, which the gradients that are written by hand do not.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return _chosen.get() if mesh.empty or is_auto(mesh) else "stock"


def has_triton() -> bool:
    """Whether what is traced now is for GPUs that Pallas has Triton for: NVIDIA's from Ampere (8.0) on.

    The mesh in context says what it is for, or else JAX's default device. Tracing a kernel takes time, so it is left
    out where nothing would run it.
    """
    kind = _kind_of_mesh() or jax.local_devices()[0].device_kind
    return kind != "cpu" and not kind.startswith("TPU") and all(map(_may_have_triton, jax.local_devices()))


def _kind_of_mesh() -> str | None:
    """What JAX calls the devices of the mesh in context; None without a mesh, or where it does not say."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return None if device is None else device.device_kind


def _may_have_triton(device: jax.Device) -> bool:
    if device.platform == "cpu":
        return True  # it compiles for a GPU that is elsewhere
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    return major.isdigit() and minor.isdigit() and int(major) >= 8  # AMD's are names, such as gfx90a


def lower(
    *operands: jax.Array,
    cpu: Callable[..., Any],
    stock: Callable[..., Any],
    cuda: Callable[..., Any] | None = None,
    **options: Any,
) -> Any:
    """Calls what is right for the platform, with the operands and the (hashable) options.

    Args:
      cpu: what CPUs get.
      stock: what all others get, and 'stock' has everywhere.
      cuda: what NVIDIA's GPUs get, if they have Triton; None for `stock`.
    """
    if chosen() == "stock":
        functions = {"default": stock}
    elif cuda is None or not has_triton():
        functions = {"cpu": cpu, "default": stock}
    elif _kind_of_mesh() in (None, "cpu"):
        functions = {"cpu": cpu, "cuda": cuda, "default": stock}
    else:  # no other platform runs it, and with several devices XLA would leave the choice in the program
        functions = {"default": cuda}
    return _lowered(*operands, functions=tuple(functions.items()), options=tuple(options.items()))


# Under jit an operation is traced and differentiated once for each shape, not once for each of the equal
# layers, and compiled once where the caller is not under jit.
@partial(jax.jit, static_argnames=("functions", "options"))
def _lowered(*operands, functions, options):
    named = {platform: partial(function, **dict(options)) for platform, function in functions}
    if len(named) == 1:
        return named["default"](*operands)
    return lax.platform_dependent(*operands, **named)


def is_auto(mesh: AbstractMesh) -> bool:
    """Whether XLA decides how arrays are split over every axis of the mesh."""
    return set(mesh.axis_types) == {AxisType.Auto}
