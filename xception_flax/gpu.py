"""The depthwise convolution for GPUs: as XLA's fusions ('shifts'), and as Triton kernels ('triton').

cuDNN's grouped convolution with one channel a group is slow, most of all in the gradient of its kernel. A depthwise
convolution does nine multiply-adds for each number that it reads, so its floor is the time to read `x` and write `y`
once. Both lowerings add up in float32 and keep nothing for the backward pass but `x` and `kernel`.

The Triton kernels are for 3x3 windows, stride 1, no dilation and padding 'SAME', which is all that Xception has at its
output stride of 32. `X` bytes of `x` cost `2 X` forward and `3 X` backward: one kernel reads `x` and the gradient of
`y` and writes the gradient of `x` and partial sums of the kernel's. The normalization before the convolution can be
done on the way in.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

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
    """What a program of a kernel computes at a time: so many pixels of the same place in several images.

    Attributes:
      rows: of pixels, unrolled, as `columns`. With r rows and c columns, (r + 2) * (c + 2) pixels are read for r * c.
      columns: of pixels.
      warps: of 32 threads, each with 4 channels of an image. So the weights, the results and, backward, the sums stay
        in registers, and 8 bytes are read at a time.
      strips: of rows, in all images and blocks of channels, at least about so many. A warp goes through one, and
        backward adds up the kernel's gradient in it.
    """

    rows: int
    columns: int
    warps: int
    strips: int


FORWARD = Tile(rows=3, columns=4, warps=1, strips=4096)
BACKWARD = Tile(rows=2, columns=2, warps=4, strips=3072)

_CHANNELS = 128  # 32 threads, 4 channels each


class _Plan(NamedTuple):
    """A tile cut to the size of an array, and the grid: blocks of channels, strips of rows, blocks of images."""

    rows: int
    columns: int
    images: int
    channels: int
    row_tiles: int  # a strip
    column_tiles: int
    warps: int
    grid: tuple[int, int, int]

    @classmethod
    def of(cls, shape: tuple[int, ...], tile: Tile) -> "_Plan":
        n, height, width, channels = shape
        channel_block = min(_CHANNELS, pl.next_power_of_2(channels))
        image_block = min(tile.warps * _CHANNELS // channel_block, pl.next_power_of_2(n))
        rows, columns = min(tile.rows, height), min(tile.columns, width)
        channel_blocks, tiles = pl.cdiv(channels, channel_block), pl.cdiv(height, rows)
        row_tiles = max(1, tiles // pl.cdiv(tile.strips, n * channel_blocks))
        grid = (channel_blocks, pl.cdiv(tiles, row_tiles), pl.cdiv(n, image_block))
        column_tiles = pl.cdiv(width, columns)
        return cls(rows, columns, image_block, channel_block, row_tiles, column_tiles, tile.warps, grid)


def fits(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], pads: Sequence[tuple[int, int]], dilation: Sequence[int]
) -> bool:
    """Whether `depthwise` computes a depthwise convolution that `shifts` would with these arguments."""
    same = kernel.shape == (3, 3, 1, x.shape[-1]) and (*strides, *dilation) == (1, 1, 1, 1)
    # Offsets within an array are of 32 bits; of an axis of the grid, but for the first, there are at most 65535.
    fits = x.size < 2**31 and x.shape[0] < 2**16
    return same and list(pads) == [(1, 1), (1, 1)] and fits and x.dtype in (jnp.float32, jnp.bfloat16, jnp.float16)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def depthwise(
    x: jax.Array, kernel: jax.Array, affine: jax.Array | None = None, relu: bool = False, interpret: bool = False
) -> jax.Array:
    """3x3 depthwise convolution, stride 1, padding 'SAME', by Triton, of `x` or of `relu(x * scale + shift)`.

    Args:
      x: `[N, H, W, C]`.
      kernel: `[3, 3, 1, C]`.
      affine: scale and shift, `[2, C]` float32: a normalization, computed on the way in. None for `x` as it is.
      relu: after the normalization; not without one.
      interpret: compute what the kernels would, on any machine, slowly.

    Returns:
      `[N, H, W, C]` in the type of `x`.
    """
    options = dict(plan=_Plan.of(x.shape, FORWARD), relu=relu, interpret=interpret)
    return _call(_forward_kernel, x, _weights(kernel), affine, out_shape=x, **options)


def _depthwise_forward(x, kernel, affine, relu, interpret):
    return depthwise(x, kernel, affine, relu, interpret), (x, kernel, affine)


def _depthwise_backward(relu, interpret, saved, dy):
    x, kernel, affine = saved
    plan = _Plan.of(x.shape, BACKWARD)
    sums = jax.ShapeDtypeStruct((*plan.grid[:0:-1], 9 if affine is None else 11, x.shape[-1]), jnp.float32)
    options = dict(plan=plan, relu=relu, interpret=interpret)
    dx, sums = _call(_backward_kernel, x, dy, _weights(kernel), affine, out_shape=(x, sums), **options)
    sums = jnp.sum(sums, axis=(0, 1))
    daffine = None if affine is None else sums[9:].astype(affine.dtype)
    return dx, sums[:9].reshape(kernel.shape).astype(kernel.dtype), daffine


depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _weights(kernel: jax.Array) -> jax.Array:
    return kernel.reshape(9, -1).astype(jnp.float32)


def _call(kernel, *operands, out_shape, plan, relu, interpret):
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        partial(kernel, plan=plan, relu=relu, interpret=interpret),
        grid=plan.grid,
        in_specs=jax.tree.map(lambda _: whole, operands),
        out_specs=jax.tree.map(lambda _: whole, out_shape),
        out_shape=jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), out_shape),
        compiler_params=plgpu.CompilerParams(num_warps=plan.warps),
        interpret=interpret,
        name="depthwise" + kernel.__name__.removesuffix("_kernel"),
    )(*operands)


def _forward_kernel(x, kernel, affine, y, *, plan, relu, interpret):
    block = _Block(x.shape, kernel, affine, plan, relu, interpret)

    def tile(row, column, _):
        sums = _sums(plan)
        for place, tap, pixel in _neighbours(plan, lambda r, c: block.read_normalized(x, row + r, column + c)[1]):
            sums[place] = block.multiply_add(sums[place], pixel, block.weights[tap])
        for (r, c), total in sums.items():
            block.write(y, row + r, column + c, total)

    _each_tile(plan, tile, None)


def _backward_kernel(x, dy, kernel, affine, dx, sums, *, plan, relu, interpret):
    block = _Block(x.shape, kernel, affine, plan, relu, interpret)

    def tile(row, column, totals):
        gradients, totals = _sums(plan), list(totals)
        read = {(r, c): block.read_normalized(x, row + r, column + c) for r, c in gradients}
        for place, tap, pixel in _neighbours(plan, lambda r, c: block.read(dy, row + r, column + c)[0]):
            # The gradient of `x` is a convolution with the kernel turned round.
            gradients[place] = block.multiply_add(gradients[place], pixel, block.weights[8 - tap])
            totals[8 - tap] = block.multiply_add(totals[8 - tap], pixel, read[place][1])
        for (r, c), gradient in gradients.items():
            if affine is not None:
                pixel, normalized, inside = read[r, c]
                gradient = jnp.where(normalized > 0 if relu else inside, gradient, 0.0)
                totals[9] = block.multiply_add(totals[9], gradient, pixel)
                totals[10] += gradient
                gradient *= block.scale
            block.write(dx, row + r, column + c, gradient)
        return tuple(totals)

    zeros = jnp.zeros((plan.images, plan.channels), jnp.float32)
    totals = _each_tile(plan, tile, (zeros,) * sums.shape[2])
    channels = pl.program_id(0) * plan.channels + jnp.arange(plan.channels)
    for i, total in enumerate(totals):
        index = (pl.program_id(2), pl.program_id(1), i, channels)
        plgpu.store(sums.at[index], jnp.sum(total, axis=0), mask=channels < x.shape[-1])


def _each_tile(plan: _Plan, tile: Callable[..., Any], carry: Any) -> Any:
    """Calls `tile(row, column, carry)` along a strip, down its rows first: the pixels next to it are still in L1."""
    first = pl.program_id(1) * plan.row_tiles

    def step(t, carry):
        row = (first + lax.rem(t, plan.row_tiles)) * plan.rows
        return tile(row, lax.div(t, plan.row_tiles) * plan.columns, carry)

    return lax.fori_loop(0, plan.row_tiles * plan.column_tiles, step, carry)


def _sums(plan: _Plan) -> dict[tuple[int, int], jax.Array]:
    """A sum for each (row, column) of a tile."""
    zeros = jnp.zeros((plan.images, plan.channels), jnp.float32)
    return {(r, c): zeros for r in range(plan.rows) for c in range(plan.columns)}


def _neighbours(plan: _Plan, read: Callable[[int, int], jax.Array]) -> Iterator[tuple[tuple[int, int], int, jax.Array]]:
    """Yields (place in the tile, tap, pixel under the tap); each pixel is read once."""
    for r in range(-1, plan.rows + 1):
        for c in range(-1, plan.columns + 1):
            pixel = read(r, c)
            for tap in range(9):
                place = r + 1 - tap // 3, c + 1 - tap % 3
                if 0 <= place[0] < plan.rows and 0 <= place[1] < plan.columns:
                    yield place, tap, pixel


class _Block:
    """A program's blocks of images and channels: a pixel is `[images, channels]`, float32."""

    def __init__(self, shape, kernel, affine, plan: _Plan, relu: bool, interpret: bool) -> None:
        self.relu, self.interpret = relu, interpret
        n, self.height, self.width, channels = shape
        shape = (plan.images, plan.channels)
        self.images = lax.broadcasted_iota(jnp.int32, shape, 0) + pl.program_id(2) * plan.images
        self.channels = lax.broadcasted_iota(jnp.int32, shape, 1) + pl.program_id(0) * plan.channels
        self.mask = (self.images < n) & (self.channels < channels)
        self.weights = [self._row(kernel, tap) for tap in range(9)]
        self.scale, self.shift = (None, None) if affine is None else (self._row(affine, 0), self._row(affine, 1))

    def _row(self, ref, row: int) -> jax.Array:
        # For each of the images: so it comes in the layout of the pixels, without a shuffle.
        return plgpu.load(ref.at[row, self.channels], mask=self.mask, other=0.0)

    def read(self, ref, row, column) -> tuple[jax.Array, jax.Array]:
        """A pixel, and whether it is inside the image; zeros where it is not."""
        inside = (row >= 0) & (row < self.height) & (column >= 0) & (column < self.width)
        pixel = plgpu.load(ref.at[self.images, row, column, self.channels], mask=inside & self.mask, other=0.0)
        if self.interpret or pixel.dtype != jnp.bfloat16:
            return pixel.astype(jnp.float32), inside
        # Triton takes three instructions for a pair of these, a shift and a mask are enough.
        asm = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
        return _assembly(asm, pixel, constraints="=&r,=r,r", pack=2), inside

    def read_normalized(self, ref, row, column) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A pixel, the same normalized (the padding too is zeros after that), and whether it is inside the image."""
        pixel, inside = self.read(ref, row, column)
        if self.scale is None:
            return pixel, pixel, inside
        normalized = self.multiply_add(self.shift, pixel, self.scale)
        if self.relu:
            normalized = jnp.maximum(normalized, 0.0)
        return pixel, jnp.where(inside, normalized, 0.0), inside

    def write(self, ref, row, column, pixel: jax.Array) -> None:
        mask = (row < self.height) & (column < self.width) & self.mask
        plgpu.store(ref.at[self.images, row, column, self.channels], pixel.astype(ref.dtype), mask=mask)

    def multiply_add(self, total: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        # XLA has Triton keep the two apart, which costs as many instructions again.
        if self.interpret:
            return total + a * b
        return _assembly("fma.rn.f32 $0, $1, $2, $3;", a, b, total, constraints="=f,f,f,f", pack=1)


def _assembly(asm: str, *operands: jax.Array, constraints: str, pack: int) -> jax.Array:
    shape = jax.ShapeDtypeStruct(operands[0].shape, jnp.float32)
    (result,) = plgpu.elementwise_inline_asm(
        asm, args=operands, constraints=constraints, pack=pack, result_shape_dtypes=[shape]
    )
    return result
