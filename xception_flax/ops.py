"""The operations of the network as pure functions of arrays, channels last (`[N, H, W, C]`).

Where a backend wants a lowering of its own, the operation chooses it when it is compiled for that
backend; all lowerings have the same values and gradients, and no caller knows of them.
"""

from collections.abc import Sequence
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xception_flax.lookup import suggest

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")

# Where the windows of a strided operation begin, in the words of those who differ:
# SAME       TensorFlow and Keras: just enough to reach the last pixel, the odd one below and right;
# SYMMETRIC  PyTorch and DeepLab's 'fixed padding': (span - 1) // 2 on both sides, whatever the size;
# VALID      none.
PADDINGS = ("SAME", "SYMMETRIC", "VALID")


def _pads(sizes: Sequence[int], spans: Sequence[int], strides: Sequence[int], padding: str) -> list[tuple[int, int]]:
    """(before, after) of rows and columns for windows that reach over `spans` pixels."""
    if padding not in PADDINGS:
        raise ValueError(f"unknown padding {padding!r}; {suggest(padding, PADDINGS)}")
    if padding == "SYMMETRIC":
        return [((span - 1) // 2, (span - 1) // 2) for span in spans]
    return lax.padtype_to_pads(sizes, spans, strides, padding)


def _spans(window: Sequence[int], dilation: Sequence[int]) -> list[int]:
    return [d * (size - 1) + 1 for d, size in zip(dilation, window, strict=True)]


def convolution(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: tuple[int, int] = (1, 1),
    padding: str = "SAME",
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> jax.Array:
    """2-D convolution (cross-correlation, as every deep learning library has it).

    Args:
      x: `[N, H, W, C]`.
      kernel: `[kh, kw, C / groups, features]`.
      strides: rows, columns.
      padding: one of `PADDINGS`.
      dilation: distance between the taps of the kernel: rows, columns.
      groups: the channels are cut into so many equal segments, each with filters of its own; as many
        as channels is `depthwise_convolution`.

    Returns:
      `[N, H', W', features]`.
    """
    if groups == x.shape[-1] > 1:
        return depthwise_convolution(x, kernel, strides=strides, padding=padding, dilation=dilation)
    return _grouped_convolution(x, kernel, strides, padding, dilation, groups)


def _grouped_convolution(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: str,
    dilation: tuple[int, int],
    groups: int,
) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        _pads(x.shape[1:3], _spans(kernel.shape[:2], dilation), strides, padding),
        rhs_dilation=dilation,
        dimension_numbers=_DIMENSIONS,
        feature_group_count=groups,
    )


# Under jit it is traced and differentiated once for each shape, not once for each of the equal layers.
@partial(jax.jit, static_argnames=("strides", "padding", "dilation"))
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
      padding: one of `PADDINGS`.
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
    return _grouped_convolution(x, kernel, strides, padding, dilation, groups=x.shape[-1])


def depthwise_by_shifts(
    x: jax.Array, kernel: jax.Array, *, strides: tuple[int, int], padding: str, dilation: tuple[int, int]
) -> jax.Array:
    """`depthwise_convolution` as a sum over the taps of the kernel: the image shifted, times a weight a channel.

    XLA's grouped convolution on the CPU is many times slower than this, its gradients more so.
    """
    spans = _spans(kernel.shape[:2], dilation)
    pads = _pads(x.shape[1:3], spans, strides, padding)
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


def max_pool(
    x: jax.Array,
    *,
    window: tuple[int, int] = (3, 3),
    strides: tuple[int, int] = (2, 2),
    padding: str = "SAME",
) -> jax.Array:
    """Maximum over windows: `[N, H, W, C]` -> `[N, H', W', C]`; `padding` is one of `PADDINGS`."""
    pads = _pads(x.shape[1:3], window, strides, padding)
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, *window, 1), (1, *strides, 1), [(0, 0), *pads, (0, 0)])


def atrous_max_pool(
    x: jax.Array,
    *,
    rate: int = 1,
    window: tuple[int, int] = (3, 3),
    strides: tuple[int, int] = (2, 2),
    padding: str = "SAME",
) -> jax.Array:
    """`max_pool` without its strides, at every pixel of a grid `rate` times as fine (the algorithme a trous).

    `atrous_max_pool(x, rate=r)[:, ::2 * r, ::2 * r]` equals `max_pool(x[:, ::r, ::r])`, for any size.

    Returns:
      `[N, H, W, C]`.
    """
    # The padding before the first window is that of the strided pool on its own, coarse grid: for an
    # even size and SAME, none.
    coarse = [-(-size // rate) for size in x.shape[1:3]]
    before = [rate * low for low, _ in _pads(coarse, window, strides, padding)]
    spans = _spans(window, (rate, rate))
    pads = [(low, span - 1 - low) for low, span in zip(before, spans, strict=True)]
    x = jnp.pad(x, [(0, 0), *pads, (0, 0)], constant_values=-jnp.inf)
    height, width = (size - span + 1 for size, span in zip(x.shape[1:3], spans, strict=True))
    shifted = [
        x[:, i * rate : i * rate + height, j * rate : j * rate + width]
        for i in range(window[0])
        for j in range(window[1])
    ]
    return reduce(jnp.maximum, shifted)


def average_pool(
    x: jax.Array,
    *,
    window: tuple[int, int] = (3, 3),
    strides: tuple[int, int] = (1, 1),
    padding: str = "SAME",
) -> jax.Array:
    """Mean over windows, of the pixels inside the image only: `[N, H, W, C]` -> `[N, H', W', C]`.

    As TensorFlow and Keras have it; PyTorch counts the padding as zeros unless told otherwise.
    """
    pads = _pads(x.shape[1:3], window, strides, padding)

    def add_up(x: jax.Array) -> jax.Array:
        zero = np.zeros((), x.dtype)
        return lax.reduce_window(x, zero, lax.add, (1, *window, 1), (1, *strides, 1), [(0, 0), *pads, (0, 0)])

    wide = jnp.promote_types(x.dtype, jnp.float32)  # nine numbers of 8 bits do not add up in 8 bits
    return (add_up(x.astype(wide)) / add_up(jnp.ones((1, *x.shape[1:3], 1), wide))).astype(x.dtype)


def global_average_pool(x: jax.Array, *, axes: Sequence[int] = (1, 2)) -> jax.Array:
    """Mean over rows and columns, in float32 or better: `[N, H, W, C]` -> `[N, C]`."""
    return jnp.mean(x, axis=axes, dtype=jnp.promote_types(x.dtype, jnp.float32))
