"""The operations of the network as pure functions of arrays, channels last (`[N, H, W, C]`).

Where a backend wants a lowering of its own, the operation chooses it when it is compiled for that
backend; all lowerings have the same values and gradients, and no caller knows of them.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def convolution(
    x: jax.Array, kernel: jax.Array, *, strides: tuple[int, int] = (1, 1), padding: str = "SAME"
) -> jax.Array:
    """Dense 2-D convolution (cross-correlation, as every deep learning library has it).

    Args:
      x: `[N, H, W, C]`.
      kernel: `[kh, kw, C, features]`.
      strides: rows, columns.
      padding: 'SAME' as TensorFlow defines it (the odd pixel goes below and right), or 'VALID'.

    Returns:
      `[N, H', W', features]`.
    """
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=_DIMENSIONS)


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
      kernel: `[kh, kw, 1, C * multiplier]`; outputs `c * multiplier + m` are the filters of channel `c`.
      strides: rows, columns.
      padding: 'SAME' as TensorFlow defines it, or 'VALID'.
      dilation: distance between the taps of the kernel: rows, columns.

    Returns:
      `[N, H', W', C * multiplier]`.
    """
    options = dict(strides=strides, padding=padding, dilation=dilation)
    return lax.platform_dependent(
        x,
        kernel,
        cpu=partial(depthwise_by_shifts, **options),
        default=partial(depthwise_by_groups, **options),
    )


def depthwise_by_groups(
    x: jax.Array, kernel: jax.Array, *, strides: tuple[int, int], padding: str, dilation: tuple[int, int]
) -> jax.Array:
    """`depthwise_convolution` as XLA's grouped convolution, one group a channel."""
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=_DIMENSIONS,
        feature_group_count=x.shape[-1],
    )


def depthwise_by_shifts(
    x: jax.Array, kernel: jax.Array, *, strides: tuple[int, int], padding: str, dilation: tuple[int, int]
) -> jax.Array:
    """`depthwise_convolution` as a sum over the taps of the kernel: the image shifted, times a weight a channel.

    XLA's grouped convolution on the CPU is many times slower than this, its gradients more so.
    """
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel.shape[:2], strict=True)]
    pads = lax.padtype_to_pads(x.shape[1:3], spans, strides, padding)
    dtype, wide = x.dtype, jnp.promote_types(x.dtype, jnp.float32)  # add up as a convolution does
    x, kernel = jnp.pad(x.astype(wide), [(0, 0), *pads, (0, 0)]), kernel.astype(wide)
    x = jnp.repeat(x, kernel.shape[-1] // x.shape[-1], axis=-1)
    rows, columns = ((size - span) // s + 1 for size, span, s in zip(x.shape[1:3], spans, strides, strict=True))
    total = jnp.zeros((), wide)
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            top, left = i * dilation[0], j * dilation[1]
            shifted = x[
                :,
                top : top + (rows - 1) * strides[0] + 1 : strides[0],
                left : left + (columns - 1) * strides[1] + 1 : strides[1],
            ]
            total += shifted * kernel[i, j, 0]
    return total.astype(dtype)


def pointwise_convolution(x: jax.Array, kernel: jax.Array, *, strides: tuple[int, int] = (1, 1)) -> jax.Array:
    """1x1 convolution: a matrix product over the channels, which every backend runs best as one.

    Args:
      x: `[N, H, W, C]`.
      kernel: `[1, 1, C, features]`.
      strides: rows, columns; 2 keeps the pixels 0, 2, 4, ... of a dimension.

    Returns:
      `[N, ceil(H / strides[0]), ceil(W / strides[1]), features]`.
    """
    x = x[:, :: strides[0], :: strides[1]]
    return lax.dot_general(x, kernel[0, 0], (((3,), (0,)), ((), ())))


def max_pool(x: jax.Array, *, window: tuple[int, int] = (3, 3), strides: tuple[int, int] = (2, 2)) -> jax.Array:
    """Maximum over windows, 'SAME' padding as TensorFlow defines it: `[N, H, W, C]` -> `[N, H', W', C]`."""
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, *window, 1), (1, *strides, 1), "SAME")


def global_average_pool(x: jax.Array, *, axes: Sequence[int] = (1, 2)) -> jax.Array:
    """Mean over rows and columns, in float32 or better: `[N, H, W, C]` -> `[N, C]`."""
    return jnp.mean(x, axis=axes, dtype=jnp.promote_types(x.dtype, jnp.float32))
