"""Lowerings for CPUs, where XLA's own are slow: gradients of convolutions, and the depthwise convolution itself.

Values and gradients are those of `stock`. Each has its own rule for the gradient, so forward mode (`jax.jvp`) is not
supported.
"""

from collections.abc import Callable
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from xception_flax.models.ops import lowerings, stock, windows

# Regular convolution ------------------------------------------------------------------------------


def convolution(
    x: jax.Array, kernel: jax.Array, *, strides: tuple[int, int], padding: str, dilation: tuple[int, int]
) -> jax.Array:
    """`ops.convolution`; the kernel's gradient is a sum over images of the product of patches and output gradient.

    XLA's own kernel gradient is many times slower on CPUs; its value and its input gradient are not.
    """
    return _convolution_by_patches(x, kernel, strides, padding, dilation)


def grouped_convolution(
    x: jax.Array,
    kernel: jax.Array,
    *,
    groups: int,
    strides: tuple[int, int],
    padding: str,
    dilation: tuple[int, int],
) -> jax.Array:
    """`ops.convolution` with groups, as a regular convolution whose kernel is 0 between two groups.

    That is `groups` times the arithmetic, and yet forward and backward pass together took a 10th to a 36th of the time
    of XLA's own: 4 and 8 groups of 2 to 30 channels, 64 images, on two busy CPU cores. With 512 channels in 4, 16 and
    64 groups it was a half, a 5th and a 17th.
    """
    kh, kw, size, features = kernel.shape
    spread = kernel.reshape(kh, kw, size, groups, features // groups)
    # [kh, kw, group of inputs, size, group of outputs, features of a group]
    same = jnp.eye(groups, dtype=kernel.dtype)[None, None, :, None, :, None]
    block_diagonal = spread[:, :, None] * same
    block_diagonal = block_diagonal.reshape(kh, kw, groups * size, features)
    return convolution(x, block_diagonal, strides=strides, padding=padding, dilation=dilation)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolution_by_patches(x, kernel, strides, padding, dilation):
    return stock.convolution(x, kernel, strides=strides, padding=padding, dilation=dilation)


def _convolution_by_patches_forward(x, kernel, strides, padding, dilation):
    return _convolution_by_patches(x, kernel, strides, padding, dilation), (x, kernel)


def _convolution_by_patches_backward(strides, padding, dilation, saved, dy):
    x, kernel = saved
    if not dy.size:
        return jnp.zeros_like(x), jnp.zeros_like(kernel)
    window = kernel.shape[:2]
    pads = windows.pads(x.shape[1:3], windows.spans(window, dilation), strides, padding)
    # As in XLA's own rule, but with the kernel reversed in memory: only for that layout is there a fast
    # convolution.
    dx = lax.conv_general_dilated(
        dy,
        lax.optimization_barrier(kernel[::-1, ::-1].swapaxes(2, 3)),
        window_strides=(1, 1),
        padding=windows.reach(x.shape, pads, dy.shape, window, strides, dilation),
        lhs_dilation=strides,
        rhs_dilation=dilation,
        dimension_numbers=stock.DIMENSIONS,
    )
    wide = np.promote_types(kernel.dtype, jnp.float32)

    def add_image(total, image_and_gradient):
        image, gradient = image_and_gradient
        taps = [tap[0] for _, _, tap in windows.taps(image[None], window, strides, dilation)]
        patches = jnp.concatenate(taps, axis=-1).reshape(-1, total.shape[0])  # [H' * W', kh * kw * C]
        gradient = gradient.reshape(-1, total.shape[1])
        product = lax.dot_general(patches, gradient, (((0,), (0,)), ((), ())), preferred_element_type=total.dtype)
        return total + product, None

    def add_images(images, gradients):
        total = jnp.zeros((kernel.size // kernel.shape[-1], kernel.shape[-1]), wide)
        return lax.scan(add_image, total, (images, gradients))[0]

    total = _sum_over_devices(add_images, windows.padded(x, window, strides, padding, dilation), dy)
    return dx, total.reshape(kernel.shape).astype(kernel.dtype)


_convolution_by_patches.defvjp(_convolution_by_patches_forward, _convolution_by_patches_backward)


# Depthwise convolution ----------------------------------------------------------------------------


def depthwise(
    x: jax.Array, kernel: jax.Array, *, strides: tuple[int, int], padding: str, dilation: tuple[int, int]
) -> jax.Array:
    """`ops.depthwise_convolution` as a sum over the kernel's taps of the shifted image times a weight a channel.

    XLA's grouped convolution is many times slower on CPUs, and its gradients even more.
    """
    dtype, wide = x.dtype, np.promote_types(x.dtype, jnp.float32)  # add up as a convolution does
    x = windows.padded(x.astype(wide), kernel.shape[:2], strides, padding, dilation)
    x = jnp.repeat(x, kernel.shape[-1] // x.shape[-1], axis=-1)
    return _sum_of_taps(x, kernel[:, :, 0].astype(wide), strides, dilation).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _sum_of_taps(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], dilation: tuple[int, int]) -> jax.Array:
    """`[N, H, W, C]`, padded already, and `[kh, kw, C]` -> `[N, H', W', C]`."""
    taps = windows.taps(x, kernel.shape[:2], strides, dilation)
    return reduce(jnp.add, (tap * kernel[i, j, None, None, None] for i, j, tap in taps))


def _sum_of_taps_forward(x, kernel, strides, dilation):
    return _sum_of_taps(x, kernel, strides, dilation), (x, kernel)


def _sum_of_taps_backward(strides, dilation, saved, dy):
    x, kernel = saved
    if not dy.size:
        return jnp.zeros_like(x), jnp.zeros_like(kernel)
    # A pixel's gradient is the same sum, over the windows that reach it, with the kernel reversed.
    edges = windows.reach(x.shape, [(0, 0), (0, 0)], dy.shape, kernel.shape[:2], strides, dilation)
    edges = [(low, high, stride - 1) for (low, high), stride in zip(edges, strides, strict=True)]
    spread = lax.pad(dy, np.zeros((), dy.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    taps = windows.taps(spread, kernel.shape[:2], dilation=dilation)
    dx = reduce(jnp.add, (tap * kernel[-1 - i, -1 - j, None, None, None] for i, j, tap in taps))
    by_rows = partial(_kernel_gradient_by_rows, shape=kernel.shape, strides=strides, dilation=dilation)
    return dx, _sum_over_devices(by_rows, x, dy)


def _kernel_gradient_by_rows(x, dy, *, shape, strides, dilation):
    # Row by row, into a sum for each tap and column: on CPUs, XLA's reductions over whole shifted images
    # are many times slower. A turn of the loop takes two rows: with one it takes up to seven times as long for small
    # images; four are faster for some shapes and slower for others, and compile for longer.
    batch, rows, columns, channels = dy.shape
    places = [(i, j) for i in range(shape[0]) for j in range(shape[1])]

    def add_row(totals, row):  # counted through all images
        n, h = row // rows, row % rows
        gradient = lax.dynamic_slice(dy, (n, h, 0, 0), (1, 1, columns, channels))[0, 0]
        reached = [
            lax.dynamic_slice(x, (n, h * strides[0] + i * dilation[0], 0, 0), (1, 1, *x.shape[2:]))[0, 0]
            for i in range(shape[0])
        ]
        return [
            total + gradient * reached[i][windows.every(j * dilation[1], columns, strides[1])]
            for total, (i, j) in zip(totals, places, strict=True)
        ]

    pairs, single = divmod(batch * rows, 2)
    totals = [jnp.zeros((columns, channels), dy.dtype) for _ in places]
    totals = lax.fori_loop(0, pairs, lambda i, totals: add_row(add_row(totals, 2 * i), 2 * i + 1), totals)
    if single:
        totals = add_row(totals, 2 * pairs)
    return jnp.stack([jnp.sum(total, axis=0) for total in totals]).reshape(shape)


_sum_of_taps.defvjp(_sum_of_taps_forward, _sum_of_taps_backward)


def normalized_depthwise(
    x: jax.Array, affine: jax.Array, kernel: jax.Array, *, relu: bool, dilation: tuple[int, int]
) -> jax.Array:
    """`depthwise` of `stock.normalized`, stride 1, padding 'SAME'."""
    x = stock.normalized(x, affine, relu)
    return depthwise(x, kernel, strides=(1, 1), padding="SAME", dilation=dilation)


# Pointwise convolution ----------------------------------------------------------------------------


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`stock.product`, whose gradient is not fused with the operation before it in the backward pass.

    XLA for CPUs would fuse the gradient of the normalization into two transposed copies, one for each of
    the two products that use it.
    """
    return stock.product(x, kernel)


def _product_forward(x, kernel):
    return stock.product(x, kernel), (x, kernel)


def _product_backward(saved, dy):
    x, kernel = saved
    pixels = x.reshape(-1, x.shape[-1])
    gradients = lax.optimization_barrier(dy).reshape(-1, dy.shape[-1])
    dx = lax.dot_general(gradients, kernel, (((1,), (1,)), ((), ())))
    return dx.reshape(x.shape), lax.dot_general(pixels, gradients, (((0,), (0,)), ((), ())))


product.defvjp(_product_forward, _product_backward)


# A batch over devices -----------------------------------------------------------------------------


def _sum_over_devices(function: Callable[..., jax.Array], *operands: jax.Array) -> jax.Array:
    """Adds up `function` over the devices' shares of the images; all axes of the mesh in context must split the batch.

    For loops over images: XLA's partitioner would gather the images and let every device loop over all of them. If an
    axis splits something else than the batch, arrays are moved back and forth.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1 or not lowerings.is_auto(mesh) or operands[0].shape[0] % mesh.size:
        return function(*operands)
    return jax.shard_map(
        lambda *shares: lax.psum(function(*shares), mesh.axis_names),
        in_specs=PartitionSpec(mesh.axis_names),
        out_specs=PartitionSpec(),
        check_vma=False,
    )(*operands)
