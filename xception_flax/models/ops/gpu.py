"""Lowerings for NVIDIA GPUs: Triton kernels for the depthwise convolution, and what XLA and cuDNN do in more passes.

cuDNN's grouped convolution with one channel a group is slow, most of all the gradient of its kernel. A depthwise
convolution does only nine multiply-adds for each number that it reads, so at best it takes the time to read `x` and
write `y` once. The kernels add up in float32, and for the backward pass they keep only `x` and `kernel`.

They are for 3x3 windows, stride 1, no dilation and padding 'SAME', which is all that Xception has at output stride 32;
the rest is `stock`. `X` bytes of `x` cost `2 X` forward and `3 X` backward: one kernel reads `x` and the gradient of
`y`, and writes the gradient of `x` and partial sums of the kernel's. The kernels can also apply the normalization
before the convolution, on the way in.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import PartitionSpec

from xception_flax.models.ops import pooling, stock, windows

# Operations ----------------------------------------------------------------------------------------


def depthwise(
    x: jax.Array, kernel: jax.Array, *, strides: tuple[int, int], padding: str, dilation: tuple[int, int]
) -> jax.Array:
    """`ops.depthwise_convolution` by Triton where there is a kernel for it."""
    options = dict(strides=strides, padding=padding, dilation=dilation)
    if has_kernel(x, kernel, **options):
        return _by_shares(x, kernel, None, False)
    return stock.depthwise(x, kernel, **options)


def normalized_depthwise(
    x: jax.Array, affine: jax.Array, kernel: jax.Array, *, relu: bool, dilation: tuple[int, int]
) -> jax.Array:
    """`depthwise` of `stock.normalized`, stride 1, padding 'SAME': in one kernel where there is one for it."""
    if affine.dtype == jnp.float32 and has_kernel(x, kernel, strides=(1, 1), padding="SAME", dilation=dilation):
        return _by_shares(x, kernel, affine, relu)
    return stock.normalized_depthwise(x, affine, kernel, relu=relu, dilation=dilation)


def has_kernel(
    x: jax.Array, kernel: jax.Array, *, strides: Sequence[int], padding: str, dilation: Sequence[int]
) -> bool:
    """Whether `triton_depthwise` supports this depthwise convolution, and all devices get as many images."""
    pads = windows.pads(x.shape[1:3], windows.spans(kernel.shape[:2], dilation), strides, padding)
    same = kernel.shape == (3, 3, 1, x.shape[-1]) and (*strides, *dilation) == (1, 1, 1, 1)
    shares = _num_shares()
    whole_shares = x.shape[0] % shares == 0
    fits = 0 < x.size // shares < 2**31  # offsets within a share have 32 bits
    dtypes = (jnp.float32, jnp.bfloat16, jnp.float16)
    return same and pads == [(1, 1), (1, 1)] and whole_shares and fits and x.dtype in dtypes


def _num_shares() -> int:
    """Returns among how many devices the images of an array are split: all of the mesh in context."""
    return max(1, jax.sharding.get_abstract_mesh().size)


def _by_shares(x: jax.Array, kernel: jax.Array, affine: jax.Array | None, relu: bool) -> jax.Array:
    """`triton_depthwise`, by each device of the mesh in context for its share of the images.

    XLA's partitioner would let every device compute all images.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return triton_depthwise(x, kernel, affine, relu)
    batch, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    return jax.shard_map(
        lambda x, kernel, affine: triton_depthwise(x, kernel, affine, relu),
        in_specs=(batch, whole, whole),
        out_specs=batch,
        check_vma=False,
    )(x, kernel, affine)


max_pool = partial(pooling.max_pool, barrier=True)
normalized_max_pool = partial(pooling.normalized_max_pool, barrier=True)


def convolution(
    x: jax.Array, kernel: jax.Array, *, strides: tuple[int, int], padding: str, dilation: tuple[int, int]
) -> jax.Array:
    """`ops.convolution`; of as few channels as an image has, for which cuDNN has no fast kernel, as a product."""
    if x.shape[-1] > _FEW_CHANNELS or math.prod(kernel.shape[:3]) > _LARGEST_PATCH:
        return stock.convolution(x, kernel, strides=strides, padding=padding, dilation=dilation)
    return _product_of_patches(x, kernel, strides, padding, dilation)


_FEW_CHANNELS, _LARGEST_PATCH = 4, 64


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _product_of_patches(x, kernel, strides, padding, dilation):
    size = math.prod(kernel.shape[:3])
    zeros = -size % 16  # for the alignment that fast products need
    x = windows.padded(x, kernel.shape[:2], strides, padding, dilation)
    taps = [tap for _, _, tap in windows.taps(x, kernel.shape[:2], strides, dilation)]
    patches = jnp.concatenate([*taps, jnp.zeros((*taps[0].shape[:3], zeros), x.dtype)], axis=-1)
    return stock.product(patches, jnp.pad(kernel.reshape(size, -1), ((0, zeros), (0, 0))))


def _product_of_patches_forward(x, kernel, strides, padding, dilation):
    return _product_of_patches(x, kernel, strides, padding, dilation), (x, kernel)


def _product_of_patches_backward(strides, padding, dilation, saved, dy):
    # The gradient of the kernel is a sum over so many pixels that cuDNN is faster, with eight channels.
    def convolution(x, kernel):
        zeros = (0, 8 - x.shape[-1])
        x, kernel = jnp.pad(x, [(0, 0)] * 3 + [zeros]), jnp.pad(kernel, [(0, 0)] * 2 + [zeros, (0, 0)])
        return stock.convolution(x, kernel, strides=strides, padding=padding, dilation=dilation)

    return jax.vjp(convolution, *saved)[1](dy)


_product_of_patches.defvjp(_product_of_patches_forward, _product_of_patches_backward)


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`stock.product`; the gradient of a small kernel is added up from parts of images.

    XLA for GPUs splits a long sum over pixels among the multiprocessors by a power of two. If that does not divide the
    number of pixels, it first makes padded copies of both operands.
    """
    return stock.product(x, kernel)


def _product_forward(x, kernel):
    return stock.product(x, kernel), (x, kernel)


def _product_backward(saved, dy):
    x, kernel = saved
    dx = lax.dot_general(dy, kernel, (((3,), (1,)), ((), ())))
    n, rows = x.shape[:2]
    share = n // _num_shares()
    parts = next((p for p in range(1, 9) if rows % p == 0 and share * p >= _PARTS), None)
    # The parts must write much less than they read.
    if parts is None or 4 * n * parts * kernel.size > x.size // 4:
        return dx, lax.dot_general(x, dy, (((0, 1, 2), (0, 1, 2)), ((), ())))
    x, dy = (array.reshape(n, parts, -1, array.shape[-1]) for array in (x, dy))
    wide = np.promote_types(x.dtype, jnp.float32)
    sums = lax.dot_general(x, dy, (((2,), (2,)), ((0, 1), (0, 1))), preferred_element_type=wide)
    return dx, jnp.sum(sums, axis=(0, 1)).astype(kernel.dtype)


_PARTS = 256  # enough to keep a GPU's 108 to 160 multiprocessors busy

product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def moments(x: jax.Array) -> jax.Array:
    """`stock.moments` by one reduction: after a matrix product, XLA for GPUs would read `x` for each of two."""
    wide = x.astype(np.promote_types(x.dtype, jnp.float32))
    zero = np.zeros((), wide.dtype)
    sums = lax.reduce(
        (wide, jnp.square(wide)), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), tuple(range(x.ndim - 1))
    )
    return jnp.stack(sums) / (x.size // x.shape[-1])


def _moments_forward(x):
    return moments(x), x


def _moments_backward(x, gradient):
    gradient = gradient.reshape(2, *(1,) * (x.ndim - 1), -1) / (x.size // x.shape[-1])
    return ((gradient[0] + 2 * gradient[1] * x.astype(gradient.dtype)).astype(x.dtype),)


moments.defvjp(_moments_forward, _moments_backward)


# Triton kernels ------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """The pixels that a program of a kernel computes at a time: a rectangle at the same place of several images.

    Attributes:
      rows: of pixels, unrolled, as `columns`. For r rows and c columns, (r + 2) * (c + 2) pixels are read.
      columns: of pixels.
      warps: of 32 threads, each with 4 channels of an image. So the weights, the results and, backward, the sums stay
        in registers, and 8 bytes are read at a time.
      sums: whether the kernel writes sums for each strip of tiles over which a warp walks. Then a strip is several
        tiles high, as many as lets one wave of warps do all; else one.
    """

    rows: int
    columns: int
    warps: int = 1
    sums: bool = True


FORWARD = Tile(rows=4, columns=5, sums=False)
BACKWARD = Tile(rows=2, columns=3)
# With a normalization, 2 x 3 pixels take 252 of a thread's 255 registers; 2 x 2 take 168.
NORMALIZED_BACKWARD = Tile(rows=2, columns=2)

_CHANNELS = 128  # 32 threads, 4 channels each
_WAVE = 1536  # about as many warps as an H100 runs at a time, 12 on each of 132 multiprocessors
_HIGH = 40  # rows of an image with which a wave's strips would no longer stay in the caches


class _Plan(NamedTuple):
    """A tile cut to the size of an array, and the grid: blocks of channels, strips, blocks of images."""

    rows: int
    columns: int
    images: int
    channels: int
    row_tiles: int  # of a strip
    column_tiles: int  # of a strip
    column_strips: int
    warps: int
    grid: tuple[int, int, int]

    @classmethod
    def of(cls, shape: tuple[int, ...], tile: Tile) -> "_Plan":
        n, height, width, channels = shape
        channel_block = min(_CHANNELS, pl.next_power_of_2(channels))
        image_block = min(tile.warps * _CHANNELS // channel_block, pl.next_power_of_2(n))
        rows, columns = min(tile.rows, height), min(tile.columns, width)
        blocks = pl.cdiv(channels, channel_block), pl.cdiv(n, image_block)
        tiles, column_tiles = pl.cdiv(height, rows), pl.cdiv(width, columns)
        warps = blocks[0] * blocks[1] * tile.warps  # if a strip had all rows
        if not tile.sums:
            row_tiles = 1
        elif height > _HIGH:
            row_tiles = max(1, tiles // 32)
        else:
            row_tiles = pl.cdiv(tiles, max(1, _WAVE // warps))
        row_strips = pl.cdiv(tiles, row_tiles)
        # Few images leave most of a GPU idle: then a strip is a tile wide.
        column_strips = column_tiles if warps * row_strips < _WAVE // 4 else 1
        grid = (blocks[0], row_strips * column_strips, blocks[1])
        column_tiles = pl.cdiv(column_tiles, column_strips)
        return cls(rows, columns, image_block, channel_block, row_tiles, column_tiles, column_strips, tile.warps, grid)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def triton_depthwise(
    x: jax.Array, kernel: jax.Array, affine: jax.Array | None = None, relu: bool = False, interpret: bool = False
) -> jax.Array:
    """3x3 depthwise convolution, stride 1, padding 'SAME', by Triton, of `x` or of `relu(x * scale + shift)`.

    Args:
      x: `[N, H, W, C]`.
      kernel: `[3, 3, 1, C]`.
      affine: scale and shift, `[2, C]` float32: a normalization, applied on the way in. None for `x` as it is.
      relu: whether a ReLU follows the normalization; without one it is ignored.
      interpret: run the kernels in Pallas' interpreter, on any machine, slowly.

    Returns:
      `[N, H, W, C]` in the type of `x`.
    """
    options = dict(plan=_Plan.of(x.shape, FORWARD), relu=relu, interpret=interpret)
    return _call(_forward_kernel, x, _weights(kernel), affine, out_shape=x, **options)


def _depthwise_forward(x, kernel, affine, relu, interpret):
    return triton_depthwise(x, kernel, affine, relu, interpret), (x, kernel, affine)


def _depthwise_backward(relu, interpret, saved, dy):
    return _gradients(*saved, dy, relu, interpret)


triton_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _gradients(x, kernel, affine, dy, relu, interpret):
    plan = _Plan.of(x.shape, BACKWARD if affine is None else NORMALIZED_BACKWARD)
    sums = jax.ShapeDtypeStruct((*plan.grid[:0:-1], 9 if affine is None else 11, x.shape[-1]), jnp.float32)
    options = dict(plan=plan, relu=relu, interpret=interpret)
    dx, sums = _call(_backward_kernel, x, dy, _weights(kernel), affine, out_shape=(x, sums), **options)
    sums = jnp.sum(sums, axis=(0, 1))
    daffine = None if affine is None else sums[9:].astype(affine.dtype)
    return dx, sums[:9].reshape(kernel.shape).astype(kernel.dtype), daffine


def _gradients_forward(x, kernel, affine, dy, relu, interpret):
    return _gradients(x, kernel, affine, dy, relu, interpret), (x, kernel, affine, dy)


def _gradients_backward(relu, interpret, saved, cotangents):
    # Second derivatives are XLA's own.
    def gradients(x, kernel, affine, dy):
        return jax.vjp(partial(_by_xla, relu=relu), x, kernel, affine)[1](dy)

    return jax.vjp(gradients, *saved)[1](cotangents)


_gradients.defvjp(_gradients_forward, _gradients_backward)


def _by_xla(x, kernel, affine, *, relu):
    x = x if affine is None else stock.normalized(x, affine, relu)
    return stock.depthwise(x, kernel, strides=(1, 1), padding="SAME", dilation=(1, 1))


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
            # The gradient of `x` is a convolution with the reversed kernel.
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
    """Calls `tile(row, column, carry)` along a strip, down its rows first, so that neighbours are still in L1."""
    strip, strips = pl.program_id(1), np.int32(plan.column_strips)
    first_row = lax.div(strip, strips) * plan.row_tiles
    first_column = lax.rem(strip, strips) * plan.column_tiles

    def step(t, carry):
        row = (first_row + lax.rem(t, plan.row_tiles)) * plan.rows
        return tile(row, (first_column + lax.div(t, plan.row_tiles)) * plan.columns, carry)

    return lax.fori_loop(0, plan.row_tiles * plan.column_tiles, step, carry)


def _sums(plan: _Plan) -> dict[tuple[int, int], jax.Array]:
    """Returns zeros for the sum of each (row, column) of a tile."""
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
        # Loaded for each image, so that it has the layout of the pixels without a shuffle.
        return plgpu.load(ref.at[row, self.channels], mask=self.mask, other=0.0)

    def read(self, ref, row, column) -> tuple[jax.Array, jax.Array]:
        """Returns a pixel, and whether it is inside the image; outside it is zeros."""
        inside = (row >= 0) & (row < self.height) & (column >= 0) & (column < self.width)
        pixel = plgpu.load(ref.at[self.images, row, column, self.channels], mask=inside & self.mask, other=0.0)
        if self.interpret or pixel.dtype != jnp.bfloat16:
            return pixel.astype(jnp.float32), inside
        # Triton takes three instructions to convert a pair of these; a shift and a mask are enough.
        asm = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
        return _assembly(asm, pixel, constraints="=&r,=r,r", pack=2), inside

    def read_normalized(self, ref, row, column) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns a pixel, the pixel normalized (zeros outside the image), and whether it is inside the image."""
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
        # XLA makes Triton keep the two apart, which takes twice the instructions.
        if self.interpret:
            return total + a * b
        return _assembly("fma.rn.f32 $0, $1, $2, $3;", a, b, total, constraints="=f,f,f,f", pack=1)


def _assembly(asm: str, *operands: jax.Array, constraints: str, pack: int) -> jax.Array:
    shape = jax.ShapeDtypeStruct(operands[0].shape, jnp.float32)
    (result,) = plgpu.elementwise_inline_asm(
        asm, args=operands, constraints=constraints, pack=pack, result_shape_dtypes=[shape]
    )
    return result
