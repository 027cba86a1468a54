"""ReLU, separable convolution and the sums of a batch normalization in one pass over memory: kernels for TPUs.

A training step on a TPU waits for memory, not for arithmetic. XLA compiles a separable convolution and
its normalization into two passes forward and four backward: the depthwise result goes to memory and
comes back, and the gradient is read once for each operand. These kernels make one pass each way. They
read an image row by row and keep three rows on the chip; the backward pass recomputes the depthwise
result. For `X` bytes in and `Y` bytes out, forward: read X, write Y; backward: read X, Y and the
gradient of Y, write the gradient of X. That is `3 X + 3 Y`; XLA's passes are `10 X + 5 Y`.

The normalization before the convolution, a scale and a shift, is applied on the way in; of the one after
it, only the sums are computed. The kernels' arrays are `[H, W, N, C]`: a shift by a pixel is then only
an address. The transpose to and from `[N, H, W, C]` is only a layout, which XLA also gives its own
operations around the kernels.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, PartitionSpec

from xception_flax.text.errors import UserError

IMAGES = 16  # processed together: the rows of a tile of 16-bit numbers
LANES = 128  # fewer channels are padded to this number, in memory too
VMEM_BYTES = 96 * 2**20  # of the 128 MiB on a chip; v4 and v5p do not have as much

# JAX's names of the TPUs that have as much: v5e and v6e.
DEVICE_KINDS = ("TPU v5 lite", "TPU v5e", "TPU v6 lite", "TPU v6e")

SCOPE = "fused_separable"  # in the names of the kernels' operations in a compiled program

_HWNC, _NHWC = (1, 2, 0, 3), (2, 0, 1, 3)
_TAPS = [(i, j) for i in range(3) for j in range(3)]


def takes(x: jax.Array, depthwise_kernel: jax.Array, pointwise_kernel: jax.Array) -> bool:
    """Whether `separable_over_devices` takes images `[N, H, W, C]` and kernels: on TPUs, where they fit (see `fits`).

    Raises:
      UserError: on TPUs, where a chip's share of the images is no multiple of `IMAGES`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not is_on_tpus(mesh) or depthwise_kernel.shape[:2] != (3, 3):
        return False
    if x.shape[0] % (IMAGES * mesh.size):
        raise UserError(
            f"the lowering 'fused' takes a multiple of {IMAGES} images a chip, not {x.shape[0]} images over "
            f"{mesh.size} chips; change the batch, or leave step.lowering out."
        )
    share = (x.shape[0] // mesh.size, *x.shape[1:])
    return fits(share, pointwise_kernel.shape[-1], x.dtype.itemsize)


def is_on_tpus(mesh: AbstractMesh) -> bool:
    """Whether the devices of the mesh are TPUs."""
    return mesh.abstract_device is not None and mesh.abstract_device.device_kind.startswith("TPU")


def separable_over_devices(
    x: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    depthwise_kernel: jax.Array,
    pointwise_kernel: jax.Array,
    *,
    relu: bool,
) -> tuple[jax.Array, jax.Array]:
    """`ops.normalized_separable_convolution`, by each device of the mesh in context for its share of the images."""
    batch, whole = PartitionSpec(jax.sharding.get_abstract_mesh().axis_names), PartitionSpec()
    with jax.named_scope(SCOPE):
        y, sums = jax.shard_map(
            partial(separable, relu=relu),
            in_specs=(batch, whole, whole, whole, whole),
            out_specs=(batch, batch),
            check_vma=False,
        )(x, scale, shift, depthwise_kernel, pointwise_kernel)
    return y, jnp.sum(sums, axis=0) / (y.size // y.shape[-1])


def fits(shape: tuple[int, ...], features: int, itemsize: int) -> bool:
    """Whether `separable` maps `[N, H, W, C]` to `features` channels without waste and within a chip's memory."""
    n, _, width, channels = shape
    rows = IMAGES * width * (2 * 3 * channels * 4 + itemsize * (6 * channels + 5 * features))
    kernels = channels * features * 2 * (4 + itemsize)
    return n % IMAGES == 0 and channels >= LANES and rows + kernels <= VMEM_BYTES


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def separable(
    x: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    depthwise_kernel: jax.Array,
    pointwise_kernel: jax.Array,
    relu: bool,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`y = pointwise(depthwise(relu(x * scale + shift)))` and sums of `y`.

    Args:
      x: `[N, H, W, C]`; see `fits`.
      scale: `[C]`, float32.
      shift: `[C]`, float32.
      depthwise_kernel: `[3, 3, 1, C]`; stride 1, padding 'SAME'.
      pointwise_kernel: `[1, 1, C, features]`.
      relu: False leaves it out.
      interpret: run the kernels in Pallas' interpreter, on any machine, slowly.

    Returns:
      `y` `[N, H, W, features]`, and for every `IMAGES` images the sums of `y` and `y * y` over pixels,
      `[N / IMAGES, 2, features]` float32.
    """
    weights = (depthwise_kernel.reshape(9, -1).astype(jnp.float32), pointwise_kernel[0, 0])
    y, sums = _forward(x.transpose(_HWNC), jnp.stack([scale, shift]), *weights, relu, interpret)
    return y.transpose(_NHWC), sums


def _separable_forward(x, scale, shift, depthwise_kernel, pointwise_kernel, relu, interpret):
    y, sums = separable(x, scale, shift, depthwise_kernel, pointwise_kernel, relu, interpret)
    return (y, sums), (x, scale, shift, depthwise_kernel, pointwise_kernel, y)


def _separable_backward(relu, interpret, saved, gradients):
    x, scale, shift, depthwise_kernel, pointwise_kernel, y = saved
    gy, gsums = gradients
    taps, affine = depthwise_kernel.reshape(9, -1).astype(jnp.float32), jnp.stack([scale, shift])
    x, y, gy = (array.transpose(_HWNC) for array in (x, y, gy))
    gx, gaffine, gdepthwise, gpointwise = _backward(
        x, y, gy, gsums, affine, taps, pointwise_kernel[0, 0], relu, interpret
    )
    gdepthwise = gdepthwise.reshape(depthwise_kernel.shape).astype(depthwise_kernel.dtype)
    gpointwise = gpointwise.reshape(pointwise_kernel.shape).astype(pointwise_kernel.dtype)
    return gx.transpose(_NHWC), *gaffine, gdepthwise, gpointwise


separable.defvjp(_separable_forward, _separable_backward)


# Step h reads row h of an image and computes row h - 1 of the result from rows h - 2 to h. There is one
# step more than rows: the first computes nothing, the last reads nothing. Rows are kept in ring buffers
# of three, `[3, W + 2, IMAGES, C]`, with a pixel of zeros left and right.


def _forward(x, affine, depthwise, pointwise, relu, interpret):
    height, width, n, channels = x.shape
    features = pointwise.shape[1]
    return _call(
        partial(_forward_kernel, relu=relu),
        (x, affine, depthwise, pointwise),
        in_specs=[_rows(x), _whole(affine), _whole(depthwise), _whole(pointwise)],
        outputs=[
            (y := jax.ShapeDtypeStruct((height, width, n, features), x.dtype), _rows(y, lag=1)),
            (jax.ShapeDtypeStruct((n // IMAGES, 2, features), jnp.float32), _group(features)),
        ],
        scratch=[((3, width + 2, IMAGES, channels), jnp.float32), ((width, IMAGES, channels), x.dtype)],
        flops=2 * x.size * (9 + features),
        interpret=interpret,
    )


def _forward_kernel(x, affine, depthwise, pointwise, y, sums, ring, row, *, relu):
    h, height = pl.program_id(1), pl.num_programs(1) - 1
    _read_normalized(x, affine, ring, h, height, relu)

    @pl.when(h == 0)
    def _():
        sums[...] = jnp.zeros_like(sums)

    @pl.when(h > 0)
    def _():
        _convolve(ring, depthwise, row, h)
        product = jnp.dot(_flat(row[...]), pointwise[...], preferred_element_type=jnp.float32)
        y[0] = product.reshape(y.shape[1:]).astype(y.dtype)
        sums[0, 0:1] += jnp.sum(product, axis=0, keepdims=True)
        sums[0, 1:2] += jnp.sum(product * product, axis=0, keepdims=True)


def _backward(x, y, gy, gsums, affine, depthwise, pointwise, relu, interpret):
    _, width, _, channels = x.shape
    features = pointwise.shape[1]
    # Images are summed in groups of eight, as the vector unit holds them, and the groups at the end.
    partial_sums = (
        jax.ShapeDtypeStruct((2, 8, channels), jnp.float32),
        jax.ShapeDtypeStruct((9, 8, channels), jnp.float32),
        jax.ShapeDtypeStruct(pointwise.shape, jnp.float32),
    )
    ring = ((3, width + 2, IMAGES, channels), jnp.float32)
    gx, gaffine, gdepthwise, gpointwise = _call(
        partial(_backward_kernel, relu=relu),
        (x, y, gy, gsums, affine, depthwise, pointwise),
        in_specs=[
            *(_rows(x), _rows(y), _rows(gy), _group(features)),
            *(_whole(affine), _whole(depthwise), _whole(pointwise)),
        ],
        outputs=[(x, _rows(x, lag=1)), *((array, _whole(array)) for array in partial_sums)],
        scratch=[ring, ring, *(((width, IMAGES, c), x.dtype) for c in (channels, channels, features))],
        flops=2 * x.size * (27 + 2 * features),
        interpret=interpret,
    )
    return gx, jnp.sum(gaffine, axis=1), jnp.sum(gdepthwise, axis=1), gpointwise


def _backward_kernel(*refs, relu):
    x, y, gy, gsums, affine, depthwise, pointwise, *refs = refs
    gx, gaffine, gdepthwise, gpointwise, *refs = refs
    ring, gring, row, x_before, gy_before = refs
    n, h, height = pl.program_id(0), pl.program_id(1), pl.num_programs(1) - 1
    width, images, channels = row.shape

    @pl.when((n == 0) & (h == 0))
    def _():
        for total in (gaffine, gdepthwise, gpointwise):
            total[...] = jnp.zeros_like(total)

    _read_normalized(x, affine, ring, h, height, relu)
    _zero_edges(gring, h, height)

    @pl.when(h > 0)
    def _():
        _convolve(ring, depthwise, row, h)
        gpointwise[...] += lax.dot_general(
            *(_flat(row[...]), _flat(gy_before[...]), (((0,), (0,)), ((), ()))), preferred_element_type=jnp.float32
        )

    @pl.when(h < height)
    def _():
        def pixel(w):
            through_sums = gsums[0, 0:1] + 2 * gsums[0, 1:2] * y[0, w].astype(jnp.float32)
            gy_before[w] = (gy[0, w].astype(jnp.float32) + through_sums).astype(gy_before.dtype)

        _each(width, pixel)
        g = lax.dot_general(
            *(_flat(gy_before[...]), pointwise[...], (((1,), (1,)), ((), ()))), preferred_element_type=jnp.float32
        )
        gring[h % 3, 1:-1] = g.reshape(width, images, channels)

    @pl.when(h > 0)
    def _():
        above, here, below = _slots(h)

        def pixel(w):
            g = gring[here, w + 1]
            for tap, (i, j) in enumerate(_TAPS):
                gdepthwise[tap] += _eights(g * ring[(above, here, below)[i], w + j])
            g = _stencil(gring, depthwise, h, w, reverse=True)
            g = jnp.where(ring[here, w + 1] > 0, g, 0) if relu else g
            gaffine[0] += _eights(g * x_before[w].astype(jnp.float32))
            gaffine[1] += _eights(g)
            gx[0, w] = (g * affine[0:1]).astype(gx.dtype)

        _each(width, pixel)

    @pl.when(h < height)
    def _():
        x_before[...] = x[0]


def _read_normalized(x, affine, ring, h, height, relu):
    """Writes row h of the image into the ring, normalized, with zeros around the image."""
    _zero_edges(ring, h, height)

    @pl.when(h < height)
    def _():
        def pixel(w):
            z = x[0, w].astype(jnp.float32) * affine[0:1] + affine[1:2]
            ring[h % 3, w + 1] = jnp.maximum(z, 0) if relu else z

        _each(x.shape[1], pixel)


def _zero_edges(ring, h, height):
    @pl.when(h == 0)
    def _():
        ring[...] = jnp.zeros_like(ring)

    @pl.when(h == height)
    def _():
        ring[h % 3] = jnp.zeros_like(ring[0])


def _convolve(ring, kernel, row, h):
    """Writes row h - 1 of the depthwise convolution into `row`."""

    def pixel(w):
        row[w] = _stencil(ring, kernel, h, w).astype(row.dtype)

    _each(row.shape[0], pixel)


def _stencil(ring, kernel, h, w, *, reverse=False):
    """Returns pixel w of row h - 1; `reverse` is the transpose of the convolution."""
    slots = _slots(h)
    taps = (ring[slots[i], w + j] * kernel[8 - tap if reverse else tap][None] for tap, (i, j) in enumerate(_TAPS))
    return sum(taps, start=jnp.zeros(ring.shape[2:], ring.dtype))


def _slots(h):
    """Returns the places of rows h - 2, h - 1 and h in a ring."""
    return (h + 1) % 3, (h + 2) % 3, h % 3


def _each(width: int, pixel: Callable[[jax.Array], None]) -> None:
    lax.fori_loop(0, width, lambda w, _: pixel(w), None)


def _flat(row: jax.Array) -> jax.Array:
    return row.reshape(-1, row.shape[-1])


def _eights(pixel: jax.Array) -> jax.Array:
    return jnp.sum(pixel.reshape(-1, 8, pixel.shape[-1]), axis=0)


def _call(kernel, operands, *, in_specs, outputs, scratch, flops, interpret):
    height, _, n, _ = operands[0].shape
    arrays = (*operands, *(shape for shape, _ in outputs))
    return pl.pallas_call(
        kernel,
        grid=(n // IMAGES, height + 1),
        in_specs=in_specs,
        out_specs=[spec for _, spec in outputs],
        out_shape=[jax.ShapeDtypeStruct(shape.shape, shape.dtype) for shape, _ in outputs],
        scratch_shapes=[pltpu.VMEM(*shape) for shape in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops, transcendentals=0, bytes_accessed=sum(a.size * a.dtype.itemsize for a in arrays)
        ),
        interpret=interpret,
        name=kernel.func.__name__.strip("_"),
    )(*operands)


def _rows(array, lag: int = 0) -> pl.BlockSpec:
    """A row of `IMAGES` images a step: row h - lag, or the one nearest to it."""
    height, width, _, channels = array.shape
    return pl.BlockSpec((1, width, IMAGES, channels), lambda n, h: (jnp.clip(h - lag, 0, height - 1), 0, n, 0))


def _group(features: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, 2, features), lambda n, h: (n, 0, 0))


def _whole(array) -> pl.BlockSpec:
    return pl.BlockSpec(array.shape, lambda n, h: (0,) * array.ndim)
