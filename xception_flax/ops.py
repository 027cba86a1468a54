"""The operations of the network as pure functions of arrays, channels last (`[N, H, W, C]`)."""

from collections.abc import Sequence

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
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=_DIMENSIONS,
        feature_group_count=x.shape[-1],
    )


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
