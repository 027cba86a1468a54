"""The operations by XLA's own, for every platform."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xception_flax.models.ops import windows

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def convolution(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: tuple[int, int],
    padding: str,
    dilation: tuple[int, int],
    groups: int = 1,
) -> jax.Array:
    """`ops.convolution`."""
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        windows.pads(x.shape[1:3], windows.spans(kernel.shape[:2], dilation), strides, padding),
        rhs_dilation=dilation,
        dimension_numbers=DIMENSIONS,
        feature_group_count=groups,
    )


def depthwise(
    x: jax.Array, kernel: jax.Array, *, strides: tuple[int, int], padding: str, dilation: tuple[int, int]
) -> jax.Array:
    """`ops.depthwise_convolution` as a grouped convolution, one group a channel."""
    return convolution(x, kernel, strides=strides, padding=padding, dilation=dilation, groups=x.shape[-1])


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`[N, H, W, C]`, `[C, features]` -> `[N, H, W, features]`."""
    return lax.dot_general(x, kernel, (((3,), (0,)), ((), ())))


def normalized(x: jax.Array, affine: jax.Array, relu: bool) -> jax.Array:
    """`x * affine[0] + affine[1]`, and a ReLU if `relu`, in the type of `x`; computed in that of `affine`, `[2, C]`."""
    scale, shift = affine[:, None, None, None]
    z = x.astype(affine.dtype) * scale + shift
    return (jax.nn.relu(z) if relu else z).astype(x.dtype)


def normalized_depthwise(
    x: jax.Array, affine: jax.Array, kernel: jax.Array, *, relu: bool, dilation: tuple[int, int]
) -> jax.Array:
    """`depthwise` of `normalized`, stride 1, padding 'SAME'."""
    return depthwise(normalized(x, affine, relu), kernel, strides=(1, 1), padding="SAME", dilation=dilation)


def moments(x: jax.Array) -> jax.Array:
    """`ops.moments`."""
    wide = x.astype(np.promote_types(x.dtype, jnp.float32))
    pixels = tuple(range(x.ndim - 1))
    return jnp.stack([jnp.mean(wide, axis=pixels), jnp.mean(jnp.square(wide), axis=pixels)])


def max_pool(x: jax.Array, *, window: tuple[int, int], strides: tuple[int, int], padding: str) -> jax.Array:
    """`ops.max_pool` as a reduction over windows."""
    pads = windows.pads(x.shape[1:3], window, strides, padding)
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, *window, 1), (1, *strides, 1), [(0, 0), *pads, (0, 0)])


def normalized_max_pool(
    x: jax.Array, affine: jax.Array, *, window: tuple[int, int], strides: tuple[int, int], padding: str
) -> jax.Array:
    """`max_pool` of `normalized`."""
    return max_pool(normalized(x, affine, False), window=window, strides=strides, padding=padding)
