"""Max-pooling as the maximum of the taps of a window, for CPUs and NVIDIA GPUs."""

from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xception_flax.models.ops import stock, windows


def max_pool(
    x: jax.Array, *, window: tuple[int, int], strides: tuple[int, int], padding: str, barrier: bool = False
) -> jax.Array:
    """`ops.max_pool` as the maximum of the taps of a window, which remembers where each maximum was.

    XLA's gradient scatters, which takes many times as long on CPUs, and it keeps `x` for the backward pass. This keeps
    a byte for each output.

    Args:
      x: `[N, H, W, C]`.
      window, strides, padding: see `ops.max_pool`.
      barrier: forbids XLA to find the maxima once more in the backward pass, in a fusion that is slow on GPUs.
    """
    return _max_of_taps(windows.padded(x, window, strides, padding, (1, 1), -jnp.inf), window, strides, barrier)


def normalized_max_pool(
    x: jax.Array,
    affine: jax.Array,
    *,
    window: tuple[int, int],
    strides: tuple[int, int],
    padding: str,
    barrier: bool = False,
) -> jax.Array:
    """`max_pool` of `x * scale + shift`, as `y * scale + shift` of pooled `y`; `affine` is scale and shift, `[2, C]`.

    A maximum of `x * scale` is where that of `x` is or, for a negative scale, the minimum. So scale, shift and their
    gradients need the pooled pixels only, and what is left of the normalization's backward pass is one pass over `x`.
    """
    sign = jnp.where(affine[0] < 0, -1, 1).astype(x.dtype)[None, None, None]
    y = max_pool(x * sign, window=window, strides=strides, padding=padding, barrier=barrier)
    return stock.normalized(y * sign, affine, False)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _max_of_taps(x: jax.Array, window: tuple[int, int], strides: tuple[int, int], barrier: bool) -> jax.Array:
    """`[N, H, W, C]`, padded already -> `[N, H', W', C]`."""
    return reduce(jnp.maximum, (tap for _, _, tap in windows.taps(x, window, strides)))


def _max_of_taps_forward(x, window, strides, barrier):
    (_, _, best), *taps = windows.taps(x, window, strides)
    number = np.min_scalar_type(-window[0] * window[1])  # a byte, for up to 128 taps
    place = jnp.zeros(best.shape, number)
    for i, j, tap in taps:
        place = jnp.where(tap > best, number.type(i * window[1] + j), place)
        best = jnp.maximum(best, tap)
    if barrier:
        best, place = lax.optimization_barrier((best, place))
    return best, (place, x.shape)


def _max_of_taps_backward(window, strides, barrier, saved, dy):
    place, shape = saved
    # The pixels of one phase (row % stride, column % stride) are a grid like that of the windows. On it,
    # pixel q is tap `stride * k + phase` of window q - k, so the gradient is a sum of shifted arrays.
    grid = [-(-size // stride) for size, stride in zip(shape[1:3], strides, strict=True)]
    reach = [(size - 1) // stride for size, stride in zip(window, strides, strict=True)]
    edges = [(r, size - out) for r, size, out in zip(reach, grid, dy.shape[1:3], strict=True)]
    spread = jnp.pad(dy, [(0, 0), *edges, (0, 0)])
    place = jnp.pad(place, [(0, 0), *edges, (0, 0)], constant_values=-1)
    spread, place = lax.optimization_barrier((spread, place))  # padding within a fusion is slow

    def phase(row: int, column: int) -> jax.Array:
        total = jnp.zeros((dy.shape[0], *grid, dy.shape[-1]), dy.dtype)
        for i in range(row, window[0], strides[0]):
            for j in range(column, window[1], strides[1]):
                top, left = reach[0] - i // strides[0], reach[1] - j // strides[1]
                there = np.s_[:, top : top + grid[0], left : left + grid[1]]
                total += jnp.where(place[there] == i * window[1] + j, spread[there], 0)
        return total

    rows = [jnp.stack([phase(i, j) for j in range(strides[1])], axis=3) for i in range(strides[0])]
    dx = jnp.stack(rows, axis=2)  # [N, grid, stride, grid, stride, C]
    dx = dx.reshape(dy.shape[0], grid[0] * strides[0], grid[1] * strides[1], dy.shape[-1])
    return (dx[:, : shape[1], : shape[2]],)


_max_of_taps.defvjp(_max_of_taps_forward, _max_of_taps_backward)
