"""The operations of the network as pure functions of arrays, channels last (`[N, H, W, C]`).

Each is defined by XLA's own operations (`stock`). Where those are slow on a platform, it has a second lowering (`cpu`,
`gpu`) with the same values and gradients. `lowerings` chooses one when a program is compiled; callers need not know.
Lowerings with their own rule for the gradient do not support forward mode (`jax.jvp`): use `with lowering("stock")` for
that. Inside `jax.shard_map` and over a mesh with Explicit axes, 'stock' is used everywhere.

A program for several GPUs must be traced within `jax.sharding.use_abstract_mesh(mesh.abstract_mesh)`. Then each GPU
computes only its own images.
"""

import math
import re
from collections.abc import Sequence
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xception_flax.models.ops import cpu, gpu, pooling, stock, tpu, windows
from xception_flax.models.ops.lowerings import (
    LOWERINGS,
    check_lowering,
    chosen,
    compiler_options,
    image_multiple,
    lower,
    lowering,
    takes_chains,
)
from xception_flax.models.ops.windows import PADDINGS

__all__ = [
    "FUSED_LAYER",
    "LOWERINGS",
    "PADDINGS",
    "atrous_max_pool",
    "average_pool",
    "check_lowering",
    "compiler_options",
    "convolution",
    "depthwise_convolution",
    "fused_layer",
    "global_average_pool",
    "image_multiple",
    "lowering",
    "max_pool",
    "moments",
    "normalized_max_pool",
    "normalized_separable_convolution",
    "pointwise_convolution",
    "takes_chains",
]

FUSED_LAYER = "separable, fused"  # what reports call the layers that `fused_layer` finds


# Convolutions --------------------------------------------------------------------------------------


def convolution(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: tuple[int, int] = (1, 1),
    padding: str = "SAME",
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> jax.Array:
    """2-D convolution (cross-correlation, as in every deep learning library).

    Args:
      x: `[N, H, W, C]`.
      kernel: `[kh, kw, C / groups, features]`.
      strides: rows, columns.
      padding: one of `PADDINGS`.
      dilation: distance between the taps of the kernel: rows, columns.
      groups: number of equal segments of the channels, each with its own filters; with one channel a
        segment this is `depthwise_convolution`.

    Returns:
      `[N, H', W', features]`.
    """
    windows.check_padding(padding)
    options = dict(strides=strides, padding=padding, dilation=dilation)
    if groups == x.shape[-1] > 1:
        return depthwise_convolution(x, kernel, **options)
    if kernel.shape[:2] == (1, 1) and groups == 1:
        return pointwise_convolution(x, kernel, strides=strides)
    if groups > 1:
        return lower(x, kernel, cpu=cpu.grouped_convolution, stock=stock.convolution, groups=groups, **options)
    return lower(x, kernel, cpu=cpu.convolution, cuda=gpu.convolution, stock=stock.convolution, **options)


def depthwise_convolution(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: tuple[int, int] = (1, 1),
    padding: str = "SAME",
    dilation: tuple[int, int] = (1, 1),
) -> jax.Array:
    """Spatial convolution of each channel by itself.

    Args:
      x: `[N, H, W, C]`.
      kernel: `[kh, kw, 1, C * multiplier]`; output channels `c * multiplier + m` are from channel `c`.
      strides: rows, columns.
      padding: one of `PADDINGS`.
      dilation: distance between the taps of the kernel: rows, columns.

    Returns:
      `[N, H', W', C * multiplier]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from xception_flax import ops
      >>> x, kernel = jnp.ones([1, 4, 4, 2]), jnp.ones([3, 3, 1, 2])
      >>> y = ops.depthwise_convolution(x, kernel, padding="VALID")
      >>> y.shape, float(y[0, 0, 0, 0])
      ((1, 2, 2, 2), 9.0)
    """
    options = dict(strides=strides, padding=padding, dilation=dilation)
    return lower(x, kernel, cpu=cpu.depthwise, cuda=gpu.depthwise, stock=stock.depthwise, **options)


def pointwise_convolution(x: jax.Array, kernel: jax.Array, *, strides: tuple[int, int] = (1, 1)) -> jax.Array:
    """1x1 convolution, computed as a matrix product over the channels, which every backend runs best.

    Args:
      x: `[N, H, W, C]`.
      kernel: `[1, 1, C, features]`.
      strides: rows, columns; 2 keeps the pixels 0, 2, 4, ... of a dimension.

    Returns:
      `[N, ceil(H / strides[0]), ceil(W / strides[1]), features]`.
    """
    if tuple(strides) != (1, 1):
        # XLA for GPUs would fuse this slice into the product, which aborts the process (openxla/xla issue 47381).
        x = x[:, :: strides[0], :: strides[1]]
        x = lax.platform_dependent(x, cuda=lax.optimization_barrier, default=lambda x: x)
    return lower(x, kernel[0, 0], cpu=cpu.product, cuda=gpu.product, stock=stock.product)


# Between two normalizations -----------------------------------------------------------------------


def normalized_separable_convolution(
    x: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    depthwise_kernel: jax.Array,
    pointwise_kernel: jax.Array,
    *,
    relu: bool = True,
    dilation: tuple[int, int] = (1, 1),
) -> tuple[jax.Array, jax.Array]:
    """Separable convolution with the scale and shift of the normalization before it, and moments for the one after.

    `y = pointwise(depthwise(relu(x * scale + shift)))`, and the moments of `y`. On NVIDIA GPUs the normalization, ReLU
    and depthwise convolution are one kernel. With the lowering 'fused', over a mesh of TPUs and where `tpu.fits` the
    shapes, everything is one pass over memory.

    Args:
      x: `[N, H, W, C]`.
      scale: `[C]`, float32 or better.
      shift: `[C]`, as `scale`.
      depthwise_kernel: `[kh, kw, 1, C]`; stride 1, padding 'SAME'.
      pointwise_kernel: `[1, 1, C, features]`.
      relu: False leaves it out.
      dilation: of the depthwise convolution: rows, columns.

    Returns:
      `y` `[N, H, W, features]`, and the means of `y` and of `y * y` over images, rows and columns,
      `[2, features]` in the type of `scale`.

    Raises:
      UserError: 'fused' on TPUs, where a chip's share of the images is no multiple of `tpu.IMAGES`.
    """
    kernels = depthwise_kernel, pointwise_kernel
    if chosen() == "fused" and dilation == (1, 1) and tpu.takes(x, *kernels):
        return tpu.separable_over_devices(x, scale, shift, *kernels, relu=relu)
    functions = dict(cpu=cpu.normalized_depthwise, cuda=gpu.normalized_depthwise, stock=stock.normalized_depthwise)
    # In a compiled program the convolutions have the names that they have one by one, as layers.
    with jax.named_scope("depthwise"):
        y = lower(x, jnp.stack([scale, shift]), depthwise_kernel, **functions, relu=relu, dilation=dilation)
    with jax.named_scope("pointwise"):
        y = pointwise_convolution(y, pointwise_kernel)
    return y, moments(y)


def fused_layer(op_name: str) -> str | None:
    """Returns the layer that an operation computes as a whole: normalization, ReLU and both convolutions by one kernel.

    Args:
      op_name: of an operation in a compiled program, such as
        '.../Xception.endpoints/block2/block2_sepconv1.normalized/fused_separable/shard_map/forward_kernel'.

    Returns:
      The name of the module that called `normalized_separable_convolution`, 'block2_sepconv1'; None for every other
      operation.
    """
    match = re.search(rf"([^/.]+)\.[^/]+/{tpu.SCOPE}/", op_name)  # Flax names the scope of a method MODULE.METHOD
    return match[1] if match else None


def moments(x: jax.Array) -> jax.Array:
    """Means of `x` and of `x * x` over all but the channels, in float32 or better: `[..., C]` -> `[2, C]`."""
    return lower(x, cpu=stock.moments, cuda=gpu.moments, stock=stock.moments)


# Pooling ------------------------------------------------------------------------------------------


def max_pool(
    x: jax.Array,
    *,
    window: tuple[int, int] = (3, 3),
    strides: tuple[int, int] = (2, 2),
    padding: str = "SAME",
) -> jax.Array:
    """Maximum over windows: `[N, H, W, C]` -> `[N, H', W', C]`; `padding` is one of `PADDINGS`.

    The gradient goes to the first of equal maxima, row by row. If a window has NaN, or only -inf, CPUs and
    NVIDIA GPUs give its gradient to another pixel of the window, or to none.

    Example:
      >>> import jax.numpy as jnp
      >>> from xception_flax import ops
      >>> x = jnp.arange(16.0).reshape(1, 4, 4, 1)
      >>> ops.max_pool(x, window=(2, 2))[0, :, :, 0].tolist()
      [[5.0, 7.0], [13.0, 15.0]]
    """
    options = dict(window=window, strides=strides, padding=padding)
    return lower(x, cpu=pooling.max_pool, cuda=gpu.max_pool, stock=stock.max_pool, **options)


def normalized_max_pool(
    x: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    *,
    window: tuple[int, int] = (3, 3),
    strides: tuple[int, int] = (2, 2),
    padding: str = "SAME",
) -> jax.Array:
    """`max_pool` of `x * scale + shift`: with the normalization before it, whose gradient then reads fewer pixels.

    Args:
      x: `[N, H, W, C]`.
      scale: `[C]`, float32 or better.
      shift: `[C]`, as `scale`.
      window, strides, padding: see `max_pool`.

    Returns:
      `[N, H', W', C]` in the type of `x`. Where a scale is 0 all pixels of a window are equal; the gradient of that
      scale is then by the largest `x`, and with 'stock' by the first.
    """
    functions = dict(cpu=pooling.normalized_max_pool, cuda=gpu.normalized_max_pool, stock=stock.normalized_max_pool)
    return lower(x, jnp.stack([scale, shift]), **functions, window=window, strides=strides, padding=padding)


def atrous_max_pool(
    x: jax.Array,
    *,
    rate: int = 1,
    window: tuple[int, int] = (3, 3),
    strides: tuple[int, int] = (2, 2),
    padding: str = "SAME",
) -> jax.Array:
    """Dilated max-pooling at every pixel, in place of a strided `max_pool` of a grid `rate` times coarser.

    `atrous_max_pool(x, rate=r)[:, ::2 * r, ::2 * r]` equals `max_pool(x[:, ::r, ::r])`, for any size.

    Returns:
      `[N, H, W, C]`.
    """
    # The padding before the first window is that of the strided pool on its coarse grid: none for an even
    # size and 'SAME'.
    coarse = [-(-size // rate) for size in x.shape[1:3]]
    before = [rate * low for low, _ in windows.pads(coarse, window, strides, padding)]
    spans = windows.spans(window, (rate, rate))
    pads = [(low, span - 1 - low) for low, span in zip(before, spans, strict=True)]
    x = jnp.pad(x, [(0, 0), *pads, (0, 0)], constant_values=-jnp.inf)
    return reduce(jnp.maximum, (tap for _, _, tap in windows.taps(x, window, dilation=(rate, rate))))


def average_pool(
    x: jax.Array,
    *,
    window: tuple[int, int] = (3, 3),
    strides: tuple[int, int] = (1, 1),
    padding: str = "SAME",
    count_include_pad: bool = False,
) -> jax.Array:
    """Mean over windows: `[N, H, W, C]` -> `[N, H', W', C]`.

    Args:
      x: `[N, H, W, C]`.
      window: rows, columns.
      strides: rows, columns.
      padding: one of `PADDINGS`.
      count_include_pad: whether the padding counts, as zeros: PyTorch's default. TensorFlow and Keras take the
        mean of the pixels inside the image only.
    """
    pads = windows.pads(x.shape[1:3], window, strides, padding)

    def add_up(x: jax.Array) -> jax.Array:
        zero = np.zeros((), x.dtype)
        return lax.reduce_window(x, zero, lax.add, (1, *window, 1), (1, *strides, 1), [(0, 0), *pads, (0, 0)])

    wide = np.promote_types(x.dtype, jnp.float32)  # the 8 bits of bfloat16 are too few for a sum of nine numbers
    pixels = math.prod(window) if count_include_pad else add_up(jnp.ones((1, *x.shape[1:3], 1), wide))
    return (add_up(x.astype(wide)) / pixels).astype(x.dtype)


def global_average_pool(x: jax.Array, *, axes: Sequence[int] = (1, 2)) -> jax.Array:
    """Mean over rows and columns, in float32 or better: `[N, H, W, C]` -> `[N, C]`."""
    return jnp.mean(x, axis=axes, dtype=np.promote_types(x.dtype, jnp.float32))
