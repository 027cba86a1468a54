"""The operations of the network as pure functions of arrays, channels last (`[N, H, W, C]`).

Each is defined in XLA's own operations, which GPUs and TPUs get. Where those are slow on CPUs there is
a second lowering for them, chosen when a program is compiled for its platform; values and gradients
are the same, and no caller knows of it. What CPUs get has its own rule for the gradient, which forward
mode (`jax.jvp`) does not take: use `with lowering("stock")` for that. Within `jax.shard_map` and over a mesh
with Explicit axes XLA's own is taken everywhere.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from xception_flax import fused, gpu
from xception_flax.lookup import suggest

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")

# Where the windows of a strided operation begin, in the words of those who differ:
# SAME       TensorFlow and Keras: just enough to reach the last pixel, the odd one below and right;
# SYMMETRIC  PyTorch and DeepLab's 'fixed padding': (span - 1) // 2 on both sides, whatever the size;
# VALID      none.
PADDINGS = ("SAME", "SYMMETRIC", "VALID")

LOWERINGS = ("platform", "stock", "fused", "shifts", "triton")


# Choosing a lowering -------------------------------------------------------------------------------

_chosen: ContextVar[str] = ContextVar("lowering", default="platform")


@contextlib.contextmanager
def lowering(name: str) -> Iterator[None]:
    """Operations called within it are traced with this lowering.

    Args:
      name: 'platform', the default, is the best that was measured for each platform; 'stock' is XLA's
        own operation on all of them; 'fused' is 'platform', but with the kernels of `fused` on TPUs
        where shapes allow: fewer bytes by the compiler's count, not yet timed on a TPU; 'shifts' and 'triton'
        are 'platform', but on CUDA with those depthwise convolutions of `gpu`, and max-pooling by taps. A
        function under `jit` keeps the lowering that it was first traced with.

    Raises:
      ValueError: another name.
    """
    if name not in LOWERINGS:
        raise ValueError(f"unknown lowering {name!r}; {suggest(name, LOWERINGS)}")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def is_fused() -> bool:
    """Whether the lowering is 'fused' or 'triton', with which networks leave it to operations to combine layers."""
    return _chosen.get() in ("fused", "triton")


def _lower(
    *operands: jax.Array,
    cpu: Callable[..., Any],
    stock: Callable[..., Any],
    cuda: dict[str, Callable[..., Any]] | None = None,
    **options: Any,
) -> Any:
    """Calls what is right for the platform with the operands and the (hashable) options.

    That is `cpu` or `stock`, and on CUDA what `cuda` has for the lowering.
    """
    # Within `shard_map` and over Explicit meshes a type says how an array is split; our own gradients do not.
    mesh = jax.sharding.get_abstract_mesh()
    name = _chosen.get() if mesh.empty or _is_auto(mesh) else "stock"
    cuda = (cuda or {}).get(name)
    return _lowered(*operands, cpu=cpu, stock=stock, cuda=cuda, options=tuple(options.items()), lowering=name)


# Under jit an operation is traced and differentiated once for each shape, not once for each of the equal
# layers, and compiled once where the caller is not under jit.
@partial(jax.jit, static_argnames=("cpu", "stock", "cuda", "options", "lowering"))
def _lowered(*operands, cpu, stock, cuda, options, lowering):
    named = {"cpu": cpu, "default": stock} if cuda is None else {"cpu": cpu, "cuda": cuda, "default": stock}
    named = {platform: partial(function, **dict(options)) for platform, function in named.items()}
    if lowering == "stock":
        return named["default"](*operands)
    return lax.platform_dependent(*operands, **named)


# A batch over devices ------------------------------------------------------------------------------


def _is_auto(mesh: AbstractMesh) -> bool:
    return set(mesh.axis_types) == {AxisType.Auto}


def _sum_over_devices(function: Callable[..., jax.Array], *operands: jax.Array) -> jax.Array:
    """Adds up `function` of each device's share of the images, for a batch that all axes of the mesh in context split.

    For a loop over images, which the partitioner would have every device run over all of them, gathered. Where
    an axis splits something else than the batch, this moves arrays to and fro.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1 or not _is_auto(mesh) or operands[0].shape[0] % mesh.size:
        return function(*operands)
    return jax.shard_map(
        lambda *shares: lax.psum(function(*shares), mesh.axis_names),
        in_specs=PartitionSpec(mesh.axis_names),
        out_specs=PartitionSpec(),
        check_vma=False,
    )(*operands)


# Windows -------------------------------------------------------------------------------------------


def _pads(sizes: Sequence[int], spans: Sequence[int], strides: Sequence[int], padding: str) -> list[tuple[int, int]]:
    """(before, after) of rows and columns for windows that reach over `spans` pixels."""
    _check_padding(padding)
    if padding == "SYMMETRIC":
        return [((span - 1) // 2, (span - 1) // 2) for span in spans]
    return lax.padtype_to_pads(sizes, spans, strides, padding)


def _check_padding(padding: str) -> None:
    if padding not in PADDINGS:
        raise ValueError(f"unknown padding {padding!r}; {suggest(padding, PADDINGS)}")


def _spans(window: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Pixels from the first to the last tap of a window, inclusive: rows, columns."""
    return [d * (size - 1) + 1 for d, size in zip(dilation, window, strict=True)]


def _padded(
    x: jax.Array,
    window: Sequence[int],
    strides: Sequence[int],
    padding: str,
    dilation: Sequence[int],
    value: float = 0.0,
) -> jax.Array:
    pads = _pads(x.shape[1:3], _spans(window, dilation), strides, padding)
    return jnp.pad(x, [(0, 0), *pads, (0, 0)], constant_values=value)


def _every(start: int, number: int, stride: int) -> slice:
    """The slice of `number` pixels from `start` on."""
    return slice(start, start + max(0, (number - 1) * stride + 1), stride)


def _taps(
    x: jax.Array, window: Sequence[int], strides: Sequence[int] = (1, 1), dilation: Sequence[int] = (1, 1)
) -> Iterator[tuple[int, int, jax.Array]]:
    """Yields (row, column, `[N, H', W', C]`) for each place in a window: what all windows have there."""
    spans = _spans(window, dilation)
    rows, columns = (max(0, (size - span) // s + 1) for size, span, s in zip(x.shape[1:3], spans, strides, strict=True))
    for i in range(window[0]):
        for j in range(window[1]):
            yield i, j, x[:, _every(i * dilation[0], rows, strides[0]), _every(j * dilation[1], columns, strides[1])]


def _reach(
    shape: Sequence[int],
    pads: Sequence[tuple[int, int]],
    out_shape: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
    dilation: Sequence[int],
) -> list[tuple[int, int]]:
    """(before, after) of the outputs, spread by the strides, so that a window over them is what reached a pixel."""
    spans = _spans(window, dilation)
    return [
        (span - 1 - low, low + size - 1 - (out - 1) * stride)
        for size, (low, _), out, span, stride in zip(shape[1:3], pads, out_shape[1:3], spans, strides, strict=True)
    ]


# Regular convolution -------------------------------------------------------------------------------


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
    _check_padding(padding)
    options = dict(strides=strides, padding=padding, dilation=dilation)
    if groups == x.shape[-1] > 1:
        return depthwise_convolution(x, kernel, **options)
    if kernel.shape[:2] == (1, 1) and groups == 1:
        return pointwise_convolution(x, kernel, strides=strides)
    if groups > 1:
        return _grouped_convolution(x, kernel, groups=groups, **options)
    return _lower(x, kernel, cpu=convolution_by_patches, stock=_grouped_convolution, **options)


def _grouped_convolution(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: tuple[int, int],
    padding: str,
    dilation: tuple[int, int],
    groups: int = 1,
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


def convolution_by_patches(
    x: jax.Array, kernel: jax.Array, *, strides: tuple[int, int], padding: str, dilation: tuple[int, int]
) -> jax.Array:
    """`convolution` with a kernel gradient of matrix products, patches of one image after the other by the gradient.

    XLA's own is many times slower on CPUs; its other gradient and its value are not.
    """
    return _convolution_by_patches(x, kernel, strides, padding, dilation)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolution_by_patches(x, kernel, strides, padding, dilation):
    return _grouped_convolution(x, kernel, strides=strides, padding=padding, dilation=dilation)


def _convolution_by_patches_forward(x, kernel, strides, padding, dilation):
    return _convolution_by_patches(x, kernel, strides, padding, dilation), (x, kernel)


def _convolution_by_patches_backward(strides, padding, dilation, saved, dy):
    x, kernel = saved
    if not dy.size:
        return jnp.zeros_like(x), jnp.zeros_like(kernel)
    window = kernel.shape[:2]
    pads = _pads(x.shape[1:3], _spans(window, dilation), strides, padding)
    # As XLA's own rule has it, but the kernel is turned round in memory: there is a fast convolution
    # for that layout alone.
    dx = lax.conv_general_dilated(
        dy,
        lax.optimization_barrier(kernel[::-1, ::-1].swapaxes(2, 3)),
        window_strides=(1, 1),
        padding=_reach(x.shape, pads, dy.shape, window, strides, dilation),
        lhs_dilation=strides,
        rhs_dilation=dilation,
        dimension_numbers=_DIMENSIONS,
    )
    wide = jnp.promote_types(kernel.dtype, jnp.float32)

    def add_image(total, image_and_gradient):
        image, gradient = image_and_gradient
        taps = [tap[0] for _, _, tap in _taps(image[None], window, strides, dilation)]
        patches = jnp.concatenate(taps, axis=-1).reshape(-1, total.shape[0])  # [H' * W', kh * kw * C]
        gradient = gradient.reshape(-1, total.shape[1])
        product = lax.dot_general(patches, gradient, (((0,), (0,)), ((), ())), preferred_element_type=total.dtype)
        return total + product, None

    def add_images(images, gradients):
        total = jnp.zeros((kernel.size // kernel.shape[-1], kernel.shape[-1]), wide)
        return lax.scan(add_image, total, (images, gradients))[0]

    total = _sum_over_devices(add_images, _padded(x, window, strides, padding, dilation), dy)
    return dx, total.reshape(kernel.shape).astype(kernel.dtype)


_convolution_by_patches.defvjp(_convolution_by_patches_forward, _convolution_by_patches_backward)


# Depthwise convolution -----------------------------------------------------------------------------


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
    cuda = {"shifts": depthwise_by_fusions, "triton": depthwise_by_triton}
    return _lower(x, kernel, cpu=depthwise_by_shifts, stock=depthwise_by_groups, cuda=cuda, **options)


def depthwise_by_groups(
    x: jax.Array, kernel: jax.Array, *, strides: tuple[int, int], padding: str, dilation: tuple[int, int]
) -> jax.Array:
    """`depthwise_convolution` as XLA's grouped convolution, one group a channel."""
    options = dict(strides=strides, padding=padding, dilation=dilation)
    return _grouped_convolution(x, kernel, groups=x.shape[-1], **options)


def depthwise_by_fusions(
    x: jax.Array, kernel: jax.Array, *, strides: tuple[int, int], padding: str, dilation: tuple[int, int]
) -> jax.Array:
    """`depthwise_convolution` as `gpu.shifts`."""
    pads = tuple(_pads(x.shape[1:3], _spans(kernel.shape[:2], dilation), strides, padding))
    y = jax.eval_shape(partial(depthwise_by_groups, strides=strides, padding=padding, dilation=dilation), x, kernel)
    if not x.size or not y.size:
        return jnp.zeros(y.shape, y.dtype)
    return gpu.shifts(x, kernel, strides, pads, dilation)


def depthwise_by_triton(
    x: jax.Array, kernel: jax.Array, *, strides: tuple[int, int], padding: str, dilation: tuple[int, int]
) -> jax.Array:
    """`depthwise_convolution` as `gpu.depthwise`, where that has a kernel for it, else as `gpu.shifts`."""
    if _has_kernel(x, kernel, strides=strides, padding=padding, dilation=dilation):
        return _by_triton(x, kernel, None, False)
    return depthwise_by_fusions(x, kernel, strides=strides, padding=padding, dilation=dilation)


def _has_kernel(x, kernel, *, strides, padding, dilation):
    pads = _pads(x.shape[1:3], _spans(kernel.shape[:2], dilation), strides, padding)
    mesh = jax.sharding.get_abstract_mesh()
    return x.size and gpu.fits(x, kernel, strides, pads, dilation) and x.shape[0] % max(1, mesh.size) == 0


def _by_triton(x, kernel, affine, relu):
    """`gpu.depthwise`, each device of the mesh in context its share of the images.

    XLA's partitioner would have every device compute all of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return gpu.depthwise(x, kernel, affine, relu)
    batch, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    return jax.shard_map(
        lambda x, kernel, affine: gpu.depthwise(x, kernel, affine, relu),
        in_specs=(batch, whole, whole),
        out_specs=batch,
        check_vma=False,
    )(x, kernel, affine)


def depthwise_by_shifts(
    x: jax.Array, kernel: jax.Array, *, strides: tuple[int, int], padding: str, dilation: tuple[int, int]
) -> jax.Array:
    """`depthwise_convolution` as a sum over the taps of the kernel: the image shifted, times a weight a channel.

    XLA's grouped convolution on the CPU is many times slower than this, its gradients more so.
    """
    dtype, wide = x.dtype, jnp.promote_types(x.dtype, jnp.float32)  # add up as a convolution does
    x = _padded(x.astype(wide), kernel.shape[:2], strides, padding, dilation)
    x = jnp.repeat(x, kernel.shape[-1] // x.shape[-1], axis=-1)
    return _sum_of_taps(x, kernel[:, :, 0].astype(wide), strides, dilation).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _sum_of_taps(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], dilation: tuple[int, int]) -> jax.Array:
    """`[N, H, W, C]`, padded already, and `[kh, kw, C]` -> `[N, H', W', C]`."""
    return reduce(jnp.add, (tap * kernel[i, j] for i, j, tap in _taps(x, kernel.shape[:2], strides, dilation)))


def _sum_of_taps_forward(x, kernel, strides, dilation):
    return _sum_of_taps(x, kernel, strides, dilation), (x, kernel)


def _sum_of_taps_backward(strides, dilation, saved, dy):
    x, kernel = saved
    if not dy.size:
        return jnp.zeros_like(x), jnp.zeros_like(kernel)
    # A pixel's gradient is the same sum, over the windows that reach it, with the kernel turned round.
    edges = _reach(x.shape, [(0, 0), (0, 0)], dy.shape, kernel.shape[:2], strides, dilation)
    edges = [(low, high, stride - 1) for (low, high), stride in zip(edges, strides, strict=True)]
    spread = lax.pad(dy, np.zeros((), dy.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    taps = _taps(spread, kernel.shape[:2], dilation=dilation)
    dx = reduce(jnp.add, (tap * kernel[-1 - i, -1 - j] for i, j, tap in taps))
    by_rows = partial(_kernel_gradient_by_rows, shape=kernel.shape, strides=strides, dilation=dilation)
    return dx, _sum_over_devices(by_rows, x, dy)


def _kernel_gradient_by_rows(x, dy, *, shape, strides, dilation):
    # Row by row, into a sum for each tap and column: XLA on the CPU is many times slower with
    # reductions over whole shifted images.
    batch, rows, columns, channels = dy.shape
    places = [(i, j) for i in range(shape[0]) for j in range(shape[1])]

    def add_row(totals, row):
        n, h = row // rows, row % rows
        gradient = lax.dynamic_slice(dy, (n, h, 0, 0), (1, 1, columns, channels))[0, 0]
        reached = [
            lax.dynamic_slice(x, (n, h * strides[0] + i * dilation[0], 0, 0), (1, 1, *x.shape[2:]))[0, 0]
            for i in range(shape[0])
        ]
        return [
            total + gradient * reached[i][_every(j * dilation[1], columns, strides[1])]
            for total, (i, j) in zip(totals, places, strict=True)
        ], None

    totals = [jnp.zeros((columns, channels), dy.dtype) for _ in places]
    totals, _ = lax.scan(add_row, totals, jnp.arange(batch * rows))
    return jnp.stack([jnp.sum(total, axis=0) for total in totals]).reshape(shape)


_sum_of_taps.defvjp(_sum_of_taps_forward, _sum_of_taps_backward)


# Pointwise convolution -----------------------------------------------------------------------------


def pointwise_convolution(x: jax.Array, kernel: jax.Array, *, strides: tuple[int, int] = (1, 1)) -> jax.Array:
    """1x1 convolution: a matrix product over the channels, which every backend runs best as one.

    Args:
      x: `[N, H, W, C]`.
      kernel: `[1, 1, C, features]`.
      strides: rows, columns; 2 keeps the pixels 0, 2, 4, ... of a dimension.

    Returns:
      `[N, ceil(H / strides[0]), ceil(W / strides[1]), features]`.
    """
    if tuple(strides) != (1, 1):
        # XLA for GPUs fuses such a slice into the product, and aborts the process there (openxla/xla issue 47381).
        x = x[:, :: strides[0], :: strides[1]]
        x = lax.platform_dependent(x, cuda=lax.optimization_barrier, default=lambda x: x)
    cuda = {"triton": _product_by_parts}
    return _lower(x, kernel[0, 0], cpu=_product_of_its_own, stock=_product, cuda=cuda)


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`[N, H, W, C]`, `[C, features]` -> `[N, H, W, features]`."""
    return lax.dot_general(x, kernel, (((3,), (0,)), ((), ())))


@jax.custom_vjp
def _product_of_its_own(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`_product`, kept apart from what comes before it in the backward pass.

    XLA on the CPU fuses the gradient of the normalization into a transposed copy for each of the two
    products that take it.
    """
    return _product(x, kernel)


def _product_forward(x, kernel):
    return _product(x, kernel), (x, kernel)


def _product_backward(saved, dy):
    x, kernel = saved
    pixels = x.reshape(-1, x.shape[-1])
    gradients = lax.optimization_barrier(dy).reshape(-1, dy.shape[-1])
    dx = lax.dot_general(gradients, kernel, (((1,), (1,)), ((), ())))
    return dx.reshape(x.shape), lax.dot_general(pixels, gradients, (((0,), (0,)), ((), ())))


_product_of_its_own.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def _product_by_parts(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`_product`; the gradient of a small kernel is added up from parts of images.

    XLA for GPUs splits a long sum over pixels among the cores by a power of two, and where that does not divide the
    pixels it first copies both operands, padded.
    """
    return _product(x, kernel)


def _product_by_parts_forward(x, kernel):
    return _product(x, kernel), (x, kernel)


def _product_by_parts_backward(saved, dy):
    x, kernel = saved
    dx = lax.dot_general(dy, kernel, (((3,), (1,)), ((), ())))
    n, rows = x.shape[:2]
    parts = next((p for p in range(1, 9) if rows % p == 0 and n * p >= _PARTS), None)
    # What the parts write must be little next to what they read.
    if parts is None or 4 * n * parts * kernel.size > x.size // 4:
        return dx, lax.dot_general(x, dy, (((0, 1, 2), (0, 1, 2)), ((), ())))
    x, dy = (array.reshape(n, parts, -1, array.shape[-1]) for array in (x, dy))
    wide = jnp.promote_types(x.dtype, jnp.float32)
    sums = lax.dot_general(x, dy, (((2,), (2,)), ((0, 1), (0, 1))), preferred_element_type=wide)
    return dx, jnp.sum(sums, axis=(0, 1)).astype(kernel.dtype)


_PARTS = 256  # of which each keeps one of a GPU's cores busy: there are 108 to 160

_product_by_parts.defvjp(_product_by_parts_forward, _product_by_parts_backward)


# Between two normalizations ---------------------------------------------------------------------


def normalized_separable_convolution(
    x: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    depthwise_kernel: jax.Array,
    pointwise_kernel: jax.Array,
    *,
    relu: bool = True,
    dilation: tuple[int, int] = (1, 1),
) -> tuple[jax.Array, jax.Array]:
    """What stands between two batch normalizations: the first one's multiply-add, ReLU, a separable convolution.

    `y = pointwise(depthwise(relu(x * scale + shift)))` and the moments that the second one needs. With
    the lowering 'fused', where the mesh in context is of TPUs and `fused.fits` its channels, in one pass over memory;
    with 'triton' on CUDA the normalization, ReLU and depthwise convolution in one.

    Args:
      x: `[N, H, W, C]`.
      scale: `[C]`, float32 or better, as `shift`.
      shift: `[C]`.
      depthwise_kernel: `[kh, kw, 1, C]`; stride 1, padding 'SAME'.
      pointwise_kernel: `[1, 1, C, features]`.
      relu: False leaves it out.
      dilation: of the depthwise convolution: rows, columns.

    Returns:
      `y` `[N, H, W, features]`, and the means of `y` and of `y * y` over images, rows and columns,
      `[2, features]` in the type of `scale`.

    Raises:
      ValueError: 'fused' on TPUs, with images of which a chip has no multiple of `fused.IMAGES`.
    """
    mesh, features = jax.sharding.get_abstract_mesh(), pointwise_kernel.shape[-1]
    if _chosen.get() == "fused" and _on_tpus(mesh) and depthwise_kernel.shape[:2] == (3, 3) and dilation == (1, 1):
        if x.shape[0] % (fused.IMAGES * mesh.size):
            raise ValueError(
                f"the lowering 'fused' takes a multiple of {fused.IMAGES} images a chip, not {x.shape[0]} images over "
                f"{mesh.size} chips; change the batch, or leave step.lowering out."
            )
        share = (x.shape[0] // mesh.size, *x.shape[1:])
        if fused.fits(share, features, x.dtype.itemsize):
            batch, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
            y, sums = jax.shard_map(
                partial(fused.separable, relu=relu),
                in_specs=(batch, whole, whole, whole, whole),
                out_specs=(batch, batch),
                check_vma=False,
            )(x, scale, shift, depthwise_kernel, pointwise_kernel)
            return y, jnp.sum(sums, axis=0) / (y.size // features)
    options = dict(relu=relu, dilation=dilation)
    functions = dict(cpu=_normalized_by_shifts, stock=_normalized_by_groups, cuda={"triton": _normalized_by_triton})
    y = _lower(x, jnp.stack([scale, shift]), depthwise_kernel, **functions, **options)
    y = pointwise_convolution(y, pointwise_kernel)
    return y, moments(y)


def _normalized(x: jax.Array, affine: jax.Array, relu: bool) -> jax.Array:
    z = x.astype(affine.dtype) * affine[0] + affine[1]
    return (jax.nn.relu(z) if relu else z).astype(x.dtype)


def _normalized_by_shifts(x, affine, kernel, *, relu, dilation):
    options = dict(strides=(1, 1), padding="SAME", dilation=dilation)
    return depthwise_by_shifts(_normalized(x, affine, relu), kernel, **options)


def _normalized_by_groups(x, affine, kernel, *, relu, dilation):
    options = dict(strides=(1, 1), padding="SAME", dilation=dilation)
    return depthwise_by_groups(_normalized(x, affine, relu), kernel, **options)


def _normalized_by_triton(x, affine, kernel, *, relu, dilation):
    options = dict(strides=(1, 1), padding="SAME", dilation=dilation)
    if affine.dtype == jnp.float32 and _has_kernel(x, kernel, **options):
        return _by_triton(x, kernel, affine, relu)
    return depthwise_by_fusions(_normalized(x, affine, relu), kernel, **options)


def moments(x: jax.Array) -> jax.Array:
    """Means of `x` and of `x * x` over all but the channels, in float32 or better: `[..., C]` -> `[2, C]`."""
    return _lower(x, cpu=_moments, stock=_moments, cuda={"triton": _moments_at_once})


def _moments(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    pixels = tuple(range(x.ndim - 1))
    return jnp.stack([jnp.mean(wide, axis=pixels), jnp.mean(jnp.square(wide), axis=pixels)])


@jax.custom_vjp
def _moments_at_once(x: jax.Array) -> jax.Array:
    """`_moments` by one reduction: behind a matrix product XLA for GPUs reads `x` for each of two."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    zero = np.zeros((), wide.dtype)
    sums = lax.reduce(
        (wide, jnp.square(wide)), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), tuple(range(x.ndim - 1))
    )
    return jnp.stack(sums) / (x.size // x.shape[-1])


def _moments_forward(x):
    return _moments_at_once(x), x


def _moments_backward(x, gradient):
    gradient = gradient / (x.size // x.shape[-1])
    return ((gradient[0] + 2 * gradient[1] * x.astype(gradient.dtype)).astype(x.dtype),)


_moments_at_once.defvjp(_moments_forward, _moments_backward)


def _on_tpus(mesh: AbstractMesh) -> bool:
    return mesh.abstract_device is not None and mesh.abstract_device.platform == "tpu"


# Pooling -------------------------------------------------------------------------------------------


def max_pool(
    x: jax.Array,
    *,
    window: tuple[int, int] = (3, 3),
    strides: tuple[int, int] = (2, 2),
    padding: str = "SAME",
) -> jax.Array:
    """Maximum over windows: `[N, H, W, C]` -> `[N, H', W', C]`; `padding` is one of `PADDINGS`.

    The gradient goes to the first of equal maxima, row by row; where a window has NaN or nothing but -inf,
    on CPUs to another pixel of it, or to none.
    """
    options = dict(window=window, strides=strides, padding=padding)
    cuda = {"shifts": max_pool_by_taps, "triton": max_pool_by_taps}
    return _lower(x, cpu=max_pool_by_taps, stock=max_pool_by_windows, cuda=cuda, **options)


def max_pool_by_windows(x: jax.Array, *, window: tuple[int, int], strides: tuple[int, int], padding: str) -> jax.Array:
    """`max_pool` as XLA's reduction over windows."""
    pads = _pads(x.shape[1:3], window, strides, padding)
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, *window, 1), (1, *strides, 1), [(0, 0), *pads, (0, 0)])


def max_pool_by_taps(x: jax.Array, *, window: tuple[int, int], strides: tuple[int, int], padding: str) -> jax.Array:
    """`max_pool` as the maximum of the taps of a window, which remembers where each maximum was.

    XLA's gradient on the CPU scatters, and takes many times as long; it also keeps `x`, where this keeps
    a byte for each output.
    """
    return _max_of_taps(_padded(x, window, strides, padding, (1, 1), -jnp.inf), window, strides)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _max_of_taps(x: jax.Array, window: tuple[int, int], strides: tuple[int, int]) -> jax.Array:
    """`[N, H, W, C]`, padded already -> `[N, H', W', C]`."""
    return reduce(jnp.maximum, (tap for _, _, tap in _taps(x, window, strides)))


def _max_of_taps_forward(x, window, strides):
    (_, _, best), *taps = _taps(x, window, strides)
    number = np.min_scalar_type(-window[0] * window[1])  # a byte, for up to 128 taps
    place = jnp.zeros(best.shape, number)
    for i, j, tap in taps:
        place = jnp.where(tap > best, number.type(i * window[1] + j), place)
        best = jnp.maximum(best, tap)
    return best, (place, x.shape)


def _max_of_taps_backward(window, strides, saved, dy):
    place, shape = saved
    # The pixels of one phase (row % stride, column % stride) are a grid like that of the windows, on
    # which pixel q is tap `stride * k + phase` of window q - k: no scatter, a sum of shifted arrays.
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
    return reduce(jnp.maximum, (tap for _, _, tap in _taps(x, window, dilation=(rate, rate))))


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
