"""Windows that slide over an image: their padding, and the pixels under each of their taps."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from xception_flax.text.errors import UserError
from xception_flax.text.lookup import suggest

# Where the windows of a strided operation begin, by convention:
# SAME       TensorFlow and Keras: just enough to reach the last pixel, the odd one below and right;
# SYMMETRIC  PyTorch and DeepLab's 'fixed padding': (span - 1) // 2 on both sides, whatever the size;
# VALID      none.
PADDINGS = ("SAME", "SYMMETRIC", "VALID")


def pads(sizes: Sequence[int], spans: Sequence[int], strides: Sequence[int], padding: str) -> list[tuple[int, int]]:
    """Returns the padding (before, after) of rows and of columns for windows that span `spans` pixels.

    Raises:
      UserError: `padding` is none of `PADDINGS`.
    """
    check_padding(padding)
    if padding == "SYMMETRIC":
        return [((span - 1) // 2, (span - 1) // 2) for span in spans]
    return lax.padtype_to_pads(sizes, spans, strides, padding)


def check_padding(padding: str) -> None:
    """Raises UserError if `padding` is none of `PADDINGS`."""
    if padding not in PADDINGS:
        raise UserError(f"unknown padding {padding!r}; {suggest(padding, PADDINGS)}")


def spans(window: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Returns the pixels from the first to the last tap of a window, inclusive: rows, columns."""
    return [d * (size - 1) + 1 for d, size in zip(dilation, window, strict=True)]


def padded(
    x: jax.Array,
    window: Sequence[int],
    strides: Sequence[int],
    padding: str,
    dilation: Sequence[int],
    value: float = 0.0,
) -> jax.Array:
    """Returns images `[N, H, W, C]` padded with `value`, so that the windows need no padding."""
    edges = pads(x.shape[1:3], spans(window, dilation), strides, padding)
    return jnp.pad(x, [(0, 0), *edges, (0, 0)], constant_values=value)


def every(start: int, number: int, stride: int) -> slice:
    """Returns the slice of `number` pixels, `stride` apart, from `start` on."""
    return slice(start, start + max(0, (number - 1) * stride + 1), stride)


def taps(
    x: jax.Array, window: Sequence[int], strides: Sequence[int] = (1, 1), dilation: Sequence[int] = (1, 1)
) -> Iterator[tuple[int, int, jax.Array]]:
    """Yields (row, column, pixels `[N, H', W', C]`) of each tap: the pixels that all windows have under it."""
    sizes = zip(x.shape[1:3], spans(window, dilation), strides, strict=True)
    rows, columns = (max(0, (size - span) // stride + 1) for size, span, stride in sizes)
    for i in range(window[0]):
        for j in range(window[1]):
            yield i, j, x[:, every(i * dilation[0], rows, strides[0]), every(j * dilation[1], columns, strides[1])]


def reach(
    shape: Sequence[int],
    edges: Sequence[tuple[int, int]],
    out_shape: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
    dilation: Sequence[int],
) -> list[tuple[int, int]]:
    """Returns the padding (before, after) of the outputs, spread by the strides, for the transposed operation.

    A window over the padded outputs then has exactly those to which one pixel contributed.

    Args:
      shape: of the images, `[N, H, W, C]`.
      edges: their padding, from `pads`.
      out_shape: of the outputs.
    """
    return [
        (span - 1 - low, low + size - 1 - (out - 1) * stride)
        for size, (low, _), out, span, stride in zip(
            shape[1:3], edges, out_shape[1:3], spans(window, dilation), strides, strict=True
        )
    ]
