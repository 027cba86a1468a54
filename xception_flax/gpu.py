"""The depthwise convolution for GPUs: as XLA's fusions ('shifts'), and as Triton kernels ('triton').

cuDNN's grouped convolution with one channel a group is slow, most of all in the gradient of its kernel. A depthwise
convolution does nine multiply-adds for each number that it reads, so its floor is the time to read `x` and write `y`
once. Both lowerings add up in float32 and keep nothing for the backward pass but `x` and `kernel`.

The Triton kernels are for 3x3 windows, stride 1, no dilation and padding 'SAME', which is all that Xception has at its
output stride of 32. `X` bytes of `x` cost `2 X` forward and `3 X` backward: one kernel reads `x` and `dy` and writes
`dx` and the kernel's gradient.
"""

from collections.abc import Iterator, Sequence
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

# Shifts --------------------------------------------------------------------------------------------


def shifts(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    pads: tuple[tuple[int, int], tuple[int, int]],
    dilation: tuple[int, int],
) -> jax.Array:
    """Depthwise convolution as a sum over the taps of the kernel: the image shifted, times a weight a channel.

    XLA makes one fusion of the value and one of the gradient of `x`, each with one read and one write; the gradient
    of a 3x3 kernel is five fusions, which read `x` and the gradient of the result five times.

    Args:
      x: `[N, H, W, C]`, not empty, as the result.
      kernel: `[kh, kw, 1, C * multiplier]`.
      strides: rows, columns.
      pads: (before, after) of rows and columns.
      dilation: rows, columns.

    Returns:
      `[N, H', W', C * multiplier]` in the type of `x`.
    """
    return _shifts(jnp.repeat(x, kernel.shape[-1] // x.shape[-1], axis=-1), kernel, strides, pads, dilation)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _shifts(x, kernel, strides, pads, dilation):
    wide = jnp.promote_types(x.dtype, jnp.float32)
    weights = kernel[:, :, 0].astype(wide)
    taps = _shifted(_padded(x, pads), kernel.shape[:2], strides, dilation)
    return reduce(jnp.add, (tap.astype(wide) * weights[i, j] for i, j, tap in taps)).astype(x.dtype)


def _shifts_forward(x, kernel, strides, pads, dilation):
    return _shifts(x, kernel, strides, pads, dilation), (x, kernel)


def _shifts_backward(strides, pads, dilation, saved, dy):
    x, kernel = saved
    # The windows that reach a pixel: a convolution of `dy`, spread by the strides, with the kernel turned round.
    spread = [stride * (size - 1) + 1 for size, stride in zip(dy.shape[1:3], strides, strict=True)]
    before = [d * (k - 1) - low for d, k, (low, _) in zip(dilation, kernel.shape, pads, strict=False)]
    edges = [
        (b, size + d * (k - 1) - b - s)
        for b, size, d, k, s in zip(before, x.shape[1:3], dilation, kernel.shape, spread, strict=False)
    ]
    dilated = lax.pad(dy, np.zeros((), dy.dtype), [(0, 0, 0), *((0, 0, s - 1) for s in strides), (0, 0, 0)])
    dx = _shifts(dilated, kernel[::-1, ::-1], (1, 1), tuple(edges), dilation)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    sums = [
        jnp.sum(tap.astype(wide) * dy.astype(wide), axis=(0, 1, 2))
        for _, _, tap in _shifted(_padded(x, pads), kernel.shape[:2], strides, dilation)
    ]
    return dx, jnp.stack(sums).reshape(kernel.shape).astype(kernel.dtype)


_shifts.defvjp(_shifts_forward, _shifts_backward)


def _padded(x: jax.Array, pads: Sequence[tuple[int, int]]) -> jax.Array:
    return lax.pad(x, np.zeros((), x.dtype), [(0, 0, 0), *((*pad, 0) for pad in pads), (0, 0, 0)])


def _shifted(
    x: jax.Array, window: Sequence[int], strides: Sequence[int], dilation: Sequence[int]
) -> Iterator[tuple[int, int, jax.Array]]:
    """Yields (row, column, `[N, H', W', C]`) for each tap of a window."""
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, window, strict=True)]
    reach = [(size - span) // s * s + 1 for size, span, s in zip(x.shape[1:3], spans, strides, strict=True)]
    for i in range(window[0]):
        for j in range(window[1]):
            top, left = i * dilation[0], j * dilation[1]
            yield i, j, x[:, top : top + reach[0] : strides[0], left : left + reach[1] : strides[1]]


# Triton kernels ------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """What a program of a kernel computes at a time: `rows` arrays of `numbers` in columns x channels.

    Attributes:
      rows: of pixels, unrolled. A row read is used for three rows of the result.
      numbers: pixels of a row times channels, in each array that a program holds; a power of two.
      channels: at most; a power of two.
      warps: of 32 threads. `numbers / (32 * warps)` numbers a thread are its share of an array, and 9 of these the
        weights and, backward, 9 more the sums: 4 keep that in registers.
      programs: at least about so many, backward, where each adds up the gradients of a strip of rows of an image.
    """

    rows: int = 4
    numbers: int = 512
    channels: int = 128
    warps: int = 4
    programs: int = 1536


FORWARD = Tile()
BACKWARD = Tile()


class _Plan(NamedTuple):
    """A tile cut to the size of an array, and the grid: blocks of channels, strips of rows, images."""

    rows: int
    columns: int
    channels: int
    row_tiles: int  # a strip
    column_tiles: int
    grid: tuple[int, int, int]

    @classmethod
    def of(cls, shape: tuple[int, ...], tile: Tile, row_tiles: int | None = None) -> "_Plan":
        n, height, width, channels = shape
        block = min(tile.channels, pl.next_power_of_2(channels))
        columns = min(tile.numbers // block, pl.next_power_of_2(width))
        blocks, tiles = pl.cdiv(channels, block), pl.cdiv(height, tile.rows)
        if row_tiles is None:
            row_tiles = max(1, tiles // pl.cdiv(tile.programs, n * blocks))
        return cls(
            tile.rows, columns, block, row_tiles, pl.cdiv(width, columns), (blocks, pl.cdiv(tiles, row_tiles), n)
        )


def fits(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], pads: Sequence[tuple[int, int]], dilation: Sequence[int]
) -> bool:
    """Whether `depthwise` computes a depthwise convolution that `shifts` would with these arguments."""
    same = kernel.shape == (3, 3, 1, x.shape[-1]) and (*strides, *dilation) == (1, 1, 1, 1)
    # Offsets within an array are of 32 bits; of an axis of the grid, but for the first, there are at most 65535.
    fits = x.size < 2**31 and x.shape[0] < 2**16
    return same and list(pads) == [(1, 1), (1, 1)] and fits and x.dtype in (jnp.float32, jnp.bfloat16, jnp.float16)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise(x: jax.Array, kernel: jax.Array, interpret: bool = False) -> jax.Array:
    """3x3 depthwise convolution, stride 1, padding 'SAME', by Triton.

    Args:
      x: `[N, H, W, C]`.
      kernel: `[3, 3, 1, C]`.
      interpret: compute what the kernels would, on any machine, slowly.

    Returns:
      `[N, H, W, C]` in the type of `x`.
    """
    plan = _Plan.of(x.shape, FORWARD, row_tiles=1)
    return _call(_forward_kernel, x, _weights(kernel), out_shape=x, plan=plan, warps=FORWARD.warps, interpret=interpret)


def _depthwise_forward(x, kernel, interpret):
    return depthwise(x, kernel, interpret), (x, kernel)


def _depthwise_backward(interpret, saved, dy):
    x, kernel = saved
    plan = _Plan.of(x.shape, BACKWARD)
    _, strips, n = plan.grid
    sums = jax.ShapeDtypeStruct((n, strips, 9, x.shape[-1]), jnp.float32)
    options = dict(plan=plan, warps=BACKWARD.warps, interpret=interpret)
    dx, sums = _call(_backward_kernel, x, dy, _weights(kernel), out_shape=(x, sums), **options)
    return dx, jnp.sum(sums, axis=(0, 1)).reshape(kernel.shape).astype(kernel.dtype)


depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _weights(kernel: jax.Array) -> jax.Array:
    return kernel.reshape(9, -1).astype(jnp.float32)


def _call(kernel, *operands, out_shape, plan, warps, interpret):
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        partial(kernel, plan=plan, interpret=interpret),
        grid=plan.grid,
        in_specs=[whole] * len(operands),
        out_specs=jax.tree.map(lambda _: whole, out_shape),
        out_shape=jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), out_shape),
        compiler_params=plgpu.CompilerParams(num_warps=warps),
        interpret=interpret,
        name="depthwise" + kernel.__name__.removesuffix("_kernel"),
    )(*operands)


class _Block:
    """A program's block of channels of its image: reads and writes `[columns, channels]` of a row."""

    def __init__(self, shape: tuple[int, ...], plan: _Plan, interpret: bool) -> None:
        self.interpret = interpret
        _, self.height, self.width, channels = shape
        self.image = pl.program_id(2)
        zeros = jnp.zeros((plan.columns, plan.channels), jnp.int32)
        self.columns = zeros + lax.broadcasted_iota(jnp.int32, (plan.columns, 1), 0)
        # Two dimensions for the weights too: they come in the layout of the pixels, without a shuffle.
        self.channels = (
            zeros + lax.broadcasted_iota(jnp.int32, (1, plan.channels), 1) + pl.program_id(0) * plan.channels
        )
        self.inside = self.channels < channels

    def weights(self, ref) -> list[list[jax.Array]]:
        flat = [plgpu.load(ref.at[tap, self.channels], mask=self.inside, other=0.0) for tap in range(9)]
        return [flat[0:3], flat[3:6], flat[6:9]]

    def read(self, ref, row, column) -> jax.Array:
        """In float32; zeros around the image."""
        index, mask = self._place(row, column)
        pixels = plgpu.load(ref.at[index], mask=mask, other=0.0)
        if self.interpret or pixels.dtype != jnp.bfloat16:
            return pixels.astype(jnp.float32)
        # Triton takes three instructions for a pair of these, a shift and a mask are enough.
        asm = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
        return _assembly(asm, pixels, constraints="=&r,=r,r", pack=2)

    def multiply_add(self, total: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        # XLA has Triton keep the two apart, which costs as many instructions again.
        if self.interpret:
            return total + a * b
        return _assembly("fma.rn.f32 $0, $1, $2, $3;", a, b, total, constraints="=f,f,f,f", pack=1)

    def write(self, ref, row, column, value) -> None:
        index, mask = self._place(row, column)
        plgpu.store(ref.at[index], value.astype(ref.dtype), mask=mask)

    def _place(self, row, column):
        columns = self.columns + column
        mask = self.inside & (columns >= 0) & (columns < self.width) & (row >= 0) & (row < self.height)
        return (self.image, row, columns, self.channels), mask


def _assembly(asm: str, *operands: jax.Array, constraints: str, pack: int) -> jax.Array:
    shape = jax.ShapeDtypeStruct(operands[0].shape, jnp.float32)
    (result,) = plgpu.elementwise_inline_asm(
        asm, args=operands, constraints=constraints, pack=pack, result_shape_dtypes=[shape]
    )
    return result


def _neighbours(block: _Block, ref, row, column, rows: int) -> Iterator[tuple[int, int, int, jax.Array]]:
    """Yields (k, i, j, pixels) for each tap (i, j) of each row k of a tile, and reads each of the pixels once."""
    for r in range(-1, rows + 1):
        for j in range(3):
            pixels = block.read(ref, row + r, column + j - 1)
            for i in range(3):
                if 0 <= r + 1 - i < rows:
                    yield r + 1 - i, i, j, pixels


def _forward_kernel(x, kernel, y, *, plan, interpret):
    block = _Block(x.shape, plan, interpret)
    weights = block.weights(kernel)
    row = pl.program_id(1) * plan.rows

    def tile(t, _):
        column = t * plan.columns
        sums = [jnp.zeros((plan.columns, plan.channels), jnp.float32)] * plan.rows
        for k, i, j, pixels in _neighbours(block, x, row, column, plan.rows):
            sums[k] = block.multiply_add(sums[k], pixels, weights[i][j])
        for k, total in enumerate(sums):
            block.write(y, row + k, column, total)

    lax.fori_loop(0, plan.column_tiles, tile, None)


def _backward_kernel(x, dy, kernel, dx, dkernel, *, plan, interpret):
    block = _Block(x.shape, plan, interpret)
    weights = block.weights(kernel)
    strip = pl.program_id(1)
    zeros = jnp.zeros((plan.columns, plan.channels), jnp.float32)

    def tile(t, totals):
        row = (strip * plan.row_tiles + lax.div(t, plan.column_tiles)) * plan.rows
        column = lax.rem(t, plan.column_tiles) * plan.columns
        here = [block.read(x, row + k, column) for k in range(plan.rows)]
        sums, totals = [zeros] * plan.rows, list(totals)
        # The tap (i, j) of an input pixel's gradient is that of the kernel turned round.
        for k, i, j, pixels in _neighbours(block, dy, row, column, plan.rows):
            sums[k] = block.multiply_add(sums[k], pixels, weights[2 - i][2 - j])
            tap = 8 - 3 * i - j
            totals[tap] = block.multiply_add(totals[tap], pixels, here[k])
        for k, total in enumerate(sums):
            block.write(dx, row + k, column, total)
        return tuple(totals)

    totals = lax.fori_loop(0, plan.row_tiles * plan.column_tiles, tile, (zeros,) * 9)
    channels = pl.program_id(0) * plan.channels + jnp.arange(plan.channels)
    for tap, total in enumerate(totals):
        index = (block.image, strip, tap, channels)
        plgpu.store(dkernel.at[index], jnp.sum(total, axis=0), mask=channels < x.shape[-1])
