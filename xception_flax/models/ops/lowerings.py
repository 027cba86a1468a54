"""The choice of each operation's lowering by platform. Nothing outside `ops` chooses one by a device's name."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType

from xception_flax.models.ops import tpu
from xception_flax.text.errors import UserError
from xception_flax.text.lookup import suggest, written

LOWERINGS = ("platform", "portable", "stock", "fused")

_chosen: ContextVar[str] = ContextVar("lowering", default="platform")


@contextlib.contextmanager
def lowering(name: str) -> Iterator[None]:
    """Returns a context in which operations are traced with this lowering.

    A function under `jit` keeps the lowering with which it was first traced.

    Args:
      name: 'platform', the default, is the fastest that was measured for each platform (of GPUs on an H100 and an H200
        alone, and all from Ampere on get the same); 'portable' is the same without kernels of Pallas, which no later
        version of JAX promises to run from a file; 'stock' is XLA's own operation on all platforms; 'fused' is
        'platform', but with the kernels of `tpu` on TPUs where shapes allow, for Xception networks in training. They
        take a multiple of 16 images a chip. They move fewer bytes by the compiler's count, and have not been timed on a
        TPU yet.

    Raises:
      UserError: an unknown name.
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
      name: one of `LOWERINGS`.
      device_kind: JAX's name of the devices of the run.

    Raises:
      UserError: an unknown name, or a lowering without kernels for these devices.
    """
    if name not in LOWERINGS:
        raise UserError(f"unknown step.lowering {written(name)}; {suggest(name, LOWERINGS)}")
    if name == "fused" and device_kind not in tpu.DEVICE_KINDS:
        raise UserError(
            f"step.lowering='fused' has kernels for {', '.join(tpu.DEVICE_KINDS)} only, and this is a {device_kind}; "
            "leave it out."
        )


# jaxlib 0.10 leaves products and convolutions on CPUs to its library YNN, this all of them to Eigen.
_BY_EIGEN = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
_LARGE = 128  # pixels a side


def compiler_options(platform: str, height: int, width: int) -> dict[str, str] | None:
    """Returns the options of XLA with which a forward pass is fastest, for `jax.jit(..., compiler_options=...)`.

    On CPUs they change who computes products and convolutions: a forward pass of 8 images of 299 px takes 0.91 of the
    time on an AMD EPYC and 0.83 on an Intel Xeon with AVX-512, of 128 px 0.91 of the CPU time. Of 96 px and less it
    takes up to 1.1 times as long, so these have none. Values differ by rounding. The options are experimental; a jaxlib
    that does not know them runs without.

    Args:
      platform: of the devices, as `jax.Device.platform`.
      height: of the images, in pixels.
      width: the same.

    Returns:
      The options; None for XLA's own.
    """
    large = platform == "cpu" and min(height, width) >= _LARGE
    return dict(_BY_EIGEN) if large and _has_eigen_option() else None


@cache
def _has_eigen_option() -> bool:
    try:
        jax.jit(jnp.negative, compiler_options=_BY_EIGEN).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def image_multiple(name: str) -> int:
    """Each device's share of a batch must be a multiple of this many images with the lowering `name`."""
    return tpu.IMAGES if name == "fused" else 1


def takes_chains(images: int, *, train: bool) -> bool:
    """Whether a network should call `normalized_separable_convolution` for a whole chain of layers.

    It computes the same as separate operations everywhere. This says where it is faster: by Triton's kernels, and in
    training by those of 'fused'. For a few images, starting a kernel takes longer than the pass that the chain saves.
    """
    if chosen() == "fused":
        return train
    return chosen() == "platform" and (train or images >= 8) and has_triton()


def chosen() -> str:
    """Returns the lowering in context; inside `shard_map` and over a mesh with Explicit axes it is always 'stock'.

    There, types say how arrays are split, and the hand-written gradients do not.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return _chosen.get() if mesh.empty or is_auto(mesh) else "stock"


def has_triton() -> bool:
    """Whether the program that is traced is for GPUs on which Pallas has Triton: NVIDIA's from Ampere (8.0) on.

    It is for the devices of the mesh in context, or else for JAX's default device. Tracing a kernel takes time, so
    kernels are left out where nothing would run them.
    """
    kind = _kind_of_mesh() or jax.local_devices()[0].device_kind
    return kind != "cpu" and not kind.startswith("TPU") and all(map(_may_have_triton, jax.local_devices()))


def _kind_of_mesh() -> str | None:
    """Returns JAX's name of the devices of the mesh in context; None without a mesh, or if it has none."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return None if device is None else device.device_kind


def _may_have_triton(device: jax.Device) -> bool:
    if device.platform == "cpu":
        return True  # this machine compiles for a GPU elsewhere
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    return major.isdigit() and minor.isdigit() and int(major) >= 8  # AMD's are not numbers: gfx90a


def lower(
    *operands: jax.Array,
    cpu: Callable[..., Any],
    stock: Callable[..., Any],
    cuda: Callable[..., Any] | None = None,
    **options: Any,
) -> Any:
    """Calls the function for the platform with the operands and the options, which must be hashable.

    Args:
      cpu: for CPUs.
      stock: for all other platforms, and for every platform with the lowering 'stock'.
      cuda: for NVIDIA GPUs that have Triton; None for `stock`.
    """
    if chosen() == "stock":
        functions = {"default": stock}
    elif cuda is None or chosen() == "portable" or not has_triton():
        functions = {"cpu": cpu, "default": stock}
    elif _kind_of_mesh() in (None, "cpu"):
        functions = {"cpu": cpu, "cuda": cuda, "default": stock}
    else:  # only GPUs run it, and with several devices XLA would leave the choice in the program
        functions = {"default": cuda}
    return _lowered(*operands, functions=tuple(functions.items()), options=tuple(options.items()))


# Under jit an operation is traced and differentiated once for each shape, not once for each layer of that
# shape, and compiled once where the caller is not under jit.
@partial(jax.jit, static_argnames=("functions", "options"))
def _lowered(*operands, functions, options):
    named = {platform: partial(function, **dict(options)) for platform, function in functions}
    if len(named) == 1:
        return named["default"](*operands)
    return lax.platform_dependent(*operands, **named)


def is_auto(mesh: AbstractMesh) -> bool:
    """Whether XLA decides how arrays are split over every axis of the mesh."""
    return set(mesh.axis_types) == {AxisType.Auto}
